"""Keys and values of a decode loop: what is committed, and behind it the nodes of one proposal.

Shapes: B rows, N nodes, S slots. All rows write the nodes of a proposal at the same slots, and have committed different
numbers of them: what a row has not committed is never read. A cache that can do this by itself (one with slots and
positions of its own) has the same four methods.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from hasten.pipelines.decode import compat
from hasten.samplers.decode.proposal import Proposal


class Tail(Protocol):
    """What the loop asks of keys and values."""

    cache: Any

    def space(self) -> int | None:
        """Nodes that a proposal may have, node 0 included; None: as many as wanted."""

    def inputs(self, proposal: Proposal) -> dict[str, Any]:
        """What the model is called with beside tokens: cache, positions, mask."""

    def commit(self, path: Tensor, keep: Tensor, longest: int) -> None:
        """Keep the first `keep` int64 [B] nodes of `path` int64 [B, D], and drop the others. longest: slots of the longest row
        that goes on, prompt included; finished rows may lose what they have behind it."""

    def finish(self, aligned: bool) -> Any:
        """The cache as `generate` returns it, or None where its rows do not end at one slot."""


class DenseTail:
    """The tail of transformers' own caches: `DynamicCache`, which grows, and `StaticCache`, which does not.

    mask int64 [B, P]: of the prompt's tokens, 0 for padding. kinds: kind of every layer; window: reach of sliding ones.
    additive: the attention wants numbers to add in place of truth values. The prompt has been read into `cache`.
    """

    def __init__(self, cache: Any, mask: Tensor, kinds: tuple[str, ...], window: int | None, additive: torch.dtype | None) -> None:
        self.cache, self.kinds, self.window, self.additive = cache, kinds, window, additive
        self.prompt = mask.bool()
        self.used = mask.shape[1]
        self.end = torch.full_like(mask[:, 0], self.used)
        self.logical = mask.sum(1)
        self.padded = not bool(self.prompt.all())
        self.static = compat.is_static(cache)
        self._drafted = 0

    def space(self) -> int | None:
        return int(self.cache.layers[0].max_cache_len) - self.used if self.static else None

    def inputs(self, proposal: Proposal) -> dict[str, Any]:
        self._drafted = proposal.size
        alone = proposal.size == 1 and len(self.end) == 1 and not self.padded
        if alone and not self.static and self.window is None:
            return {"past_key_values": self.cache, "position_ids": self.logical[:, None], "use_cache": True, "attention_mask": None}
        above = proposal.ancestors()
        position = self.logical[:, None] + above.sum(-1) - 1
        found = {"past_key_values": self.cache, "position_ids": position, "use_cache": True}
        mask = self._mask(above & proposal.valid[:, None, :] | torch.eye(proposal.size, dtype=torch.bool, device=above.device))
        masks = {kind: self._form(self._near(mask, position) if kind == "sliding_attention" else mask) for kind in set(self.kinds)}
        return found | {"attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}

    def commit(self, path: Tensor, keep: Tensor, longest: int) -> None:
        moved = self._drafted > 1 or len(path) > 1
        if moved:
            steps = torch.arange(path.shape[1], device=path.device)
            source, goal = self.used + path.clamp(min=0), self.end[:, None] + steps
        for layer in self.cache.layers:
            if not layer.is_initialized:
                continue
            for name in ("keys", "values") if moved or self.used + 1 != longest else ():  # else all of it stays where it is
                tensor = getattr(layer, name)
                if moved:
                    _move(tensor, source, goal)
                if not self.static:
                    setattr(layer, name, tensor[:, :, :longest])
            if self.static:
                layer.cumulative_length.fill_(longest)
        self.end, self.logical = (self.end + keep).clamp(max=longest), self.logical + keep
        self.used = longest

    def finish(self, aligned: bool) -> Any:
        return self.cache if aligned else None

    def _mask(self, tree: Tensor) -> Tensor:
        """Which slots every node reads, bool [B, N, S]. tree bool [B, N, N]: which nodes."""
        slots = int(self.cache.layers[0].max_cache_len) if self.static else self.used + tree.shape[1]
        index = torch.arange(slots, device=tree.device)
        prompt = torch.nn.functional.pad(self.prompt, (0, slots - self.prompt.shape[1]), value=True)
        committed = prompt & (index < self.end[:, None])
        node = (index - self.used).clamp(0, tree.shape[1] - 1).expand(*tree.shape[:2], -1)
        drafted = tree.gather(2, node) & (index >= self.used) & (index < self.used + tree.shape[1])
        return committed[:, None, :] | drafted

    def _near(self, mask: Tensor, position: Tensor) -> Tensor:
        """Of `mask` bool [B, N, S], what a sliding window reaches. position int64 [B, N]."""
        if self.window is None:
            return mask
        before = self.prompt.long().cumsum(1) - 1
        index = torch.arange(mask.shape[2], device=mask.device)
        prompt = self.prompt.shape[1]
        behind = before[:, -1:] + 1 + index[prompt:] - prompt
        places = torch.cat([before, behind.expand(len(mask), -1)], 1)[:, None, :].expand(-1, mask.shape[1], -1)
        inside = position[:, :, None] - places < self.window
        node = (index >= self.used) & (index < self.used + position.shape[1])
        shifted = (index - self.used).clamp(0, position.shape[1] - 1)
        near = position[:, :, None] - position[:, None, :].gather(2, shifted.expand(len(mask), 1, -1)) < self.window
        return mask & torch.where(node, near, inside)

    def _form(self, mask: Tensor) -> Tensor:
        mask = mask[:, None]
        if self.additive is None:
            return mask
        return torch.zeros_like(mask, dtype=self.additive).masked_fill(~mask, torch.finfo(self.additive).min)


def _move(tensor: Tensor, source: Tensor, goal: Tensor) -> None:
    """Copy slots int64 [B, D] of `tensor` [B, heads, S, width] to other slots, in place."""
    wide = (-1, tensor.shape[1], -1, tensor.shape[3])
    picked = tensor.gather(2, source[:, None, :, None].expand(*wide))
    tensor.scatter_(2, goal[:, None, :, None].expand(*wide), picked)
