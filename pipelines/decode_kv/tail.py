"""A cache with a policy as what the decode loop commits to (`pipelines.decode.tail.Tail`).

Shapes: B rows, N nodes of a proposal, D nodes of a path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hasten.caching.decode.packed import NONE
from hasten.pipelines.decode_kv.cache import KVCache
from hasten.samplers.decode.proposal import Proposal


class KeptTail:
    """Drafts stand behind what the policy kept; each row commits its own path, and only then may anything leave.

    cache: has read the prompt, through a model whose `KVSession` is open.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def space(self) -> int | None:
        """As many nodes as wanted."""
        return None

    def inputs(self, proposal: Proposal) -> dict[str, Any]:
        """What the model is called with beside tokens; the cache has been told what each node reads."""
        above = proposal.ancestors()
        itself = torch.eye(proposal.size, dtype=torch.bool, device=above.device)
        self.cache.draft(above & proposal.valid[:, None, :] | itself, above.sum(-1) - 1)
        return {"past_key_values": self.cache, "use_cache": True, "attention_mask": None, "position_ids": None}

    def walk(self, most: int) -> None:
        """What leaves is decided behind every token, so nothing is read in one go."""

    def commit(self, path: Tensor, keep: Tensor, longest: int, *, straight: bool = False) -> None:
        """Keep the first `keep` int64 [B] nodes of `path` int64 [B, D]. longest: slots of the longest row, and straight, whether
        the path is a plain one: nobody here needs them. Waits for the device, unless `keep` is on the host."""
        counts: list[int] = keep.tolist()
        steps = torch.arange(max(counts, default=0), device=path.device)
        index = path[:, : len(steps)]
        self.cache.commit(torch.where(steps < keep.to(path.device)[:, None], index, NONE), counts)

    def finish(self, aligned: bool) -> KVCache | None:
        """The cache where its rows end together, as `generate` returns it."""
        return self.cache if aligned else None
