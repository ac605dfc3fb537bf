"""Prompts for measuring how a causal language model is decoded: code, prose, passages that repeat, and noise."""

from __future__ import annotations

import ast
import inspect
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.errors import UsageError
from hasten.pipelines import python_sources


@dataclass(frozen=True, slots=True)
class Workload:
    """Token ids of prompts, of different lengths. adverse: made so that drafts hardly pay, for the worst case alone."""

    name: str
    prompts: list[list[int]]
    adverse: bool = False

    def batches(self, size: int, pad: int) -> Iterator[dict[str, Tensor]]:
        """Arguments of `generate` for `size` prompts at a time, padded on the left; the last may be smaller."""
        for begin in range(0, len(self.prompts), size):
            rows = self.prompts[begin : begin + size]
            longest = max(map(len, rows))
            ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            yield {"input_ids": ids, "attention_mask": mask}


def code(tokenizer: Any, count: int, seed: int = 91) -> Workload:
    """Pieces of Python's own sources that the bundled models were not trained on."""
    return Workload("code", _pieces(tokenizer, python_sources.texts("validation"), count, seed))


def prose(tokenizer: Any, count: int, seed: int = 92) -> Workload:
    """Sentences: docstrings of the same sources, one after the other."""
    return Workload("prose", _pieces(tokenizer, map(_docstrings, python_sources.texts("validation")), count, seed))


def repetitive(tokenizer: Any, count: int, seed: int = 93, passage: int = 16) -> Workload:
    """A passage of code three times, and its beginning a fourth time."""
    whole = _pieces(tokenizer, python_sources.texts("validation"), count, seed, (passage, passage))
    return Workload("repetitive", [3 * row + row[: 4 + number % 12] for number, row in enumerate(whole)])


def noise(tokenizer: Any, count: int, seed: int = 94) -> Workload:
    """Tokens by lot: nothing in them is worth copying."""
    rng = random.Random(seed)
    ids = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    return Workload("noise", [rng.choices(ids, k=rng.randint(*LENGTHS)) for _ in range(count)], adverse=True)


WORKLOADS: dict[str, Callable[[Any, int], Workload]] = {"code": code, "prose": prose, "repetitive": repetitive, "noise": noise}
LENGTHS = (40, 64)
"""Tokens of a prompt: with 64 new ones these are the 128 that the bundled models were trained on."""


def of_files(tokenizer: Any, texts: list[str]) -> Workload:
    """The user's own prompts. Raises `UsageError` where there are none."""
    found = [list(tokenizer(text, verbose=False).input_ids) for text in texts]
    if not any(found):
        raise UsageError("There are no prompts to decode. Write one on each line of the file.")
    return Workload("prompts", [row for row in found if row])


def _pieces(
    tokenizer: Any, texts: Iterator[str] | map[str], count: int, seed: int, lengths: tuple[int, int] | None = None
) -> list[list[int]]:
    """`count` stretches of tokens from different files, as long as there are some."""
    rng, (least, most) = random.Random(seed), lengths or LENGTHS
    files = [ids for text in texts if len(ids := list(tokenizer(text, verbose=False).input_ids)) > most]
    if not files:
        raise UsageError(f"No source of Python's library has more than {most} tokens for this tokenizer. Measure with --prompts.")
    rng.shuffle(files)
    found = []
    for ids in itertools.islice(itertools.cycle(files), count):
        length = rng.randint(least, most)
        begin = rng.randrange(len(ids) - length)
        found.append(ids[begin : begin + length])
    return found


def _docstrings(source: str) -> str:
    """All docstrings of a module that are sentences, below each other."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(inspect.cleandoc(text) for text in texts if text and ". " in text)
