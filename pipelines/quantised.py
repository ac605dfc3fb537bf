"""Networks whose weights are whole numbers of a few bits: the arithmetic, and the file.

A weight is q s: whole numbers q, and a step s for each output channel. What a layer reads is rounded as well, to the nearest
of 2^b values low, low + step, ...; of low and step there is a table over the time that the network is told, since the range
of activations changes along a trajectory (EfficientDM, arXiv 2310.03270, section 3.4). Which row of the table is chosen by the
time alone, so that steps may be left out, come in any order, and be split into branches.

Everything is computed in full precision on rounded numbers: the files are small, but memory and time while the network runs
are those of full precision. Training computes the same numbers by the same functions, so that a file gives what was trained.

Shapes: W, q [out, in, ...]; s [out]; T bins of time, low and step [T]; x [n, ...] what a layer reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hasten.atomic import atomic_write
from hasten.errors import ModelError
from hasten.pipelines.lora import file_of, marks, read

FILE = "quantised.safetensors"

HEAD = "hasten_quantised"
"""Header key of everything but the numbers, as JSON; a file that has it is one of these."""

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that are rounded; not their subclasses, which compute something else."""


class _Nearest(torch.autograd.Function):
    """Rounds; its gradient is that of the identity (straight through, arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return v.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _nearest(v: Tensor) -> Tensor:
    rounded: Tensor = _Nearest.apply(v)  # type: ignore[no-untyped-call]
    return rounded


def per_channel(s: Tensor, like: Tensor) -> Tensor:
    """[out] -> [out, 1, ...], to multiply `like` [out, ...]."""
    return s.reshape(-1, *[1] * (like.ndim - 1))


def whole(weight: Tensor, s: Tensor, bits: int) -> Tensor:
    """q, float32: the nearest whole numbers to W / s, cut off at -2^(bits - 1) and 2^(bits - 1) - 1.

    Gradients go straight through the rounding, and stop at weights that are cut off; that of s is the one of learned
    steps (LSQ, arXiv 1902.08153, equation 3).
    """
    half = 2 ** (bits - 1)
    q = _nearest((weight.float() / per_channel(s, weight)).clamp(-half, half - 1))
    return q + 0.0  # whole numbers have no -0


def rounded(x: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    """x at the nearest of its 2^bits values, in x's dtype; low and step in shapes that go with x, float32."""
    number = _nearest(((x.float() - low) / step).clamp(0, 2**bits - 1))
    return (number * step + low).to(x.dtype)


def applied(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """What `layer`, one of `KINDS`, makes of x with another weight."""
    weight = weight.to(x.dtype)
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, layer.bias)
    made: Tensor = layer._conv_forward(x, weight, layer.bias)
    return made


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. q int8 [out, in, ...] of `bits` bits; s float32 [out]; low, step float32 [T] of what it reads, at `inputs`
    bits."""

    q: Tensor
    s: Tensor
    bits: int
    low: Tensor
    step: Tensor
    inputs: int

    def weight(self) -> Tensor:
        """q s, float32."""
        return self.q.float() * per_channel(self.s, self.q)


@dataclass(frozen=True, slots=True)
class Quantised:
    """A network's layers in few bits. site: the pipeline's name of its network. end: the time of pure noise, in the network's
    own time; row k of the tables is for times from k end / T. facts: plain values for the header."""

    site: str
    layers: dict[str, Layer]
    bins: int
    end: float
    facts: dict[str, Any] = field(default_factory=dict)

    def told(self) -> str:
        """What it is, in words."""
        common = {(x.bits, x.inputs): 0 for x in self.layers.values()}
        for x in self.layers.values():
            common[x.bits, x.inputs] += 1
        kinds = ", ".join(f"{n} with {w}-bit weights and {a}-bit inputs" for (w, a), n in sorted(common.items()))
        return f"{len(self.layers)} layers quantised ({kinds}), ranges for {self.bins} bins of time"

    def num_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def save(self, file: Path) -> Path:
        """Write it; two weights share a byte where they have up to four bits. Raises `OutputError` where that cannot be."""
        told = {name: {"shape": list(x.q.shape), "bits": x.bits, "inputs": x.inputs} for name, x in self.layers.items()}
        head = {"version": 1, "site": self.site, "bins": self.bins, "end": self.end, "layers": told, "facts": self.facts}
        return atomic_write(file, save(self._tensors(), {"format": "pt", HEAD: json.dumps(head)}))

    @classmethod
    def load(cls, place: Path) -> Quantised:
        """Read a file, or the one in a folder. Raises `ModelError` for one that is missing, of another kind, or damaged."""
        file = file_of(place)
        tensors, told = read(file)
        try:
            head = json.loads(told[HEAD])
            if head["version"] != 1:
                raise ModelError(f"{file} has format {head['version']} of quantised weights; this hasten reads 1. Update it.")
            layers = {name: _layer(tensors, name, sizes, head["bins"]) for name, sizes in head["layers"].items()}
            return cls(head["site"], layers, int(head["bins"]), float(head["end"]), head["facts"])
        except (KeyError, TypeError, json.JSONDecodeError, RuntimeError) as error:
            raise ModelError(f"{file} holds no quantised weights, or is damaged ({error!r}). Export the student again.") from error

    def check(self, network: nn.Module) -> None:
        """Raise `ModelError` unless every layer is one of `network`, of a kind that can be rounded and of its shape."""
        kind, modules = type(network).__name__, dict(network.named_modules())
        if self.facts.get("network", kind) != kind:
            raise ModelError(f"The weights are a {self.facts['network']}'s, and this is a {kind}. Load the model they were made of.")
        for name, layer in self.layers.items():
            found: Any = modules.get(name)
            if type(found) not in KINDS:
                got = "missing" if found is None else f"a {type(found).__name__}"
                raise ModelError(f"{name!r} has quantised weights and is {got} in this {kind}. Load the model they were made of.")
            shape = tuple(found.weight.shape)
            if shape != tuple(layer.q.shape):
                raise ModelError(f"{name!r} is {shape} in this {kind}, its quantised weights {tuple(layer.q.shape)}.")

    def remark(self, network: nn.Module) -> str | None:
        """A sentence where `network` does not have the weights that these were made of."""
        told, now = self.facts.get("weights"), marks(network, self.layers)
        if not told or now is None or len(told) != len(now):
            return None
        off = max(abs(a - b) for a, b in zip(told, now, strict=True)) / (max(map(abs, told)) or 1.0)
        if off <= 0.02:
            return None
        return "The quantised weights were made of another training of this network, whose biases and norms may not fit them."

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, x in self.layers.items():
            found |= {f"{name}.q": packed(x.q) if x.bits <= 4 else x.q, f"{name}.s": x.s, f"{name}.low": x.low,
                      f"{name}.step": x.step}  # fmt: skip
        return {name: t.detach().cpu().contiguous() for name, t in found.items()}


def is_quantised(place: Path) -> bool:
    """Whether the file (or the one in the folder) has quantised weights. Raises `ModelError` where there is no such file."""
    file = file_of(place)
    try:
        with safe_open(file, framework="pt") as opened:
            return HEAD in (opened.metadata() or {})
    except Exception:  # noqa: BLE001  # safetensors has errors of its own kind; whoever reads the file says what is wrong
        return False


def packed(q: Tensor) -> Tensor:
    """Whole numbers in [-8, 7] as bytes, uint8 [ceil(n / 2)]: the first of each two in the lower half."""
    flat = (q.flatten().to(torch.int16) + 8).to(torch.uint8)
    flat = nn.functional.pad(flat, (0, flat.numel() % 2))
    return flat[0::2] | (flat[1::2] << 4)


def unpacked(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What was packed, int8. Raises `RuntimeError` where there are too few bytes."""
    halves = torch.stack([values & 15, values >> 4], 1).flatten()
    count = torch.Size(shape).numel()
    if values.dtype != torch.uint8 or values.numel() != (count + 1) // 2:
        raise RuntimeError(f"{values.numel()} bytes for {count} weights")
    return (halves[:count].to(torch.int8) - 8).reshape(shape)


def _layer(tensors: Mapping[str, Tensor], name: str, told: Mapping[str, Any], bins: int) -> Layer:
    shape, bits = tuple(told["shape"]), int(told["bits"])
    q, s, low, step = (tensors[f"{name}.{part}"] for part in ("q", "s", "low", "step"))
    q = unpacked(q, shape) if bits <= 4 else q
    if q.dtype != torch.int8 or tuple(q.shape) != shape or s.shape != shape[:1] or {*low.shape, *step.shape} != {bins}:
        raise RuntimeError(f"the shapes of {name!r} do not go together")
    return Layer(q, s, bits, low, step, int(told["inputs"]))
