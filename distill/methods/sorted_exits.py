"""Nested models by depth (Sorted LLaMA: Kavehzadeh et al., arXiv 2309.08968, after SortedNet, arXiv 2309.00255): the first
layers of a causal model, its last norm and its one head are a model, too.

All exits are trained at once, with the same head: the loss is the mean cross-entropy of all of them, the whole model
among them, on the tokens that the model generated. A model of the first k layers is used by itself (`text_depth.only`), or drafts
for the whole one, which verifies (`benchmarks/several_tokens.py`): then the text is the whole model's.

Differs from the paper: an adapter on a frozen base is trained in place of all weights; the texts are the model's own.

Shapes: B texts of at most L tokens; n tokens that are asked for; E exits; C channels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.atomic import atomic_write
from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Loss, MethodState
from hasten.distill.text.depth import standing, states_of
from hasten.distill.text.method import TextMethod, TextState
from hasten.distill.text.roles import TextCall, TextRole, Texts, each_length
from hasten.errors import UsageError

FILE = "exits.json"


class SortedExits(TextMethod):
    """exits: after how many layers a model ends; () for every second. The whole model is trained with them in any case."""

    kind: ClassVar[str] = "sorted-exits"
    exits: tuple[int, ...] = ()

    def start(self, facts: Facts) -> MethodState:
        return _SortedState(self, facts)

    def used(self, model: str, student: Path) -> str:
        bench = f"python benchmarks/fewer_layers.py {student}"
        return f"hasten.distill.text.depth.only leaves layers out; {bench} says what that costs"

    def of(self, layers: int) -> tuple[int, ...]:
        """The exits of a model of so many layers, the last of which is the model itself. Raises `UsageError` for others."""
        found = self.exits or tuple(range(2, layers, 2))
        if not found or any(not 0 < exit < layers for exit in found):
            allowed = f"a model of {layers} layers has exits after 1 to {layers - 1} of them"
            raise UsageError(f"method.exits = {list(found)}: {allowed}. Name others.")
        return (*sorted(set(found)), layers)


class _SortedState(TextState):
    def __init__(self, method: SortedExits, facts: Facts) -> None:
        super().__init__(method, facts)
        self.exits = method.of(self.learner.call.facts.layers)

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        texts, call = Texts.of(batch), self.learner.call
        inside = texts.written(call.facts.eos_ids)
        target, row = texts.ids[inside], inside.nonzero()[:, 0]
        zeros = torch.zeros(len(texts.ids), device=row.device)
        count = zeros.index_add(0, row, torch.ones(len(row), device=row.device)).clamp(min=1)
        states, rows, told = exit_states(self.learner, texts, before(inside), self.exits), zeros, {}
        for number, exit in enumerate(self.exits):
            logits = call.read(states[:, number])
            cross = F.cross_entropy(logits, target, reduction="none")
            rows = rows + zeros.index_add(0, row, cross) / count / len(self.exits)
            told[f"cross_{exit}"] = cross.mean()
        return Loss(rows, {name: value.detach() for name, value in told.items()})

    def write(self, folder: Path, base: str, recipe: str, weights: Mapping[str, Tensor] | None) -> None:
        """Write the adapter, and after how many layers there are exits."""
        super().write(folder, base, recipe, weights)
        atomic_write(folder / FILE, json.dumps({"exits": self.exits}) + "\n")


def before(inside: Tensor) -> Tensor:
    """bool [B, L]: the place before each of these, where a causal model says it. The first place has none before it."""
    return inside.roll(-1, 1) & (torch.arange(inside.shape[1], device=inside.device) < inside.shape[1] - 1)


def exit_states(role: TextRole, texts: Texts, asked: Tensor, exits: Sequence[int]) -> Tensor:
    """[n, E, C]: what each exit gives the head at `asked` (bool [B, L]), row after row, of one evaluation of all layers.

    Behind an exit the model goes on with what is behind its layers, whatever that is.
    """

    def evaluate(rows: Tensor, mine: Tensor) -> Tensor:
        return torch.stack(_of_rows(role.call, rows, exits), 2)

    with role.playing():
        return each_length(texts.ids, texts.end, asked, evaluate)


def _of_rows(call: TextCall, rows: Tensor, exits: Sequence[int]) -> list[Tensor]:
    """States [m, N, C] of each exit, of rows int64 [m, N]."""
    seen: list[Tensor] = []

    def watched(number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        seen.append(states_of(layer(*args, **kwargs), call))
        return seen[-1]

    with standing(call, watched, range(max(exits))):
        last = call.inner(rows)
    found = {max(exits): last}
    for exit in exits:
        if exit not in found:
            with standing(call, lambda number, layer, args, kwargs, k=exit: seen[k - 1], (0,)):  # type: ignore[misc]
                found[exit] = call.inner(rows)
    return [found[exit] for exit in exits]
