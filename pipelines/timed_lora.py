"""A LoRA whose strength is a function of the time: experts, each with some of its ranks, weighed by a table.

    W(u) = W + (alpha / r) sum_e g_e(u) B_e A_e,    g_e = exp l_e / mean(exp l),    l(u) a table for each layer

After TD-LoRA of DyDiT++ (Zhao et al., arXiv 2504.06803), which fuses several matrices B by weights that follow from the
time step. What differs: the ranks of an ordinary LoRA are divided among the experts, A's with B's, so that it costs what an
ordinary one costs, is trained and stored as one, and is one while all g are 1, as before training. The weights come from
a table over the time and not from the network's embedding, whose own layers may be adapted. (The paper's section was not
at hand; this is built from its abstract and what is said of it elsewhere.)

Shapes: B rows; L layers, E experts, r ranks; u, t [B]; h [B, ..., r] what a down-projection gives ([B, r, ...] of
a convolution); g [B, L, E].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from hasten.atomic import atomic_write
from hasten.errors import ModelError, RefusedError
from hasten.pipelines.host import Call, Layout
from hasten.pipelines.lora import FACTS, Lora, LowRank, read
from hasten.session import Attachment
from hasten.time_table import TimeTable

FILE = "timed_lora.safetensors"
"""Not the name that diffusers looks for: without its gates such an adapter is another one."""

HEADER, TABLE = "hasten_timed", "gates.table"


class TimedGates(nn.Module):
    """Weights of the experts of one adapter. layers: names of what it is on. unit: what the network is told as its time at
    pure noise, 1000 or 1."""

    def __init__(self, layers: Sequence[str], experts: int, unit: float, knots: int = 8) -> None:
        super().__init__()
        self.layers, self.experts, self.unit = tuple(layers), experts, unit
        self.table = TimeTable(knots, len(self.layers) * experts)
        self._now: Tensor | None = None

    def forward(self, u: Tensor) -> Tensor:
        strong = self.table(u).reshape(len(u), len(self.layers), self.experts).exp()
        weights: Tensor = strong / strong.mean(2, keepdim=True)
        return weights

    def put_on(self, attachment: Attachment, network: nn.Module, name: str) -> None:
        """Weigh the experts of the adapter `name` in every call of `network`, by the time that the call is told, until
        `attachment` is restored. Raises `ModelError` in a call that does not tell one time for each row."""
        layout, inner = Layout.of(network), network.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._now = self(self._time(Call(layout, args, kwargs).timestep))
            return inner(*args, **kwargs)

        attachment.replace(network, "forward", forward)
        for number, layer in enumerate(self.layers):
            low: Any = network.get_submodule(layer)
            attachment.on_restore(low.lora_A[name].register_forward_hook(self._weighing(number, layer)).remove)

    def _time(self, told: Any) -> Tensor:
        t = torch.as_tensor(told, device=self.table.values.device)
        if t.ndim > 1:
            raise ModelError(f"This network is told times {tuple(t.shape)}, and a timed adapter follows one for each row.")
        return t.reshape(-1).float() / self.unit

    def _weighing(self, number: int, layer: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], h: Tensor) -> Tensor:
            assert self._now is not None
            ranks = 1 if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else h.ndim - 1
            g = self._now[:, number].repeat_interleave(h.shape[ranks] // self.experts, 1)
            if len(g) not in (1, len(h)):
                raise ModelError(f"{layer!r} sees {len(h)} rows where the network is told {len(g)} times; leave it out of the adapter.")
            shape = [len(g), *[1] * (h.ndim - 1)]
            shape[ranks] = h.shape[ranks]
            return h * g.reshape(shape).to(h.dtype)

        return hook


@dataclass(frozen=True, slots=True)
class TimedLora(Lora):
    """An adapter with gates."""

    gates: TimedGates = field(kw_only=True)

    def put_on(self, attachment: Attachment, network: nn.Module, name: str) -> str:
        """Put the gates onto `network`, where the adapter itself is as `name`; what was done, in words."""
        like = next(network.parameters())
        self.gates.to(like.device).put_on(attachment, network, name)
        return f", {self.gates.experts} experts by the time"


def plain(lora: Lora, gates: TimedGates) -> Lora:
    """The same as an ordinary LoRA, where the weights of its experts are constant.

    Raises `RefusedError` where they change with the time: no ordinary LoRA does that.
    """
    if not gates.table.constant:
        raise RefusedError(
            "This adapter's strength changes with the time, and an ordinary LoRA is the same at all times. Use it under its recipe"
            " in hasten, or train with student.experts = 1."
        )
    with torch.no_grad():
        g = gates(torch.zeros(1))[0]
    layers = dict(lora.layers)
    for number, name in enumerate(gates.layers):
        low = layers[name]
        weights = g[number].repeat_interleave(low.rank // gates.experts).to(low.up)
        layers[name] = replace(low, up=low.up * weights.reshape(1, -1, *[1] * (low.up.ndim - 2)))
    return replace(lora, layers=layers)


def write(lora: Lora, gates: TimedGates, file: Path) -> Path:
    """An adapter with its gates as one file. Raises `OutputError` where that cannot be done."""
    told = {"layers": gates.layers, "experts": gates.experts, "unit": gates.unit, "site": lora.site}
    alphas = {name: low.alpha for name, low in lora.layers.items()}
    head = {"format": "pt", HEADER: json.dumps(told | {"alphas": alphas}), FACTS: json.dumps(lora.facts)}
    table = {TABLE: gates.table.values.detach().cpu().contiguous()}
    return atomic_write(file, save(lora.tensors() | table, head))


def read_adapter(place: Path) -> Lora:
    """The adapter in a file or folder, with its gates where its strength follows the time (`TimedLora`).

    Raises as `Lora.load`, and `ModelError` for a timed one that is not complete.
    """
    file = place / FILE if (place / FILE).is_file() else place
    tensors, head = read(file) if file.is_file() else ({}, {})
    if HEADER not in head:
        return Lora.load(place)
    try:
        told = json.loads(head[HEADER])
        gates = TimedGates(told["layers"], told["experts"], told["unit"], len(tensors[TABLE]))
        gates.table.load_state_dict({"values": tensors[TABLE]})
        layers = {name: _low(tensors, f"{told['site']}.{name}", alpha) for name, alpha in told["alphas"].items()}
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        said = " ".join(str(error).split())[:120]
        raise ModelError(f"'{file}' holds a timed adapter that is not complete ({said}). Export the student again.") from error
    return TimedLora(told["site"], layers, json.loads(head.get(FACTS, "{}")), gates=gates.requires_grad_(False))


def _low(tensors: Mapping[str, Tensor], name: str, alpha: float) -> LowRank:
    low = LowRank(tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], alpha)
    bias = tensors.get(f"{name}.lora_B.bias")
    return low if bias is None else replace(low, bias=bias * low.scale)
