"""Routers that were trained with a network: which heads, channels and tokens run at a time.

Zhao et al., Dynamic Diffusion Transformer, arXiv 2410.03456, section 3: at time t an attention module runs the heads, and
a feed-forward module the groups of channels, whose gate is open, 1[sigma(R(t)) > 1/2]; a token whose own gate is shut
passes the feed-forward module by. The most important head and group are always open.

What differs: the routers are tables over the time, not layers on the network's embedding of it, so that they are known
before the network runs. *How many* tokens run is a function of the time and the module too; the token's score only says
*which*. So all shapes are known beforehand, nothing waits for the device, and a row does not depend on its neighbours.

Shapes: B rows; N tokens of width D; G gates of a module, each for `members` of its units (heads or channels); u float [B]
in [0, 1] as in `hasten/time_table.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hasten.errors import ModelError
from hasten.time_table import PACE, TimeTable

FIRST, LAST = 2.5, 1.5
"""Logits of a module's gates before training, from the most to the least important: what matters least shuts first."""

ROOM = 1.25
"""The share of tokens is min(1, ROOM sigma(r)), so that all run at a finite r."""

HEADER = "hasten_routers"


@dataclass(frozen=True, slots=True)
class RoutedModule:
    """One routed module. name: dotted. gates: how many. units: heads or channels. cost: its share of the network's
    multiply-adds. width: D, where its tokens are routed, too; 0 where they are not."""

    name: str
    gates: int
    units: int
    cost: float
    width: int = 0

    def bounds(self, gate: int) -> tuple[int, int]:
        """Which of the sorted units belong to a gate: all gates have as many, or one fewer."""
        return gate * self.units // self.gates, (gate + 1) * self.units // self.gates

    def sizes(self) -> list[float]:
        """Share of the units that each gate has."""
        return [(stop - start) / self.units for start, stop in map(self.bounds, range(self.gates))]


@dataclass(frozen=True, slots=True)
class Opening:
    """What runs of one module in one evaluation. units: int64 numbers, rising; None for all. tokens: share, 0 to 1."""

    units: Tensor | None
    tokens: float
    width: float = 1.0

    @property
    def all(self) -> bool:
        return self.units is None and self.tokens >= 1

    @property
    def work(self) -> float:
        return self.width * self.tokens


@dataclass
class Gates:
    """What a batch of times opens: module name -> gates [B, G] of zeros and ones, and shares of tokens [B]. Gradients
    pass straight through to the logits."""

    units: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)


class Routers(nn.Module):
    """Routers of all modules of one network. orders: name -> units of a module, the most important first."""

    def __init__(self, modules: Sequence[RoutedModule], orders: dict[str, Tensor], knots: int = 8) -> None:
        super().__init__()
        self.routed = tuple(modules)
        self.orders = {name: order.cpu().long() for name, order in orders.items()}
        self.table = TimeTable(knots, sum(one.gates + bool(one.width) for one in modules))
        self._init_table()
        g = torch.Generator().manual_seed(0)
        self.scores = nn.ParameterList(torch.randn(one.width, generator=g) / math.sqrt(one.width) for one in self._with_tokens)

    @property
    def _with_tokens(self) -> list[RoutedModule]:
        return [one for one in self.routed if one.width]

    def _init_table(self) -> None:
        start: list[float] = []
        for one in self.routed:
            start += torch.linspace(FIRST, LAST, one.gates).tolist() + [FIRST] * bool(one.width)
        with torch.no_grad():
            self.table.values.copy_(torch.tensor(start) / PACE)

    # --- as functions of the time, differentiable ------------------------------------------------

    def forward(self, u: Tensor, noise: Tensor | None = None) -> Gates:
        """Gates at these times. noise: [B, `numbers`] logistic noise on the logits (Gumbel-sigmoid, while training)."""
        numbers = self.table(u)
        logits = numbers if noise is None else numbers + noise.to(numbers)
        found, place = Gates(), 0
        for one in self.routed:
            soft = logits[:, place : place + one.gates].sigmoid()
            first = torch.arange(one.gates, device=soft.device) == 0
            found.units[one.name] = _straight(((soft > 0.5) | first).to(soft), soft)
            place += one.gates
            if one.width:
                share = ROOM * numbers[:, place].sigmoid()
                found.tokens[one.name] = _straight(share.clamp(max=1), share)
                place += 1
        return found

    @property
    def numbers(self) -> int:
        """How many numbers the table gives for a time."""
        return self.table.values.shape[1]

    def work(self, gates: Gates) -> Tensor:
        """Share of the network's multiply-adds that runs, float32 [B]."""
        saved = torch.zeros(())
        for one in self.routed:
            kept = gates.units[one.name] @ torch.tensor(one.sizes(), device=gates.units[one.name].device)
            if one.width:
                kept = kept * gates.tokens[one.name]
            saved = saved.to(kept.device) + one.cost * (1 - kept)
        return 1 - saved

    def floor(self) -> float:
        """The share of the work that runs with all gates shut that can be."""
        return 1 - sum(one.cost * (1 - (0.0 if one.width else one.sizes()[0])) for one in self.routed)

    def token_gates(self, name: str, x: Tensor, share: Tensor) -> Tensor:
        """Zeros and ones [B, N]: the ceil(share N) tokens of x [B, N, D] with the highest scores. share: [B]."""
        scores = self._scores(name, x)
        place = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        hard = place < _counts(share, x.shape[1])[:, None]
        even = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-6)
        soft = (even + share.clamp(0.01, 0.99).logit()[:, None]).sigmoid()
        return _straight(hard.to(x), soft.to(x))

    # --- as plain numbers, for running it ---------------------------------------------------------

    @torch.no_grad()
    def chosen(self, name: str, x: Tensor, share: float) -> Tensor:
        """Which tokens of x [B, N, D] run, int64 [B, k], k = ceil(share N)."""
        count = int(_counts(torch.tensor([share]), x.shape[1]))
        order = self._scores(name, x).argsort(dim=1, descending=True, stable=True)
        return order[:, :count].sort(dim=1).values

    @torch.no_grad()
    def openings(self, u: float) -> dict[str, Opening]:
        """What runs of each module at one time."""
        gates, found = self(torch.tensor([u])), {}
        for one in self.routed:
            open_ = gates.units[one.name][0].bool().tolist()
            picked = [self.orders[one.name][slice(*one.bounds(gate))] for gate, is_open in enumerate(open_) if is_open]
            units = None if all(open_) else torch.cat(picked).sort().values
            width = 1.0 if units is None else len(units) / one.units
            tokens = float(gates.tokens[one.name][0]) if one.width else 1.0
            found[one.name] = Opening(units, tokens, width)
        return found

    def _scores(self, name: str, x: Tensor) -> Tensor:
        place = [one.name for one in self._with_tokens].index(name)
        weight = self.scores[place].to(x.device)
        scores: Tensor = x.to(weight.dtype) @ weight
        return scores

    # --- files ------------------------------------------------------------------------------------

    def packed(self) -> bytes:
        """As a safetensors file."""
        tensors = {f"scores.{place}": weight for place, weight in enumerate(self.scores)}
        tensors |= {f"order.{place}": self.orders[one.name] for place, one in enumerate(self.routed)}
        tensors["table"] = self.table.values
        head = {HEADER: json.dumps([asdict(one) for one in self.routed])}
        return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, head)

    @classmethod
    def load(cls, file: Path) -> Routers:
        """Read what `packed` gave. Raises `ModelError` for a file that is missing or another one."""
        try:
            with safe_open(file, framework="pt") as opened:
                told: list[dict[str, Any]] = json.loads((opened.metadata() or {})[HEADER])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
            modules = [RoutedModule(**one) for one in told]
            orders = {one.name: tensors[f"order.{place}"] for place, one in enumerate(modules)}
            made = cls(modules, orders, len(tensors["table"]))
            weights = {"table.values": tensors["table"]} | {k: v for k, v in tensors.items() if k.startswith("scores.")}
            made.load_state_dict(weights)
        except Exception as error:  # safetensors raises errors of its own kind for broken headers
            said = " ".join(str(error).split())[:120]
            raise ModelError(f"'{file}' holds no routers of a trained student ({said}). Export the student again.") from error
        return made.requires_grad_(False)


def _straight(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, bit for bit, with the gradient of `soft`."""
    return hard.detach() + (soft - soft.detach())


def _counts(share: Tensor, num: int) -> Tensor:
    """ceil(share num) tokens, at least one; int64. Shares that are a whole number of tokens but for rounding are that."""
    return (share.detach().double() * num - 1e-4).ceil().clamp(1, num).long()
