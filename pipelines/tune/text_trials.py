"""What a recipe costs and keeps on some prompts, beside sequential decoding of the same model.

Prompts are tried batch by batch; what loses more answers than chance would if it kept the budget is given up early.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hasten.errors import RefusedError
from hasten.pipelines.bench.foreign import because
from hasten.pipelines.text.arguments import PLAIN
from hasten.pipelines.tune.text_goal import LEVEL, TextGoal, at_most, interval
from hasten.recipe import Recipe

HOPELESS = 0.01
"""Lost answers that a recipe within the budget would have less often than this end its trial."""

Right = Callable[[str, str], bool]
"""Is the second, an answer, right for the first, a prompt?"""


@dataclass(frozen=True, slots=True)
class Text:
    """One text as it came out. ids: its tokens up to the first that ends it. right: None where nobody knows. nfe: evaluations it
    took part in; layers: tokens computed for it, times layers; seconds: its share of its batch."""

    ids: tuple[int, ...]
    right: bool | None
    nfe: int
    layers: float
    seconds: float


@dataclass(frozen=True, slots=True)
class TextOutcome:
    """One text beside sequential decoding's. same: token by token. speedup: of its batch. layers, plain_layers: token-layers
    of both. right, plain_right: whether they answer; None where nobody knows."""

    same: bool
    speedup: float
    seconds: float
    nfe: int
    layers: float
    plain_layers: float
    right: bool | None
    plain_right: bool | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TextMeasured:
    """A recipe on prompts. outcomes: in their order; fewer of them where it was given up. why: the reason then."""

    name: str
    outcomes: tuple[TextOutcome, ...]
    why: str = ""

    @classmethod
    def of(cls, name: str, outcomes: Sequence[dict[str, Any]], why: str = "") -> TextMeasured:
        """What a journal says."""
        return cls(name, tuple(TextOutcome(**each) for each in outcomes), why)

    @property
    def whole(self) -> bool:
        return bool(self.outcomes) and not self.why

    @property
    def speedup(self) -> float:
        """In seconds, the median over the prompts."""
        return statistics.median(each.speedup for each in self.outcomes)

    @property
    def work(self) -> float:
        """Computed tokens times layers, as a share of sequential decoding's."""
        return sum(each.layers for each in self.outcomes) / sum(each.plain_layers for each in self.outcomes)

    @property
    def same(self) -> int:
        """How many texts are sequential decoding's."""
        return sum(each.same for each in self.outcomes)

    @property
    def share(self) -> float:
        """Of the texts, those that are sequential decoding's."""
        return self.same / len(self.outcomes) if self.outcomes else 0.0

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Where the true share may lie."""
        return interval(self.same, len(self.outcomes), level)

    @property
    def accuracy(self) -> tuple[float, float] | None:
        """(shares of right answers of this and of sequential decoding); None where nobody knows."""
        known = [(each.right, each.plain_right) for each in self.outcomes if each.right is not None and each.plain_right is not None]
        if not known:
            return None
        return statistics.fmean(right for right, _ in known), statistics.fmean(right for _, right in known)

    def values(self, goal: TextGoal) -> list[float] | None:
        """What a study minimises: seconds and work relative to sequential decoding, and the share of other texts; of the texts
        that it wrote before it was given up, None where there is none. Outside the budget a sequential decoding is added to
        both costs, which is what a reader of such texts would have to do."""
        if not self.outcomes:
            return None
        again = 0.0 if goal.met(self.share) else 1.0
        return [again + 1 / self.speedup, again + self.work, 1 - self.share]


class TextBench:
    """Sequential decoding of some prompts, made once, and recipes beside it.

    pipe: a `TextDiffusionPipeline`. call: arguments of its `generate`, the same for all. batch: texts at once. right: tells a
    right answer, where that is known. steady: one thread of the CPU does everything, so that processor seconds are counted,
    which other programs on the machine do not change; else they are wall seconds.
    """

    def __init__(self, pipe: Any, prompts: Sequence[str], call: dict[str, Any], batch: int, right: Right | None = None) -> None:
        self.pipe, self.prompts, self.call, self.batch, self.right = pipe, tuple(prompts), call, batch, right
        self.wait: Callable[[], None] = torch.cuda.synchronize if pipe.device.type == "cuda" else lambda: None
        self.steady = pipe.device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.process_time if self.steady else time.perf_counter
        self._write(PLAIN, self.prompts[: min(2, batch)])  # the first call of all is slow
        self.plain = [text for part in self._parts(batch) for text in self._write(PLAIN, part)]

    @property
    def seconds(self) -> float:
        """Of a text of sequential decoding."""
        return statistics.fmean(text.seconds for text in self.plain)

    def measure(self, name: str, recipe: Recipe, goal: TextGoal | None = None, again: int = 0) -> TextMeasured:
        """`recipe` on all prompts. goal: give up as soon as it has certainly lost too much. again: where seconds are not steady,
        sequential decoding is timed once more beside so many of the batches, and only these say how fast the recipe is."""
        found: list[TextOutcome] = []
        count = -(-len(self.prompts) // self.batch)
        timed = {round(k * (count - 1) / max(1, again - 1)) for k in range(0 if self.steady else min(again, count))}
        for number, part in enumerate(self._parts(self.batch)):
            plain = self.plain[len(found) : len(found) + len(part)]
            before = sum(text.seconds for text in plain)
            try:
                if number in timed:
                    before = sum(text.seconds for text in self._write(PLAIN, part))
                texts = self._write(recipe, part)
            except Exception as error:  # noqa: BLE001 - whatever it raises is the reason that is reported
                return TextMeasured(name, tuple(found), because(error))
            ratio = before / max(1e-9, sum(text.seconds for text in texts))
            found += [_beside(text, base, ratio) for text, base in zip(texts, plain, strict=True)]
            measured = TextMeasured(name, tuple(found))
            if goal is not None and len(found) < len(self.prompts) and (why := _hopeless(measured, goal)):
                return TextMeasured(name, tuple(found), why)
        return TextMeasured(name, _timed(found, self.batch, timed) if timed else tuple(found))

    def floor(self) -> float:
        """Share of texts that sequential decoding writes again when texts are batched otherwise: what rounding alone changes."""
        other = max(1, self.batch // 2) if self.batch > 1 else min(4, len(self.prompts))
        texts = [text for part in self._parts(other) for text in self._write(PLAIN, part)]
        return statistics.fmean(text.ids == base.ids for text, base in zip(texts, self.plain, strict=True))

    def _parts(self, batch: int) -> Iterator[tuple[str, ...]]:
        for begin in range(0, len(self.prompts), batch):
            yield self.prompts[begin : begin + batch]

    def _write(self, recipe: Recipe, prompts: Sequence[str]) -> list[Text]:
        """One batch. Raises `RefusedError` where the pipeline left a part of the recipe out."""
        noise = [torch.Generator().manual_seed(number) for number in range(len(prompts))]  # some parts draw
        self.wait()
        began = self.clock()
        output = self.pipe.generate(prompts=list(prompts), recipe=recipe, generator=noise, **self.call)
        self.wait()
        seconds = (self.clock() - began) / len(prompts)
        did = output.report.recipe
        if recipe.revise is not None and (did is None or did.revise is None):
            raise RefusedError(output.report.notes[-1])
        width = output.sequences.shape[1] - output.commit_step.shape[1]
        ids = [line[width : width + count] for line, count in zip(output.sequences.tolist(), output.lengths.tolist(), strict=True)]
        kept = [self._kept(line) for line in ids]
        return [
            Text(text, self._right(prompt, text), int(nfe), float(layers), seconds)
            for prompt, text, nfe, layers in zip(prompts, kept, output.nfe, output.token_layers, strict=True)
        ]

    def _kept(self, ids: list[int]) -> tuple[int, ...]:
        """The tokens before the first that ends the text."""
        ends = set(self.pipe.host.facts.eos_ids)
        return tuple(ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))])

    def _right(self, prompt: str, ids: tuple[int, ...]) -> bool | None:
        return None if self.right is None else self.right(prompt, str(self.pipe.tokenizer.decode(list(ids))))


def _beside(text: Text, base: Text, speedup: float) -> TextOutcome:
    return TextOutcome(text.ids == base.ids, speedup, text.seconds, text.nfe, text.layers, base.layers, text.right, base.right)


def _timed(found: Sequence[TextOutcome], batch: int, timed: set[int]) -> tuple[TextOutcome, ...]:
    """With the speed of the batches that were timed beside sequential decoding for all."""
    speedup = statistics.median(found[number * batch].speedup for number in timed)
    return tuple(
        TextOutcome(**(each.to_dict() | ({} if number // batch in timed else {"speedup": speedup})))
        for number, each in enumerate(found)
    )


def _hopeless(measured: TextMeasured, goal: TextGoal) -> str:
    """Why the other prompts are spared; "" where they are not."""
    done, lost = len(measured.outcomes), len(measured.outcomes) - measured.same
    if lost and at_most(measured.same, done, goal.limit) < HOPELESS:
        return f"given up after {done} prompts: {lost} other answers, where {goal} allows {done * (1 - goal.limit):.1g}"
    if measured.speedup < 1 and measured.work > 1:
        return f"given up after {done} prompts: slower than sequential decoding ({measured.speedup:.2f}x), with more work"
    return ""
