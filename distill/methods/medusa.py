"""Medusa heads (arXiv 2401.10774, section 2.2.1, Medusa-1): on a frozen causal model, head i says the token i places behind
the one that the model itself predicts.

A head is a residual block, h + SiLU(W h), read by the model's own last layer. W starts at zero, so that every head begins
as the model's own prediction. Loss: cross-entropy of each, weighted by decay^i, on the tokens that the model generated.

Differs from the paper: there each head has a last layer of its own (a copy of the model's), which is most of its weights;
here it is shared and stays as it is.

Shapes: B texts of at most L tokens; n places; K heads; C channels; V logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import save
from torch import Tensor, nn

from hasten.atomic import atomic_write
from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Loss, MethodState
from hasten.distill.text.method import TextMethod, TextState
from hasten.distill.text.roles import TextCall, Texts

FILE = "medusa_heads.safetensors"


class Medusa(TextMethod):
    """heads: how many. decay: weight of head i is decay^i, i from 0."""

    kind: ClassVar[str] = "medusa"
    trains: ClassVar[tuple[str, ...]] = ()
    heads: int = Field(3, ge=1)
    decay: float = Field(0.8, gt=0, le=1)

    def start(self, facts: Facts) -> MethodState:
        return _MedusaState(self, facts)

    def used(self, model: str, student: Path) -> str:
        return f"hasten.accelerate(model, 'medusa:path={student}') drafts with it; python benchmarks/several_tokens.py {student} counts what it saves"


class MedusaHeads(nn.Module):
    """K residual blocks on states [n, C]; they answer states [K, n, C] for the model's last layer to read."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        blocks = [nn.Linear(width, width, device="meta").to_empty(device="cpu") for _ in range(heads)]
        self.blocks = nn.ModuleList(blocks)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, states: Tensor) -> Tensor:
        return torch.stack([states + F.silu(block(states)) for block in self.blocks])


class _MedusaState(TextState):
    def __init__(self, method: Medusa, facts: Facts) -> None:
        super().__init__(method, facts)
        self.method, call = method, self.learner.call
        first = next(call.head.parameters())
        self.network = MedusaHeads(int(first.shape[1]), method.heads).to(first.device)

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        return [("medusa", self.network)]

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        texts, call = Texts.of(batch), self.learner.call
        asked = (texts.place + 1 >= texts.start[:, None]) & (texts.place + 2 < texts.end[:, None])
        with torch.no_grad():
            states = self.learner.states(texts.ids, texts.end, asked)
        row, at = asked.nonzero(as_tuple=True)
        zeros = torch.zeros(len(texts.ids), device=row.device)
        rows, told = zeros, {}
        for head, answer in enumerate(self.network(states)):
            there = at + 2 + head < texts.end[row]
            target = texts.ids[row, (at + 2 + head).clamp(max=texts.ids.shape[1] - 1)]
            logits = call.read(answer)
            cross = F.cross_entropy(logits, target.where(there, -100), reduction="none")
            count = zeros.index_add(0, row, there.float()).clamp(min=1)
            rows = rows + self.method.decay**head * zeros.index_add(0, row, cross) / count
            right = ((logits.argmax(1) == target) & there).float()
            told[f"right_{head}"] = right.sum() / there.sum().clamp(min=1)
        return Loss(rows, told)

    def write(self, folder: Path, base: str, recipe: str, weights: Mapping[str, Tensor] | None) -> None:
        """Write the heads, with the model that they are for in the header."""
        own = self.network.state_dict()
        averaged = {name.removeprefix("heads.medusa."): value for name, value in (weights or {}).items()}
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in (own | averaged).items()}
        atomic_write(folder / FILE, save(tensors, {"model": base, "heads": str(self.method.heads)}))


@torch.no_grad()
def accepted(call: TextCall, heads: MedusaHeads, texts: Texts) -> Tensor:
    """At each place of the generated parts, how many heads in a row say what the model itself wrote there, int64 [n].

    One more than their mean is the number of tokens per evaluation of greedy verified decoding, were every place met.
    """
    asked = (texts.place + 1 >= texts.start[:, None]) & (texts.place + 2 < texts.end[:, None])
    row, at = asked.nonzero(as_tuple=True)
    right = []
    for head, answer in enumerate(heads(call.states(texts.ids, texts.end, asked))):
        place = at + 2 + head
        target = texts.ids[row, place.clamp(max=texts.ids.shape[1] - 1)]
        right.append((call.read(answer).argmax(1) == target) & (place < texts.end[row]))
    return torch.stack(right).long().cumprod(0).sum(0)
