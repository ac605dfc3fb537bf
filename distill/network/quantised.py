"""A student whose weights are rounded to a few bits while it plays, and what is trained of it.

The network is the teacher's, and so are its weights W: switched on by a context, as adapters are. A layer's weight is

    q s,   q = whole(W + m D, s),   s = s0 exp(a)

with m the mean of s0 over the layer and D what is trained: a product of low rank (`LowRank`: QALoRA of EfficientDM, arXiv
2310.03270, section 3.3, which has the adapter inside the rounding, so that both become the same few bits), all of it
(`Every`), or nothing. D and a have no unit: a step of the optimiser changes every layer by the same share of its own step of
rounding. That is the paper's scale-aware optimisation (section 3.3; its code sets a rate in proportion to m for each layer)
for optimisers that normalise gradients, and with one rate for all. What a layer reads is rounded likewise, with
low = low0 + step b and step = step0 exp(a) for each bin of time.

Shapes: W, D, q [out, in, ...]; s [out]; low, step [T]; B rows; x [B, ...].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hasten.distill.network.host_call import Condition
from hasten.distill.network.paths import spread
from hasten.distill.network.roles import Role
from hasten.pipelines.quantised import Layer, applied, per_channel, rounded, whole
from hasten.pipelines.seams.quantised import Moment
from hasten.session import Attachment


class LowRank(nn.Module):
    """D = up down, of this rank: zero at first, and the same `down` whatever was drawn before."""

    def __init__(self, like: Tensor, rank: int) -> None:
        super().__init__()
        width = like[0].numel()
        g = torch.Generator().manual_seed(0)
        down = torch.rand(rank, width, generator=g) * 2 - 1
        self.down = nn.Parameter((down * (3 / width) ** 0.5).to(like.device))
        self.up = nn.Parameter(torch.zeros(len(like), rank, device=like.device))
        self.shape = like.shape

    def forward(self) -> Tensor:
        """D."""
        return (self.up @ self.down).reshape(self.shape)


class Every(nn.Module):
    """D itself: zero at first. still: another layer's turn; its gradient is zero then, and not none, so that the optimiser does
    the same in one process and in several."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(like.shape, device=like.device))
        self.still = False

    def forward(self) -> Tensor:
        """D."""
        return self.value.detach() + 0 * self.value if self.still else self.value


class TrainedLayer(nn.Module):
    """What belongs to one layer. s, low, step: as calibrated. change: D, or None. bits: of weights; inputs: of what it reads."""

    s: Tensor
    low: Tensor
    step: Tensor

    def __init__(self, s: Tensor, low: Tensor, step: Tensor, bits: int, inputs: int, change: nn.Module | None) -> None:
        super().__init__()
        self.bits, self.inputs, self.change = bits, inputs, change
        for name, value in (("s", s), ("low", low), ("step", step)):
            self.register_buffer(name, value)
        self.finer = nn.Parameter(torch.zeros_like(s))
        self.finer_inputs = nn.Parameter(torch.zeros_like(step))
        self.shift = nn.Parameter(torch.zeros_like(low))

    def weight(self, base: Tensor) -> Tensor:
        """q s, float32, of the layer's own weight W."""
        q, s = self._whole(base)
        return q * per_channel(s, base)

    def ranges(self) -> tuple[Tensor, Tensor]:
        """(low, step) of what is read, [T] each."""
        step = self.step * self.finer_inputs.exp()
        return self.low + self.step * self.shift, step

    @torch.no_grad()
    def finished(self, base: Tensor) -> Layer:
        """The layer as it is written."""
        q, s = self._whole(base)
        low, step = self.ranges()
        return Layer(q.to(torch.int8), s, self.bits, low, step, self.inputs)

    def _whole(self, base: Tensor) -> tuple[Tensor, Tensor]:
        target = base.float()
        if self.change is not None:
            target = target + self.s.mean() * self.change()
        s = self.s * self.finer.exp()
        return whole(target, s, self.bits), s


class Quantised:
    """A role with rounded layers: the student.

    layers: name of a layer of the network -> what belongs to it. heard: while it is a dict, it gets what each layer says.
    """

    def __init__(self, role: Role, layers: Mapping[str, TrainedLayer], bins: int, end: float) -> None:
        self.role, self.host, self.layers = role, role.host, dict(layers)
        self.bins, self.end = bins, end
        self.moment = Moment(role.host.network, bins, end)
        self.heard: dict[str, Tensor] | None = None

    @contextmanager
    def playing(self) -> Iterator[None]:
        """While open, the network is the student."""
        network, hold = self.role.host.network, Attachment()
        with self.role.playing():
            self.moment.watch(hold, network)
            for name, layer in self.layers.items():
                module = network.get_submodule(name)
                hold.replace(module, "forward", _Forward(self, name, module, layer))
            try:
                yield
            finally:
                hold.restore()

    def answer(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """As `Role.answer`."""
        with self.playing():
            return self.role.answer(x, tau, condition)

    def velocity(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """As `Role.velocity`."""
        with self.playing():
            return self.role.velocity(x, tau, condition)

    def data(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """As `Role.data`."""
        return spread(tau.cos(), x) * x - spread(tau.sin(), x) * self.velocity(x, tau, condition)


class _Forward:
    """The forward of one layer in training: as `seams.quantised.Forward`, with gradients."""

    def __init__(self, student: Quantised, name: str, module: Any, layer: TrainedLayer) -> None:
        self.student, self.name, self.module, self.layer = student, name, module, layer

    def __call__(self, x: Tensor) -> Tensor:
        low, step = (self.student.moment.spread(table, x) for table in self.layer.ranges())
        read = rounded(x, low, step, self.layer.inputs)
        # In the network's own precision, as whoever loads the file has it.
        said = applied(self.module, read, self.layer.weight(self.module.weight).to(self.module.weight.dtype))
        if self.student.heard is not None:
            self.student.heard[self.name] = said
        return said
