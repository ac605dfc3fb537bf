"""An adapter under other programs' names: ComfyUI's, kohya's, and back, by a map made from the network itself.

Nothing is taken apart by its spelling: a network's modules and the table of its family (`families.py`) give the names of
all layers; a joined name is looked up among the joined names of those. Where the authors have one matrix for several
layers of diffusers (q, k, v), the parts' ranks stand side by side in it, which is exact, and the file's header says how
to take it apart again.

Shapes: as in `pipelines/lora.py`; a fused layer's outputs are its parts' outputs one upon the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from hasten.atomic import atomic_write
from hasten.distill.export.families import FAMILIES, Row
from hasten.errors import UsageError
from hasten.pipelines.lora import FACTS, FILE, Lora, LowRank, read

Style = Literal["comfy", "kohya"]
PREFIX = {"comfy": "diffusion_model.", "kohya": "lora_unet_"}

ENDS = {
    ".lora_down.weight": "down", ".lora_A.weight": "down", ".lora_up.weight": "up", ".lora_B.weight": "up",
    ".alpha": "alpha", ".diff_b": "bias", ".diff": "diff", ".lora_B.bias": "bias",
}  # fmt: skip
"""How a tensor's name ends, in any of the programs -> what it is. `diff` and `diff_b` are LightX2V's whole changes."""

_SWAPPED = "AdaLayerNormContinuous"
"""The authors of FLUX and SD3 let this norm's layer give shift then scale; diffusers has scale then shift."""


@dataclass(frozen=True, slots=True)
class Fused:
    """One layer of the authors'. parts: diffusers' names; widths: their outputs; inputs: of a weight, with its kernel;
    swap: whether its halves are exchanged."""

    parts: tuple[str, ...]
    widths: tuple[int, ...]
    inputs: tuple[int, ...]
    swap: bool = False


class Names:
    """The layers of one network under its authors' names.

    known: whether those are known at all; where not, the layers keep diffusers' names, which kohya's format allows.
    """

    def __init__(self, network: nn.Module) -> None:
        modules = {name: getattr(module, "base_layer", module) for name, module in network.named_modules()}
        layers = {n: m for n, m in modules.items() if _width(m) and n.rpartition(".")[2] != "base_layer" and ".lora_" not in n}
        self.kind, self.known = type(network).__name__, type(network).__name__ in FAMILIES
        family = FAMILIES.get(self.kind)
        self.fused: dict[str, Fused] = {}
        for row in family.rows if family else ():
            for original, parts in _numbered(row, network):
                if all(part in layers for part in parts):
                    swap = type(modules.get(parts[0].rpartition(".")[0])).__name__ == _SWAPPED
                    self.fused[original] = _fused(parts, [layers[part] for part in parts], swap)
        if family is None or family.rest:
            taken = {part for fused in self.fused.values() for part in fused.parts}
            self.fused |= {name: _fused((name,), [m]) for name, m in layers.items() if name not in taken}
        self.joined = {name.replace(".", "_"): name for name in self.fused}
        if len(self.joined) != len(self.fused):
            raise UsageError(f"Two layers of {self.kind} have one name when dots are joined; kohya's format cannot tell them.")

    def check(self, style: Style) -> None:
        """Raise `UsageError` where this network's names in this style are not known."""
        if style == "comfy" and not self.known:
            raise UsageError(
                f"The names that ComfyUI has for the layers of {self.kind} are not known to hasten; known: {', '.join(FAMILIES)}."
                " Write it for diffusers or kohya (ComfyUI reads kohya's names of Stable Diffusion's UNets)."
            )

    def original(self, lora: Lora) -> tuple[dict[str, LowRank], dict[str, list[list[float]]]]:
        """(authors' name -> change, authors' name -> [rank, alpha] of each part for layers that were fused).

        Raises `UsageError` for a layer whose original name is not known.
        """
        found: dict[str, LowRank] = {}
        told: dict[str, list[list[float]]] = {}
        left = set(lora.layers)
        for name, fused in self.fused.items():
            parts = [lora.layers.get(part) for part in fused.parts]
            if not any(parts):
                continue
            left -= set(fused.parts)
            found[name] = _swap(_fuse(parts, fused.widths), fused)
            if len(parts) > 1:
                told[name] = [[low.rank, low.alpha] if low else [0, 0] for low in parts]
        if left:
            raise UsageError(
                f"{len(left)} layers of the adapter have no known name in the code of {self.kind}'s authors, the first:"
                f" {min(left)}. Write it for diffusers, or train on the layers of the blocks alone."
            )
        return found, told

    def diffusers(self, layers: Mapping[str, LowRank], told: Mapping[str, list[list[float]]]) -> dict[str, LowRank]:
        """diffusers' name -> change, from changes under authors' names. told: as from `original`; may lack any."""
        found: dict[str, LowRank] = {}
        for name, low in layers.items():
            fused = self.fused[name]
            low = _swap(low, fused)
            parts = [low] if len(fused.parts) == 1 else _parts(low, fused.widths, told.get(name))
            found |= {part: each for part, each in zip(fused.parts, parts, strict=True) if each is not None}
        return found

    def find(self, name: str, style: Style) -> str | None:
        """The authors' name that stands in a file of this style as `name` (without prefix and ending)."""
        return self.joined.get(name) if style == "kohya" else name if name in self.fused else None


def write(lora: Lora, network: nn.Module, file: Path, style: Style) -> Path:
    """Write `lora` of `network` for ComfyUI or for programs that read kohya's names.

    Raises `UsageError` where ComfyUI's names of this network are not known.
    """
    names = Names(network)
    names.check(style)
    layers, told = names.original(lora)
    tensors: dict[str, Tensor] = {}
    for name, low in layers.items():
        own = PREFIX[style] + (name if style == "comfy" else name.replace(".", "_"))
        tensors |= {f"{own}.lora_down.weight": low.down, f"{own}.lora_up.weight": low.up, f"{own}.alpha": _number(low.alpha)}
        if low.bias is not None:
            tensors[f"{own}.diff_b"] = low.bias
    head = {"format": "pt", FACTS: json.dumps(lora.facts | {"fused": told, "site": lora.site})}
    return atomic_write(file, save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, head))


def read_lora(place: Path, network: nn.Module, site: str = "transformer") -> Lora:
    """An adapter for `network` from a file in diffusers', ComfyUI's or kohya's names, LightX2V's whole changes included.

    site: the pipeline's name of the network, where the file does not say. Whole changes of a layer become a LoRA of full
    rank, exactly; those of norms must be zero. Raises `UsageError` for names that this network does not have.
    """
    file = place / FILE if place.is_dir() else place
    tensors, head = read(file)
    style = next((style for style, prefix in PREFIX.items() if any(name.startswith(prefix) for name in tensors)), None)
    if style is None:
        return Lora.load(place)
    facts: dict[str, Any] = json.loads(head.get(FACTS, "{}"))
    told, where = facts.pop("fused", {}), facts.pop("site", site)
    names = Names(network)
    gathered = _gathered(tensors, names, style, file)
    layers = {name: _change(parts, names.fused[name], file, name) for name, parts in gathered.items()}
    return Lora(where, names.diffusers(layers, told), facts)


def _gathered(tensors: Mapping[str, Tensor], names: Names, style: Any, file: Path) -> dict[str, dict[str, Tensor]]:
    """authors' name -> what the file has for it. Whole changes of zero are left out: they say nothing."""
    found: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        end = next((end for end in ENDS if full.endswith(end)), None)
        inner = names.find(full[len(PREFIX[style]) : -len(end)], style) if end and full.startswith(PREFIX[style]) else None
        if inner is not None and end is not None:
            found.setdefault(inner, {})[ENDS[end]] = tensor
        elif not (end in (".diff", ".diff_b") and not tensor.any()):
            raise UsageError(f"{file} changes {full!r}, which is no layer of {names.kind} that a LoRA can be on. Use another file.")
    return found


def _change(parts: Mapping[str, Tensor], fused: Fused, file: Path, name: str) -> LowRank:
    """One layer's change from a file's tensors: the low-rank part and the whole one side by side."""
    if ("down" in parts) != ("up" in parts):
        raise UsageError(f"{file} has one half of {name!r} only; it is not complete.")
    lows, bias = [], parts.get("bias")
    if "down" in parts:
        rank = float(len(parts["down"]))
        lows.append(LowRank(parts["down"], parts["up"], float(parts["alpha"]) if "alpha" in parts else rank))
    if "diff" in parts:
        lows.append(_whole(parts["diff"]))
    if not lows:  # the bias alone: a LoRA of rank 1 that is zero carries it
        like = next(iter(parts.values()))
        zeros = like.new_zeros(sum(fused.widths), 1, *[1] * (len(fused.inputs) - 1))
        lows.append(LowRank(like.new_zeros(1, *fused.inputs), zeros, 1.0))
    low = lows[0] if len(lows) == 1 else Lora("", {"": lows[0]}).merged(Lora("", {"": lows[1]})).layers[""]
    return low if bias is None else replace(low, bias=bias)


def _whole(change: Tensor) -> LowRank:
    """A change of any rank as a LoRA of full rank, bit for bit: one factor is the identity."""
    out, kernel = change.shape[0], change.shape[2:]
    if not kernel and change.shape[1] < out:
        return LowRank(torch.eye(change.shape[1], dtype=change.dtype), change, float(change.shape[1]))
    up = torch.eye(out, dtype=change.dtype).reshape(out, out, *[1] * len(kernel))
    return LowRank(change, up, float(out))


def _fused(parts: tuple[str, ...], layers: list[Any], swap: bool = False) -> Fused:
    kernel = tuple(getattr(layers[0], "kernel_size", ()))
    inputs = getattr(layers[0], "in_features", None) or layers[0].in_channels
    return Fused(parts, tuple(_width(layer) for layer in layers), (int(inputs), *kernel), swap)


def _numbered(row: Row, network: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    """The row for each block that the network has."""
    before, number, _ = row.parts[0].partition(".{}")
    if not number:
        return [(row.original, row.parts)]
    blocks = dict(network.named_modules()).get(before)
    numbers = [name for name, _ in blocks.named_children()] if blocks is not None else []
    return [(row.original.format(i), tuple(part.format(i) for part in row.parts)) for i in numbers]


def _fuse(parts: list[LowRank | None], widths: tuple[int, ...]) -> LowRank:
    """One change that is that of every part, on its own rows; one scale for all, folded in where they differ."""
    there = [low for low in parts if low is not None]
    if len(parts) == 1:
        return there[0]
    if len({low.scale for low in there}) > 1:
        parts = [low and low.folded() for low in parts]
        there = [low for low in parts if low is not None]
    ranks = [low.rank if low else 0 for low in parts]
    up = there[0].up.new_zeros(sum(widths), sum(ranks), *there[0].up.shape[2:])
    bias = None if all(low.bias is None for low in there) else there[0].up.new_zeros(sum(widths))
    row = column = 0
    for low, width, rank in zip(parts, widths, ranks, strict=True):
        if low is not None:
            up[row : row + width, column : column + rank] = low.up
            if bias is not None and low.bias is not None:
                bias[row : row + width] = low.bias
        row, column = row + width, column + rank
    return LowRank(torch.cat([low.down for low in there]), up, there[0].scale * sum(ranks), bias)


def _parts(low: LowRank, widths: tuple[int, ...], told: list[list[float]] | None) -> list[LowRank | None]:
    """The change of each part. Without being told, equal blocks are looked for, as in files of trainers that split; else
    every part gets all of `down`, which is the same change at a higher rank."""
    if told is None:
        told = _equal_blocks(low, widths)
    ups = torch.split(low.up, list(widths))
    biases: Sequence[Tensor | None] = [None] * len(widths) if low.bias is None else torch.split(low.bias, list(widths))
    if told is None:
        return [LowRank(low.down, up, low.alpha, bias) for up, bias in zip(ups, biases, strict=True)]
    found: list[LowRank | None] = []
    column = 0
    for (rank, alpha), up, bias in zip(told, ups, biases, strict=True):
        own = slice(column, column + int(rank))
        # A fused change whose parts had scales of their own has them folded in, and says so by alpha = rank.
        alpha = rank if low.alpha == low.rank else alpha
        found.append(LowRank(low.down[own].clone(), up[:, own].clone(), float(alpha), bias) if rank else None)
        column += int(rank)
    return found


def _equal_blocks(low: LowRank, widths: tuple[int, ...]) -> list[list[float]] | None:
    """[rank, alpha] of each part, where `up` has equal blocks and nothing beside them."""
    count = len(widths)
    if low.rank % count:
        return None
    rank = low.rank // count
    beside = low.up.clone()
    for number, up in enumerate(torch.split(beside, list(widths))):
        up[:, number * rank : (number + 1) * rank] = 0
    return None if beside.any() else [[rank, low.scale * rank]] * count


def _swap(low: LowRank, fused: Fused) -> LowRank:
    """With the halves of its outputs exchanged, where the two programs' halves differ. Its own inverse."""
    if not fused.swap:
        return low

    def other(value: Tensor) -> Tensor:
        return torch.cat(value.chunk(2)[::-1])

    return replace(low, up=other(low.up), bias=None if low.bias is None else other(low.bias))


def _number(value: float) -> Tensor:
    """A number as a tensor that says exactly it: float32, as others write it, where that is enough."""
    short = torch.tensor(value)
    return short if float(short) == value else torch.tensor(value, dtype=torch.float64)


def _width(module: nn.Module) -> int:
    """Outputs of a layer that a LoRA can be on, 0 for other modules."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return int(module.weight.shape[0])
    return int(getattr(module, "out_features", 0))
