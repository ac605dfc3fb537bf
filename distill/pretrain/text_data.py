"""What the text models read: list tasks and windows of Python sources. Batches are functions of their seed alone.

Shapes: b texts of l tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.distill.pretrain.text_config import CodeConfig, RecallConfig, TasksConfig
from hasten.errors import UsageError
from hasten.pipelines import list_tasks, python_sources

SPLITS: tuple[python_sources.Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class Batch:
    """ids (b, l) int64: whole texts. answer (b, l) bool: what may be asked. weight (b, l): share in the loss."""

    ids: Tensor
    answer: Tensor
    weight: Tensor


def encode_code(tokenizer: Any, out: Path, root: Path | None) -> dict[str, Tensor]:
    """The sources of each split as one row of int16 ids, an end of text after each file; encoded once, kept in `out`.

    `sources.json` beside it says where they came from. `root`: see `python_sources.files`.
    """
    file = out / "code.safetensors"
    if not file.is_file():
        rows: dict[str, Tensor] = {split: _row(tokenizer, split, root) for split in SPLITS}
        where = python_sources.version() if root is None else f"Python sources in {root.name}"
        counts = {split: len(row) for split, row in rows.items()}
        (out / "sources.json").write_text(json.dumps({"source": where, "tokens": counts}, indent=1))
        aside = file.with_suffix(".part")
        save_file(rows, aside)
        aside.rename(file)
    return load_file(file)


def _row(tokenizer: Any, split: python_sources.Split, root: Path | None) -> Tensor:
    ids: list[int] = []
    for text in python_sources.texts(split, root):
        ids += tokenizer(text, verbose=False).input_ids
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int16)


def tasks_batch(tokenizer: Any, c: TasksConfig, seed: int, *, held_out: bool = False) -> Batch:
    """Questions with their answers, and ends of text up to one length; asked for: everything after the question."""
    asked = list_tasks.questions(c.batch, seed, held_out=held_out)
    g = torch.Generator().manual_seed(seed)
    length = int(torch.randint(c.shortest, c.longest + 1, (), generator=g))
    prompts = tokenizer([q.prompt for q in asked]).input_ids
    answers = tokenizer([q.answer for q in asked]).input_ids
    eos = tokenizer.eos_token_id
    ids = torch.tensor(
        [(p + a + [eos] * length)[:length] for p, a in zip(prompts, answers, strict=True)]
    )
    place = torch.arange(length)
    begin = torch.tensor([[len(p)] for p in prompts])
    end = begin + torch.tensor([[len(a)] for a in answers])
    answer = place >= begin
    return Batch(ids, answer, torch.where(place > end, c.tail, 1.0) * answer)


def code_batch(row: Tensor, c: CodeConfig, seed: int) -> Batch:
    """Random windows of a long row of ids; in every other one a beginning of random length is not asked for."""
    g = torch.Generator().manual_seed(seed)
    ids = _windows("code", row, c, g)
    given = torch.randint(1, c.length, (c.batch, 1), generator=g) * (torch.arange(c.batch) % 2)[:, None]
    answer = torch.arange(c.length) >= given
    return Batch(ids, answer, answer.float())


def recall_batch(row: Tensor, c: RecallConfig, seed: int, entries: int) -> Batch:
    """Random windows of a long row of ids whose last tokens are a passage of the window again; all of it is asked for.

    entries: of the vocabulary, for passages by lot (the first three are special and are not drawn). The passage's
    second copy counts as much as all of the rest, but for its first two tokens, which nothing tells.
    """
    g = torch.Generator().manual_seed(seed)
    ids = _windows("recall", row, c, g)
    lot = torch.randint(3, entries, (c.batch, c.longest), generator=g)
    again = torch.zeros_like(ids, dtype=torch.bool)
    for b in range(c.batch):
        size = int(torch.randint(c.shortest, c.longest + 1, (), generator=g))
        at = int(torch.randint(c.length - 2 * size + 1, (), generator=g))
        if b % 2:
            ids[b, at : at + size] = lot[b, :size]
        ids[b, -size:] = ids[b, at : at + size]
        again[b, 2 - size :] = True
    weight = torch.where(again, (~again).sum() / again.sum(), 1.0)
    return Batch(ids, torch.ones_like(again), weight)


def _windows(section: str, row: Tensor, c: CodeConfig | RecallConfig, g: torch.Generator) -> Tensor:
    """int64 (b, l): random stretches of a long row of ids."""
    if len(row) < c.length:
        raise UsageError(
            f"{section}.length is {c.length}, but the sources have only {len(row)} tokens: name a folder with more of them."
        )
    start = torch.randint(len(row) - c.length + 1, (c.batch, 1), generator=g)
    return row[start + torch.arange(c.length)].long()
