"""Trainable dynamic masks: values say which keys are worth reading, and the score stays in the logits.

Shapes: B batch, Hq, Hk heads, Sq, Sk tokens, D, Dv head dimensions, Pk = B * Hk key planes, Cq, Ck blocks.

Trainable Dynamic Mask Sparse Attention (arXiv 2508.02124) and its successor Flash Sparse Attention: a bias for each key
and key head, b = A softplus(dt(v)); the w keys with the largest are read, and b is added to their logits, so that
gradients reach A and dt although choosing has none. What differs here is named at `TopBias`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hasten.errors import UsageError
from hasten.part import Part
from hasten.sparse_attn.autograd import planned_attention
from hasten.sparse_attn.blocks import SELECT, SPARSE, Blocks, Order, grouped, uniform
from hasten.sparse_attn.mask import causal as causal_mask
from hasten.sparse_attn.pack import pack
from hasten.sparse_attn.plan import Plan


class TopBias(Part):
    """The `keys` keys of each key head that have the largest bias, rounded up to blocks of `block` keys.

    keys: w of the paper. block: a block is worth as much as its best key; 1 chooses keys one by one.

    Without a causal mask all queries read the same keys, which are put first in the order of their head: one range,
    whatever `block` is. With one, the paper lets each query choose among the keys up to its own. Here a tile of queries
    chooses among the keys before its first query and reads those of its own tile as well: at least what each of its
    queries would choose, never decided by a later token. There chosen keys are scattered, and a GPU reads each block as
    a chunk of its own, so `block` of 16 to 64 is what pays; the map of choices takes Pk * Cq * Ck bytes.
    """

    kind: ClassVar[str] = "dynamic_mask"
    keys: int = Field(default=2048, ge=1)
    block: int = Field(default=1, ge=1)

    def plan(
        self, bias: Tensor, heads: tuple[int, int, int], queries: int, *, causal: bool = False,
        block_m: int = 128, block_n: int = 64,
    ) -> Plan:  # fmt: skip
        """The plan for bias [B, Hk, Sk] and Sq = `queries`; with `causal` the last query stands at the last key.

        heads: (B, Hq, Hk). Raises `UsageError` for more queries than keys under a causal mask.
        """
        scores, groups = bias.detach().float().flatten(0, 1), heads[1] // heads[2]
        if not causal:
            blocks, keep = self._together(scores, queries)
            return pack(blocks, grouped(keep, groups), heads, block_m=block_m, block_n=block_n)
        if queries > scores.shape[1]:
            raise UsageError(
                f"{queries} queries and {scores.shape[1]} keys under a causal mask; the first queries would stand"
                " before the first key. Give at least as many keys as queries."
            )
        blocks, keep = self._before(scores, queries, block_m)
        mask = causal_mask(queries, scores.shape[1])
        return pack(blocks, grouped(keep, groups), heads, block_m=block_m, block_n=block_n, mask=mask)

    def _together(self, scores: Tensor, queries: int) -> tuple[Blocks, Tensor]:
        """Chosen keys of each plane as its first block, the others as its second."""
        planes, keys = scores.shape
        chosen = self._top(self._best(scores)).repeat_interleave(self.block, 1)[:, :keys]
        perm = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)
        ends = torch.stack([torch.zeros_like(chosen[:, 0]).int(), chosen.sum(1).int()], 1)
        bounds = torch.cat([ends, ends.new_full((planes, 1), keys)], 1)
        keep = torch.tensor([[[True, False]]], device=scores.device).expand(planes, 1, 2)
        one = uniform(queries, max(queries, 1), scores.device)
        return Blocks(_order(None, one, SPARSE, queries), _order(perm, bounds, SELECT, keys)), keep

    def _before(self, scores: Tensor, queries: int, block_m: int) -> tuple[Blocks, Tensor]:
        """For each tile of queries the best blocks that end before it, and those that hold its own tokens."""
        keys, device = scores.shape[1], scores.device
        q, k = uniform(queries, block_m, device), uniform(keys, self.block, device)
        first, last = q[0, :-1, None] + (keys - queries), q[0, 1:, None] + (keys - queries) - 1
        past = k[0, None, 1:] <= first
        own = (k[0, None, 1:] > first) & (k[0, None, :-1] <= last)
        best = self._best(scores)[:, None].masked_fill(~past, -torch.inf)
        keep = (self._top(best) & past) | own
        return Blocks(_order(None, q, SPARSE, queries), _order(None, k, SELECT, keys)), keep

    def _best(self, scores: Tensor) -> Tensor:
        """The largest score of each block of keys: [Pk, Ck]."""
        padded = F.pad(scores, (0, -scores.shape[1] % self.block), value=-torch.inf)
        return padded.view(scores.shape[0], -1, self.block).amax(-1)

    def _top(self, best: Tensor) -> Tensor:
        """The best blocks along the last dimension, as many as hold `keys` keys: bool."""
        number = min(best.shape[-1], -(-self.keys // self.block))
        index = best.topk(number, dim=-1).indices
        return torch.zeros_like(best, dtype=torch.bool).scatter_(-1, index, True)


def _order(perm: Tensor | None, bounds: Tensor, role: int, tokens: int) -> Order:
    roles = torch.full((bounds.shape[1] - 1,), role, dtype=torch.int8, device=bounds.device)
    return Order(perm, bounds, roles, tokens=tokens)


class DynamicMask(nn.Module):
    """The trainable part of one attention layer, and attention with it.

    heads, dim: Hk and Dv. form: "linear" is b = A softplus(dt(v)); "exp" is the exponential of that, as the Doge models
    have it. Parameters: A [Hk], 0 at first, and dt, a linear map of all heads' values of a token to Hk numbers.
    """

    def __init__(
        self, heads: int, dim: int, choice: TopBias | None = None, form: Literal["linear", "exp"] = "linear"
    ) -> None:
        super().__init__()
        self.choice, self.form = choice if choice is not None else TopBias(), form
        self.A = nn.Parameter(torch.zeros(heads))
        self.dt = nn.Linear(heads * dim, heads, bias=False)

    def bias(self, v: Tensor) -> Tensor:
        """[B, Hk, Sk] in the dtype of the parameters, for v [B, Hk, Sk, Dv]."""
        found = self.A * F.softplus(self.dt(v.transpose(1, 2).flatten(2).to(self.dt.weight.dtype)))
        return (found.exp() if self.form == "exp" else found).transpose(1, 2)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False,
        backend: str = "auto",
    ) -> Tensor:  # fmt: skip
        """o [B, Hq, Sq, Dv] for q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv]; see `planned_attention`."""
        bias = self.bias(v)
        plan = self.choice.plan(bias, (q.shape[0], q.shape[1], k.shape[1]), q.shape[2], causal=causal)
        return planned_attention(q, k, v, plan, scale, bias=bias, backend=backend)[0]
