"""List tasks in text form: short questions about letters whose right answers, and number of them, are known exactly.

    copy: b k a d . . . . =            b k a d
    replace k x: b k a d . . . . =     b x a d
    insert x at 1: b k a d . . . . =   b x k a d
    shuffle: b k a d . . . . =         any order of the four

Every letter, digit, word and sign is one token of the bundled models, and dots fill the list to eight places, so an
answer always begins equally far from its list. In most tasks the tokens of the answer are independent given the
question: all may be written at once. In `shuffle` and `insert` (at any place) they are not, and whoever writes them
at once is wrong. Idea: ParallelBench, https://arxiv.org/abs/2510.04767 (a list in a line, operations on it); the
texts, the letters and the closed forms are ours.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

LETTERS = "abcdefghijklmnop"
PLACES = 8
"""A question shows its list in this many places; dots stand in the empty ones."""
SHORTEST = 4
HELD_OUT = 16
"""One of this many questions, chosen by its checksum, is never trained on."""


@dataclass(frozen=True)
class Question:
    """One question: `prompt` is its text, `answer` a right answer (with its leading space) drawn at random."""

    task: str
    items: tuple[str, ...]
    given: tuple[str, ...]
    prompt: str
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether this question is for tests only."""
        return zlib.crc32(self.prompt.encode()) % HELD_OUT == 0

    @property
    def entropy(self) -> float:
        """ln(number of right answers), in nats: the least loss that any model can have on this question."""
        return _TASKS[self.task].entropy(len(self.items))

    def right(self, text: str) -> bool:
        """Whether `text` (what was generated before the end of the text) is a right answer."""
        return _TASKS[self.task].right(self.items, self.given, tuple(text.split()))


@dataclass(frozen=True)
class _Task:
    """What is given besides the list, one right answer, the test for right answers, and ln of their number."""

    given: Callable[[Sequence[str], random.Random], tuple[str, ...]]
    answer: Callable[[Sequence[str], Sequence[str], random.Random], Iterable[str]]
    right: Callable[[Sequence[str], Sequence[str], Sequence[str]], bool]
    entropy: Callable[[int], float]


def _nothing(items: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    return ()


def _new(items: Sequence[str], rng: random.Random) -> str:
    return rng.choice([letter for letter in LETTERS if letter not in items])


def _inserted(items: Sequence[str], letter: str, place: int) -> tuple[str, ...]:
    return (*items[:place], letter, *items[place:])


def _replaced(items: Sequence[str], given: Sequence[str]) -> tuple[str, ...]:
    return tuple(given[1] if item == given[0] else item for item in items)


def _one(
    given: Callable[[Sequence[str], random.Random], tuple[str, ...]],
    answer: Callable[[Sequence[str], Sequence[str]], Iterable[str]],
) -> _Task:
    """A task with exactly one right answer."""
    return _Task(
        given,
        lambda items, extra, rng: answer(items, extra),
        lambda items, extra, found: tuple(answer(items, extra)) == tuple(found),
        lambda n: 0.0,
    )


_TASKS = {
    "copy": _one(_nothing, lambda items, given: items),
    "reverse": _one(_nothing, lambda items, given: reversed(items)),
    "sort": _one(_nothing, lambda items, given: sorted(items)),
    "replace": _one(lambda items, rng: (rng.choice(items), _new(items, rng)), _replaced),
    "insert-at": _one(
        lambda items, rng: (_new(items, rng), "at", str(rng.randint(0, len(items)))),
        lambda items, given: _inserted(items, given[0], int(given[2])),
    ),
    "insert": _Task(
        lambda items, rng: (_new(items, rng),),
        lambda items, given, rng: _inserted(items, given[0], rng.randint(0, len(items))),
        lambda items, given, found: found in [_inserted(items, given[0], i) for i in range(len(items) + 1)],
        lambda n: math.log(n + 1),
    ),
    "shuffle": _Task(
        _nothing,
        lambda items, given, rng: rng.sample(items, len(items)),
        lambda items, given, found: sorted(items) == sorted(found),
        lambda n: math.lgamma(n + 1),
    ),
}

TASKS = tuple(_TASKS)
DETERMINISTIC = ("copy", "reverse", "sort", "replace", "insert-at")
"""Tasks with one right answer: their tokens may be written at once."""


def ask(task: str, rng: random.Random, *, held_out: bool = False, length: int | None = None) -> Question:
    """A random question of `task` about 4 to 8 different letters (or `length` of them)."""
    while True:
        count = length or rng.randint(SHORTEST, PLACES)
        items = tuple(rng.sample(LETTERS, count))
        given = _TASKS[task].given(items, rng)
        head = " ".join((task.split("-")[0], *given))
        row = " ".join((*items, *"." * (PLACES - count)))
        answer = "".join(f" {item}" for item in _TASKS[task].answer(items, given, rng))
        question = Question(task, items, given, f"{head}: {row} =", answer)
        if question.held_out == held_out:
            return question


def questions(count: int, seed: int, *, held_out: bool, tasks: Sequence[str] = TASKS) -> list[Question]:
    """`count` questions, the tasks in turn; the same for the same seed."""
    rng = random.Random(seed)
    return [ask(tasks[i % len(tasks)], rng, held_out=held_out) for i in range(count)]


def read(prompt: str) -> Question | None:
    """The question that `prompt` asks, without an answer; None where it is none of these tasks."""
    head, _, row = prompt.partition(":")
    words, items = head.split(), tuple(item for item in row.removesuffix("=").split() if item != ".")
    if not words or not row.rstrip().endswith("=") or not items or not set(items) <= set(LETTERS):
        return None
    task, given = words[0], tuple(words[1:])
    shape = {"insert": 1, "replace": 2}.get(task, 0)
    if task == "insert" and len(given) == 3 and given[1] == "at" and given[2].isdecimal() and int(given[2]) <= len(items):
        return Question("insert-at", items, given, prompt, "")
    return Question(task, items, given, prompt, "") if task in TASKS and len(given) == shape else None
