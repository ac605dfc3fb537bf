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
from hasten.pipelines.decode.walk import Walk
from hasten.samplers.decode.proposal import Proposal

FULL, SLIDING = "full_attention", "sliding_attention"


class Tail(Protocol):
    """What the loop asks of keys and values."""

    cache: Any

    def space(self) -> int | None:
        """Nodes that a proposal may have, node 0 included; None: as many as wanted."""

    def inputs(self, proposal: Proposal) -> dict[str, Any]:
        """What the model is called with beside tokens: cache, positions, mask."""

    def walk(self, most: int) -> Walk | None:
        """For reading at most `most` tokens of each row, one by one, before the next commit; None where only proposals are read."""

    def commit(self, path: Tensor, keep: Tensor, longest: int, *, straight: bool = False) -> None:
        """Keep the first `keep` int64 [B], on the host, nodes of `path` int64 [B, D], and drop the others. longest: slots of the
        longest row that goes on, prompt included; finished rows, those that keep nothing, may lose what they have behind it.
        straight: the kept nodes of all rows are 0, 1, 2, and so on, as they are behind a walk."""

    def finish(self, aligned: bool) -> Any:
        """The cache as `generate` returns it, or None where its rows do not end at one slot."""


class DenseTail:
    """The tail of transformers' own caches: `DynamicCache`, which grows, and `StaticCache`, which does not.

    mask int64 [B, P]: of the prompt's tokens, 0 for padding. kinds: kind of every layer; window: reach of sliding ones.
    additive: the attention wants numbers to add in place of truth values. The prompt has been read into `cache`.
    """

    def __init__(self, cache: Any, mask: Tensor, kinds: tuple[str, ...], window: int | None, additive: torch.dtype | None) -> None:
        self.cache, self.kinds, self.additive, self.device = cache, frozenset(kinds), additive, mask.device
        self.window = window if SLIDING in self.kinds else None
        self.prompt = mask.bool()
        self.used = mask.shape[1]
        self.ends = [self.used] * len(mask)
        self.read: list[int] = mask.sum(1).tolist()
        self.padded = min(self.read) < self.used
        self.static = compat.is_static(cache)

    def space(self) -> int | None:
        return self.slots - self.used if self.static else None

    @property
    def slots(self) -> int:
        """Of a cache that does not grow."""
        return int(self.cache.layers[0].max_cache_len)

    @property
    def level(self) -> bool:
        """Have all rows that go on committed what stands in the slots?"""
        return min(self.ends) == self.used

    @property
    def plain(self) -> bool:
        """Does the next token of each row read all slots there are?"""
        return self.level and not self.padded and not self.static and self.window is None

    @property
    def places(self) -> Tensor:
        """Tokens of each row, int64 [B]: the position of the next one."""
        return torch.tensor(self.read, device=self.device)

    def inputs(self, proposal: Proposal) -> dict[str, Any]:
        found = {"past_key_values": self.cache, "use_cache": True}
        if proposal.size == 1 and self.plain:
            return found | {"position_ids": self.places[:, None], "attention_mask": None}
        position = self.places[:, None] + proposal.depth()
        itself = torch.eye(proposal.size, dtype=torch.bool, device=self.device)
        mask = self._mask(proposal.ancestors() & (proposal.valid[:, None, :] | itself))
        sliding = None if self.window is None else self.form(self._near(mask, position)[:, None])
        return found | {"position_ids": position, "attention_mask": self.of_kinds(self.form(mask[:, None]), sliding)}

    def walk(self, most: int) -> Walk:
        return Walk(self, most)

    def commit(self, path: Tensor, keep: Tensor, longest: int, *, straight: bool = False) -> None:
        counts: list[int] = keep.tolist()
        moved = not (straight and self.level)
        if moved:
            steps = torch.arange(max(counts), device=self.device)
            source = self.used + path[:, : len(steps)].clamp(min=0)
            goal = torch.tensor(self.ends, device=self.device)[:, None] + steps
        for layer in self.cache.layers:
            if not layer.is_initialized:
                continue
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                if moved:
                    _move(tensor, source, goal)
                if not self.static and tensor.shape[2] != longest:
                    setattr(layer, name, tensor[:, :, :longest])
            if self.static:
                layer.cumulative_length.fill_(longest)
        # What a finished row holds is never asked for again: it counts as full, so that others need no mask on its account.
        self.ends = [min(end + count, longest) if count else longest for end, count in zip(self.ends, counts, strict=True)]
        self.read = [read + count for read, count in zip(self.read, counts, strict=True)]
        self.used = longest

    def finish(self, aligned: bool) -> Any:
        return self.cache if aligned else None

    def committed(self, slots: int, *, ahead: bool) -> Tensor:
        """Which of the first `slots` a row has committed, bool [B, S]. ahead: and those behind all rows, which are to be read."""
        prompt = torch.nn.functional.pad(self.prompt, (0, slots - self.prompt.shape[1]), value=True)
        if self.level and (ahead or slots == self.used):
            return prompt
        index = torch.arange(slots, device=self.device)
        there = index < torch.tensor(self.ends, device=self.device)[:, None]
        return prompt & (there | (index >= self.used) if ahead else there)

    def slot_places(self, slots: int) -> Tensor:
        """Position of the token in each of the first `slots`, int64 [B, S], if those behind all rows are read one by one."""
        before = self.prompt.long().cumsum(1) - 1
        index = torch.arange(slots - self.prompt.shape[1], device=self.device)
        found = torch.cat([before, before[:, -1:] + 1 + index], 1)
        found[:, self.used :] = self.places[:, None] + torch.arange(slots - self.used, device=self.device)
        return found

    def form(self, mask: Tensor) -> Tensor:
        """A mask bool [B, 1, N, S] as the attention wants it."""
        if self.additive is None:
            return mask
        return torch.zeros_like(mask, dtype=self.additive).masked_fill(~mask, torch.finfo(self.additive).min)

    def of_kinds(self, full: Tensor, sliding: Tensor | None) -> Any:
        """The mask of all layers, or of each kind of them."""
        if sliding is None:
            return full
        return {FULL: full, SLIDING: sliding} if FULL in self.kinds else sliding

    def _mask(self, tree: Tensor) -> Tensor:
        """Which slots every node reads, bool [B, N, S]. tree bool [B, N, N]: which nodes."""
        nodes = tree.shape[1]
        before = self.committed(self.used, ahead=False)[:, None].expand(-1, nodes, -1)
        behind = self.slots - self.used - nodes if self.static else 0
        return torch.cat([before, tree, tree.new_zeros(*tree.shape[:2], behind)] if behind else [before, tree], 2)

    def _near(self, mask: Tensor, position: Tensor) -> Tensor:
        """Of `mask` bool [B, N, S], what a sliding window reaches. position int64 [B, N]."""
        assert self.window is not None
        places = torch.cat([self.slot_places(self.used), position], 1)
        return mask & (position[:, :, None] - places[:, None, :] < self.window)


def _move(tensor: Tensor, source: Tensor, goal: Tensor) -> None:
    """Copy slots int64 [B, D] of `tensor` [B, heads, S, width] to other slots, in place."""
    wide = (-1, tensor.shape[1], -1, tensor.shape[3])
    picked = tensor.gather(2, source[:, None, :, None].expand(*wide))
    tensor.scatter_(2, goal[:, None, :, None].expand(*wide), picked)
