"""What a commit filter is trained on: prompts like those that it will meet.

A bundled text model, or one that `hasten train pretrain` made, is asked what it was trained on (list tasks and Python sources,
the parts for training alone); for any other model somebody has to say what it is used for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.canvas import TextFacts
from hasten.errors import UsageError
from hasten.limits import Limits
from hasten.pipelines import list_tasks, python_sources
from hasten.pipelines.text.prompts import Prompts, check, collect

TASK_SLOTS, CODE_SLOTS = 16, 32
"""Slots to generate: behind a list task at most nine letters and ends of text; behind code one block."""
CODE_GIVEN = 32
CODE_SHARE = 8
"""One of so many texts is code, which takes four times as long as a list task."""
MOST_FILES = 200
"""Sources to cut code prompts from."""


@dataclass(frozen=True, slots=True)
class Asked:
    """prompts: int64 [P_b] each; new: slots to generate behind each; about: what they are, in words."""

    prompts: Sequence[Tensor]
    new: list[int]
    about: str


def own(
    data: dict[str, Any], tokenizer: Any, texts: int, facts: TextFacts, seed: int = 0, root: Path | None = None
) -> Asked:  # fmt: skip
    """`texts` prompts from the training splits of what a model was trained on. data: its card's `data`. root: another folder
    of Python sources than the standard library.

    Raises `UsageError` where the card names nothing that can be asked, or the model has no room for it.
    """
    tasks, code = bool(data.get("tasks")), data.get("code") is not None
    if not tasks and not code:
        raise UsageError("The model's card names nothing that it was trained on. Pass --prompts FILE with one prompt a line.")
    pieces = (texts // CODE_SHARE if tasks else texts) if code else 0
    questions = list_tasks.questions(texts - pieces, seed, held_out=False)
    prompts = [torch.tensor(tokenizer(question.prompt).input_ids) for question in questions]
    prompts += _code(tokenizer, pieces, seed, root)
    new = [TASK_SLOTS] * len(questions) + [CODE_SLOTS] * pieces
    check(Prompts(tuple(prompts), 0), new, facts, Limits(max_batch=texts))
    counts = ((len(questions), "list tasks"), (pieces, "pieces of code"))
    return Asked(prompts, new, " and ".join(f"{count} {what}" for count, what in counts if count))


def given(lines: Sequence[str], tokenizer: Any, new: int, facts: TextFacts, *, chat: bool = False) -> Asked:
    """Somebody's own prompts, `new` slots behind each. chat: each is said by a user, in the tokenizer's template.

    Raises `UsageError` or `LimitError` for prompts that the model cannot go on from.
    """
    turns = [[{"role": "user", "content": line}] for line in lines] if chat else None
    found = collect(None, None, None if chat else lines, turns, tokenizer, facts)
    check(found, [new] * len(lines), facts, Limits(max_batch=len(lines)))
    return Asked(found.ids, [new] * len(lines), f"{len(lines)} prompts")


def _code(tokenizer: Any, count: int, seed: int, root: Path | None) -> list[Tensor]:
    """Random pieces of sources; those that are long enough to go on behind them."""
    if not count:
        return []
    rng, least = random.Random(seed), CODE_GIVEN + CODE_SLOTS
    sources = list(python_sources.texts("train", root))
    chosen = rng.sample(sources, min(MOST_FILES, len(sources)))
    files = [ids for ids in (tokenizer(text, verbose=False).input_ids for text in chosen) if len(ids) >= least]
    if not files:
        raise UsageError(f"None of these sources has {least} tokens. Name a folder with more Python, or leave --data out.")
    found = []
    for _ in range(count):
        ids = rng.choice(files)
        begin = rng.randrange(len(ids) - least + 1)
        found.append(torch.tensor(ids[begin : begin + CODE_GIVEN]))
    return found
