"""Skip routers (FiRST: Jain et al., arXiv 2410.12513): the prompt decides which layers its text is written with.

Before each layer but the first, a router (a linear layer of one output) looks at the mean of the prompt's states there. Where
its probability is below a half, the layer is skipped for the whole sequence, prompt and text, so that keys and values of
its tokens are never missed. An adapter learns with the routers to make up for what is skipped. Loss: cross-entropy on the texts
that the model generated, and `share` times the share of layers that are run.

Differs from the paper: routers and adapter are trained together, where the paper trains the routers first. In training a
layer is run or skipped as it will be, and the router's gradient is that of a mixture of both (straight-through); the
router's input is normalised. The first layer always runs: a cache counts its tokens there.

Shapes: B texts of at most L tokens; m of them of one length N; K layers; C channels.
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
from hasten.distill.methods.sorted_exits import before
from hasten.distill.text.depth import input_of, standing, states_of
from hasten.distill.text.method import TextMethod, TextState
from hasten.distill.text.roles import TextCall, TextRole, Texts, each_length

FILE = "routers.safetensors"
SURE = 2.0
"""What a router says at first, as a logit: every layer is run."""


class First(TextMethod):
    """share: what a layer that is run costs, in nats: weight of the share of layers that are run."""

    kind: ClassVar[str] = "first"
    share: float = Field(0.5, ge=0)

    def start(self, facts: Facts) -> MethodState:
        return _FirstState(self, facts)

    def used(self, model: str, student: Path) -> str:
        bench = f"python benchmarks/fewer_layers.py {student}"
        return f"hasten.distill.text.depth.only leaves layers out; {bench} says what that costs"


class Routers(nn.Module):
    """Mean states of a prompt [m, C] before layer k (1 to K - 1) -> probability [m] that the layer is needed."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers - 1, width))
        self.bias = nn.Parameter(torch.full((layers - 1,), SURE))

    def chance(self, number: int, states: Tensor, start: Tensor) -> Tensor:
        """Before layer `number`, of the first start[b] (int64 [m]) of states [m, N, C]."""
        given = torch.arange(states.shape[1], device=states.device) < start[:, None]
        mean = (states.float() * given[..., None]).sum(1) / start[:, None]
        said = F.layer_norm(mean, mean.shape[1:]) @ self.weight[number - 1] + self.bias[number - 1]
        return said.sigmoid()


class _FirstState(TextState):
    def __init__(self, method: First, facts: Facts) -> None:
        super().__init__(method, facts)
        self.method, call = method, self.learner.call
        first = next(call.head.parameters())
        self.routers = Routers(int(first.shape[1]), call.facts.layers).to(first.device)

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        return [("routers", self.routers)]

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        texts, call = Texts.of(batch), self.learner.call
        inside = texts.written(call.facts.eos_ids)
        states, share = routed_states(self.learner, self.routers, texts, before(inside))
        cross = F.cross_entropy(call.read(states), texts.ids[inside], reduction="none")
        row, zeros = inside.nonzero()[:, 0], cross.new_zeros(len(texts.ids))
        rows = zeros.index_add(0, row, cross) / zeros.index_add(0, row, torch.ones_like(cross)).clamp(min=1)
        told = {"cross": rows.detach().mean(), "share": share.detach().mean()}
        return Loss(rows + self.method.share * share, told)

    def write(self, folder: Path, base: str, recipe: str, weights: Mapping[str, Tensor] | None) -> None:
        """Write the adapter for peft, and the routers beside it."""
        super().write(folder, base, recipe, weights)
        averaged = {name.removeprefix("heads.routers."): value for name, value in (weights or {}).items() if "heads." in name}
        tensors = {**self.routers.state_dict(), **averaged}
        atomic_write(folder / FILE, save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}))


def routed_states(role: TextRole, routers: Routers, texts: Texts, asked: Tensor) -> tuple[Tensor, Tensor]:
    """What the head is given at `asked` (bool [B, L]), [n, C], where each text has the layers that its prompt wants; and the
    share of layers that each text is run with, [B]. Values are those of skipping, gradients those of a mixture."""
    call, order, shares = role.call, list[Tensor](), list[Tensor]()

    def evaluate(rows: Tensor, mine: Tensor) -> Tensor:
        start = texts.start[mine]
        runs = [torch.ones(len(rows), device=rows.device)]

        def gate(number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            x, y = input_of(args, kwargs), states_of(layer(*args, **kwargs), call)
            if number == 0:
                return y
            chance = routers.chance(number, x, start)
            run, pull = chance >= 0.5, chance - chance.detach()
            runs.append(run + pull)
            return torch.where(run[:, None, None], y, x) + pull[:, None, None].to(x.dtype) * (y - x)

        with standing(call, gate):
            found = call.inner(rows)
        order.append(mine.nonzero()[:, 0])
        shares.append(torch.stack(runs).mean(0))
        return found

    with role.playing():
        states = each_length(texts.ids, texts.end, asked, evaluate)
    return states, torch.cat(shares)[torch.cat(order).argsort()]


@torch.no_grad()
def route(call: TextCall, routers: Routers, prompts: Tensor) -> Tensor:
    """Which layers the texts of these prompts (int64 [m, N], of one length) are to be written with, bool [m, K], for
    `text_depth.only`.

    A layer runs on the rows that want it, and not at all where none does.
    """
    start = torch.full((len(prompts),), prompts.shape[1], device=prompts.device)
    runs: list[Tensor] = []

    def gate(number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x = input_of(args, kwargs)
        runs.append(routers.chance(number, x, start) >= 0.5 if number else torch.ones_like(start, dtype=torch.bool))
        mine = runs[-1].nonzero()[:, 0]  # looks at the device: once per layer and prompt
        if not len(mine):
            return x
        cut = {name: _rows(value, mine, len(x)) for name, value in kwargs.items()}
        made = states_of(layer(*(_rows(value, mine, len(x)) for value in args), **cut), call)
        return x.index_copy(0, mine, made)

    with standing(call, gate):
        call.inner(prompts)
    return torch.stack(runs, 1)


def _rows(value: Any, mine: Tensor, count: int) -> Any:
    """The rows `mine` of what a layer is called with, where it has a row for each text."""
    if isinstance(value, tuple):
        return tuple(_rows(each, mine, count) for each in value)
    return value[mine] if isinstance(value, Tensor) and value.dim() > 1 and len(value) == count else value
