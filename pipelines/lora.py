"""Low-rank changes of a network's weights (LoRA) as files that diffusers reads, with what hasten adds to their header.

Shapes: W [out, in, ...] the changed weight (... of a convolution's kernel); down [r, in, ...], up [out, r, ...] with
ones for its kernel; bias [out]. The change is W + (alpha / r) up down and b + bias (LoRA: arXiv 2106.09685, section 4.1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hasten.atomic import atomic_write
from hasten.errors import ModelError, UsageError
from hasten.recipe import Adapter

FILE = "pytorch_lora_weights.safetensors"
"""The name that `load_lora_weights(folder)` of diffusers looks for."""

BUNDLED = Path(__file__).parent / "bundled" / "students"
"""Folders of the students that come with hasten."""

METADATA = "lora_adapter_metadata"
"""Header key under which diffusers keeps peft's configuration."""

FACTS = "hasten"
"""Header key of what hasten knows about an adapter, as JSON."""

_ENDS = {".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_B.bias": "bias"}


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change of one layer."""

    down: Tensor
    up: Tensor
    alpha: float
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def folded(self) -> LowRank:
        """The same change with alpha = r: the scale is in `up`. Exact where the scale is a power of two."""
        return self if self.alpha == self.rank else replace(self, up=self.up * self.scale, alpha=float(self.rank))

    def change(self) -> Tensor:
        """The change of the weight itself, [out, in, ...], computed in float32."""
        made = self.scale * (self.up.flatten(1).float() @ self.down.flatten(1).float())
        return made.reshape(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True, slots=True)
class Lora:
    """A whole adapter. site: the pipeline's name of its network. layers: module name -> change. facts: plain values for
    the header (the network's class, the sampler, how it was trained)."""

    site: str
    layers: dict[str, LowRank]
    facts: dict[str, Any] = field(default_factory=dict)

    def configuration(self) -> dict[str, Any]:
        """peft's arguments for it: the usual rank and alpha, and by full name those of layers that differ."""
        ranks = [low.rank for low in self.layers.values()]
        alphas = [low.alpha for low in self.layers.values()]
        rank, alpha = max(ranks, key=ranks.count), max(alphas, key=alphas.count)
        return {
            "r": rank,
            "lora_alpha": _plain(alpha),
            "rank_pattern": {_exactly(n): low.rank for n, low in self.layers.items() if low.rank != rank},
            "alpha_pattern": {_exactly(n): _plain(low.alpha) for n, low in self.layers.items() if low.alpha != alpha},
            "target_modules": sorted(self.layers),
            "lora_bias": any(low.bias is not None for low in self.layers.values()),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Name in diffusers' files -> tensor, with the network's site in front."""
        found = {}
        for name, low in self.layers.items():
            for end, attribute in _ENDS.items():
                value = getattr(low, attribute)
                if value is not None:
                    # What peft calls the bias is scaled with the rest; ours is the change itself.
                    value = value / low.scale if attribute == "bias" else value
                    found[f"{self.site}.{name}{end}"] = value.detach().cpu().contiguous()
        return found

    def save(self, file: Path) -> Path:
        """Write it for `load_lora_weights`. Raises `OutputError` where that cannot be done."""
        packed = {f"{self.site}.{key}": value for key, value in self.configuration().items()}
        head = {"format": "pt", METADATA: json.dumps(packed, indent=2, sort_keys=True), FACTS: json.dumps(self.facts)}
        return atomic_write(file, save(self.tensors(), head))

    @classmethod
    def load(cls, place: Path) -> Lora:
        """Read a file in diffusers' names, or the one in a folder.

        Raises `ModelError` for a file that is missing or no safetensors, `UsageError` for one with other names.
        """
        file = file_of(place)
        tensors, head = read(file)
        sites = {name.partition(".")[0] for name in tensors}
        ended = all(name.endswith(tuple(_ENDS)) for name in tensors)
        if len(sites) != 1 or not ended or not tensors:
            raise UsageError(
                f"{file} holds no LoRA of one network in diffusers' names (first name: {next(iter(tensors), 'none')})."
                " Convert it with hasten.distill.export.names.read_lora, or load it with the pipeline's load_lora_weights."
            )
        return cls(*_layers(tensors, sites.pop(), head), facts=json.loads(head.get(FACTS, "{}")))

    def merged(self, other: Lora) -> Lora:
        """Both changes as one adapter: ranks side by side, nothing lost, whatever their scales.

        Facts are those of `self`. Raises `UsageError` for adapters of different networks.
        """
        if self.site != other.site:
            raise UsageError(f"An adapter of {self.site} and one of {other.site} cannot be merged into one.")
        names = dict.fromkeys([*self.layers, *other.layers])
        return replace(self, layers={name: _joined([x.layers[name] for x in (self, other) if name in x.layers]) for name in names})

    def check(self, network: nn.Module) -> None:
        """Raise `ModelError` unless every layer is one of `network`, with its widths."""
        known, kind = dict(network.named_modules()), type(network).__name__
        told = self.facts.get("network", kind)
        if told != kind:
            raise ModelError(f"The adapter belongs on a {told}, and this is a {kind}. Load the model it was trained for.")
        for name, low in self.layers.items():
            base = getattr(known.get(name), "base_layer", known.get(name))
            if base is None:
                raise ModelError(f"The adapter changes {name!r}, which this {kind} does not have. {_OTHER}")
            want, got = (low.up.shape[0], low.down.shape[1]), _widths(base)
            if want != got:
                raise ModelError(f"The adapter changes {name!r} of {want[1]} -> {want[0]}, here it is {got}. {_OTHER}")

    def remark(self, network: nn.Module) -> str | None:
        """A sentence where the weights of `network` are not those that the adapter was trained on; None where they are, or
        where its file does not say."""
        told, now = self.facts.get("weights"), marks(network, self.layers)
        if not told or now is None or len(told) != len(now):
            return None
        off = max(abs(a - b) for a, b in zip(told, now, strict=True)) / (max(map(abs, told)) or 1.0)
        if off <= 0.02:
            return None
        return "The adapter was trained on other weights of the same network; it may do less than it did there, or harm."


def marks(network: nn.Module, names: Iterable[str], count: int = 64) -> list[float] | None:
    """Numbers by which to know the weights that an adapter changes: one of each of up to `count` layers; None for weights
    that are packed (quantised) or not there (meta)."""
    found = []
    for name in sorted(names)[:count]:
        layer = network.get_submodule(name)
        weight = getattr(layer, "base_layer", layer).weight
        if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point or weight.is_meta:
            return None
        found.append(weight.detach().flatten()[0].float())
    return [float(f"{value:.4g}") for value in torch.stack(found).tolist()] if found else None


_OTHER = "It was trained for another model; load that one, or another adapter."


def find(adapter: Adapter) -> Path:
    """Where a recipe's adapter is: the folder of a student that comes with hasten, or what its path says."""
    names = [folder.name for folder in BUNDLED.iterdir()] if BUNDLED.is_dir() else []
    return BUNDLED / adapter.path if adapter.path in names else adapter.place


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of a safetensors file. Raises `ModelError` where it is missing or none."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    except Exception as error:  # safetensors raises errors of its own kind for broken headers
        raise ModelError(f"{file} cannot be read as safetensors ({' '.join(str(error).split())[:120]}).") from error


def file_of(place: Path) -> Path:
    """The safetensors file that `place` is, or has: of several, the LoRA. Raises `ModelError` where that is not one."""
    if place.suffix not in ("", ".safetensors") and not place.is_dir():
        raise ModelError(f"{place} is not safetensors, and pickles can run any code when loaded. Name a .safetensors file.")
    if not place.is_dir():
        return place
    found = sorted(place.glob("*.safetensors"))
    own = [file for file in found if file.name == FILE] or found
    if len(own) != 1:
        raise ModelError(f"{place} has {len(own)} .safetensors files; name the one that is the adapter.")
    return own[0]


def _layers(tensors: Mapping[str, Tensor], site: str, head: Mapping[str, str]) -> tuple[str, dict[str, LowRank]]:
    packed = json.loads(head.get(METADATA, "{}"))
    told = {key.removeprefix(f"{site}."): value for key, value in packed.items()}
    alphas = told.get("alpha_pattern") or {}
    found: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        end = next(end for end in _ENDS if full.endswith(end))
        found.setdefault(full[len(site) + 1 : -len(end)], {})[_ENDS[end]] = tensor
    layers = {}
    for name, parts in found.items():
        if "down" not in parts or "up" not in parts:
            raise UsageError(f"The LoRA has one half of {name!r} only. Write it again.")
        rank = parts["down"].shape[0]
        alpha = next((a for key, a in alphas.items() if re.match(rf"(.*\.)?({key})$", name)), told.get("lora_alpha", rank))
        low = LowRank(parts["down"], parts["up"], float(alpha), parts.get("bias"))
        layers[name] = low if low.bias is None else replace(low, bias=low.bias * low.scale)
    return site, layers


def _joined(lows: list[LowRank]) -> LowRank:
    folded = [low.folded() for low in lows]
    biases = [low.bias for low in folded if low.bias is not None]
    down, up = torch.cat([low.down for low in folded]), torch.cat([low.up for low in folded], 1)
    return LowRank(down, up, float(len(down)), torch.stack(biases).sum(0) if biases else None)


def _widths(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear or convolutional layer; (0, 0) for another."""
    if hasattr(layer, "out_features"):
        return int(layer.out_features), int(layer.in_features)
    return int(getattr(layer, "out_channels", 0)), int(getattr(layer, "in_channels", 0))


def _exactly(name: str) -> str:
    """A pattern by which peft finds this layer and none whose name ends alike."""
    return f"^{re.escape(name)}"


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value
