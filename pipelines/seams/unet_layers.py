"""The layout of a U-Net: which layers make which skip connection, and which of them a shallow evaluation runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from hasten.pipelines.host import is_whole_compiled


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a U-Net is cut for a shallow evaluation.

    down: (block, layer) of the last down layer that runs; the layer after the last convolution is the downsampler.
    up: (block, layer) of the first up layer that runs. shallow, total: layers that run, and all of them, mid block one.
    """

    down: tuple[int, int]
    up: tuple[int, int]
    shallow: int
    total: int

    @property
    def skipped(self) -> tuple[int, int]:
        """Half-open range of skipped layers, in the order in which layers run."""
        up = (self.shallow + 1) // 2
        return self.shallow - up, self.total - up


def cut(model: nn.Module, branch: int) -> Cut | str:
    """Where to cut `model` for `DeepReuse.branch`, or why that cannot be done."""
    # The registered lists, because gates may stand in front of them.
    downs, mid, ups = (model._modules.get(name) for name in ("down_blocks", "mid_block", "up_blocks"))
    if not isinstance(downs, nn.ModuleList) or not isinstance(ups, nn.ModuleList) or not isinstance(mid, nn.Module):
        return "it is no U-Net: down_blocks, mid_block and up_blocks were not found"
    if not all(hasattr(block, "resnets") for block in (*downs, *ups)):
        return "its blocks do not keep their layers as `resnets`"
    makes = [_layers(block) + (getattr(block, "downsamplers", None) is not None) for block in downs]
    uses = [_layers(block) for block in ups]
    if 1 + sum(makes) != sum(uses):
        return f"its {len(ups)} up blocks use {sum(uses)} skip connections, but {1 + sum(makes)} are made"
    if branch > sum(makes) - 1:
        return f"branch {branch} is too deep: 0 to {sum(makes) - 1} are possible on this network"
    down, up = _locate(makes, branch), _locate(uses, sum(uses) - branch - 2)
    for block in (downs[down[0]], ups[up[0]]):
        if is_whole_compiled(block):
            return f"a {type(block).__name__} that has to be cut is one compiled function"
    return Cut(down, up, (branch + 1) + (branch + 2), sum(makes) + 1 + sum(uses))


def aligned(block: Any) -> dict[str, nn.ModuleList]:
    """The lists of a block that have one module per layer: `resnets`, and attentions or motion modules beside them."""
    num = len(block.resnets)
    lists = {name: child for name, child in block.named_children() if isinstance(child, nn.ModuleList)}
    ends = ("downsamplers", "upsamplers")
    return {name: child for name, child in lists.items() if len(child) == num and name not in ends}


def _layers(block: Any) -> int:
    return len(block.resnets)


def _locate(sizes: list[int], position: int) -> tuple[int, int]:
    """(list, index) of item number `position` of lists of these sizes, one after another."""
    for number, size in enumerate(sizes):
        if position < size:
            return number, position
        position -= size
    raise AssertionError("position lies behind the last list")
