"""Fine-tuning of the few layers by which a network in few bits suffers most, and of its ranges by time.

QuEST (Wang et al., arXiv 2402.03666): layers that are sensitive to few bits, those that a block's attention and feed-forward
layers end and begin with, then those that carry the time; each is held to what the full-precision layer says (local), and
all of them to what the network says (global). Ranges of activations belong to times. All from the paper; no code was looked
at.

What differs: what a layer says is compared in units of its own mean square, so that layers count alike; the network's loss
counts in both stages; ranges and steps are trained in both, for all layers; trajectories and bins of time as in `qalora`.

Shapes: B rows of a batch, P points of each row's trajectory; what a layer says [P B k, ...].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Loss, MethodState
from hasten.distill.methods.qalora import Rounding, RoundingState
from hasten.distill.network.quantised import Every
from hasten.errors import RefusedError

SENSITIVE = (
    r"(^|\.)(to|add)_[qkv](_proj)?$",
    r"(^|\.)(ff|ffn|ff_context)\.net\.2$",
    r"(^|\.)single_transformer_blocks\.\d+\.proj_out$",
)
"""Names of such layers in diffusers' networks: q, k, v of attention, and the second layer of feed-forward ones (FLUX's single
blocks have it in one with the end of their attention)."""


class QuEST(Rounding):
    """All layers are rounded; weights of some are trained, without an adapter.

    local: weight of what the layers say against what the network says. turn: share of the training that belongs to the
    sensitive layers; the rest is for those that carry the time.
    """

    kind: ClassVar[str] = "quest"
    local: float = Field(1.0, ge=0)
    turn: float = Field(0.7, gt=0, le=1)

    def start(self, facts: Facts) -> MethodState:
        """Raises `RefusedError` for networks without such layers, or whose layers cannot be told the time."""
        return QuESTState(self, facts)


class QuESTState(RoundingState):
    """Matches the chosen layers, and the network."""

    method: QuEST

    def __init__(self, method: QuEST, facts: Facts) -> None:
        super().__init__(method, facts)
        tuned = [name for name, layer in self.quantised.layers.items() if layer.change is not None]
        self.clocks = frozenset(tuned) & frozenset(self.sight.clocks)
        self.sensitive = frozenset(tuned) - self.clocks
        if not self.sensitive:
            kind = type(self.teacher.host.network).__name__
            raise RefusedError(f"{kind} has no layer by the names that QuEST tunes (to_q, ff.net.2, ...). Use method qalora.")

    def change(self, name: str, weight: Tensor) -> nn.Module | None:
        clocks = self.sight.clocks if self.method.turn < 1 else ()  # nobody's turn is no training
        chosen = name in clocks or any(re.search(pattern, name) for pattern in SENSITIVE)
        return Every(weight) if chosen else None

    def chosen(self, step: int) -> frozenset[str]:
        """The layers whose turn it is."""
        return self.sensitive if step < self.method.turn * self.facts.steps or not self.clocks else self.clocks

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        at, chosen = self.points(self.trajectory(batch, draw), batch, draw), self.chosen(step)
        for name, layer in self.quantised.layers.items():
            if isinstance(layer.change, Every):
                layer.change.still = name not in chosen
        with torch.no_grad(), self._listening(chosen) as wanted:
            self.teacher.answer(at.x, at.tau, at.condition)
        self.quantised.heard = {}
        made = self.quantised.answer(at.x, at.tau, at.condition)
        heard, self.quantised.heard = self.quantised.heard, None
        whole = at.off(made, len(batch))
        parts = torch.stack([self._off(heard[name], said, len(batch)) for name, said in wanted.items()]).mean(0)
        told = {"network": whole.detach().mean(), "layers": parts.detach().mean()}
        return Loss(whole + self.method.local * parts, told)

    def _off(self, said: Tensor, wanted: Tensor, rows: int) -> Tensor:
        """How far a layer is from what it should say, in units of that: [B]."""
        count = self.method.points
        return _rows(said - wanted, count, rows) / _rows(wanted, count, rows).clamp_min(1e-8)

    @contextmanager
    def _listening(self, names: frozenset[str]) -> Iterator[dict[str, Tensor]]:
        """While open, what these layers of the network say."""
        said: dict[str, Tensor] = {}

        def hook(name: str) -> Any:
            return lambda module, args, result: said.__setitem__(name, result.float())

        network = self.teacher.host.network
        handles = [network.get_submodule(name).register_forward_hook(hook(name)) for name in names]
        try:
            yield said
        finally:
            for handle in handles:
                handle.remove()


def _rows(off: Tensor, count: int, rows: int) -> Tensor:
    """Mean squares of off [P B k, ...] by row: [B]. k: rows of what a layer says for each row of x."""
    return off.float().square().flatten(1).mean(1).reshape(count, rows, -1).mean((0, 2))
