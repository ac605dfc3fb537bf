"""Views for the tests of scorers, and the truth about them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hasten.sparse_attn.blocks import Blocks
from hasten.sparse_attn.layouts.layout import Identity, Layout
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.scorers.scorer import View
from hasten.sparse_attn.segments import Segment, Tokens, plain, video
from tests.sparse_attn.random_blocks import normal

GRID = (3, 5, 7)


def tokens_of(*extra: Segment) -> Tokens:
    return Tokens((video(*GRID), *extra))


def view_of(
    seed: int, tokens: Tokens, *, heads: tuple[int, int, int] = (2, 4, 2), layout: Layout | None = None,
    mask: Mask | None = None, sharp: float = 1.0, dtype: torch.dtype = torch.float32,
) -> View:  # fmt: skip
    b, hq, hk = heads
    q = (normal(seed, b, hq, tokens.length, 24) * sharp).to(dtype)
    k, v = (normal(seed + at, b, hk, tokens.length, 24).to(dtype) for at in (1, 2))
    blocks = (layout or Identity(block=16)).start().blocks(q, k, tokens, tokens)
    return View(
        blocks.q.arrange(q), blocks.k.arrange(k), blocks, tokens, tokens, 24**-0.5, mask, blocks.k.arrange(v)
    )


def true_mass(view: View) -> Tensor:
    """float64 [P, Cq, Ck]: softmax over all keys that may be read, pair by pair, then means and sums over blocks."""
    b, hq, sq, _ = view.q.shape
    k = view.k.repeat_interleave(view.groups, 1).double()
    logits = (view.q.double() @ k.mT * view.scale).flatten(0, 1)
    found = torch.zeros(b * hq, view.blocks.q.count, view.blocks.k.count, dtype=torch.float64)
    for plane in range(b * hq):
        q_block, k_block = labels(view.blocks, plane, view.groups)
        if view.mask is not None:
            allowed = view.mask.allowed(torch.arange(sq), torch.arange(k.shape[2]), k.shape[2])
            logits[plane] = logits[plane].masked_fill(~allowed, -math.inf)
        logits[plane] = logits[plane].masked_fill(view.blocks.k.roles[k_block] == 2, -math.inf)
        shares = logits[plane].softmax(-1)
        for i in range(found.shape[1]):
            for j in range(found.shape[2]):
                if (q_block == i).any():
                    found[plane, i, j] = shares[q_block == i][:, k_block == j].sum(-1).mean()
    return found


def labels(blocks: Blocks, plane: int, groups: int) -> tuple[Tensor, Tensor]:
    q, k = blocks.q.labels(), blocks.k.labels()
    return q[plane % q.shape[0]], k[plane // groups % k.shape[0]]


def clustered(seed: int) -> View:
    """Keys in Gaussian clusters of unlike width, one per block; queries of a block nearly alike."""
    q = normal(seed, 1, 1, 8, 1, 24).expand(-1, -1, -1, 16, -1) + 0.05 * normal(seed + 1, 1, 1, 8, 16, 24)
    width = torch.linspace(0.0, 1.5, 8)[:, None, None]
    k = 0.5 * normal(seed + 2, 1, 1, 8, 1, 24) + width * normal(seed + 3, 1, 1, 8, 256, 24)
    q, k = q.flatten(2, 3), k.flatten(2, 3)
    blocks = Blocks(*(Identity(block=size).start().blocks(x, x, plain(x.shape[2]), plain(x.shape[2])).q
                      for x, size in ((q, 16), (k, 256))))  # fmt: skip
    return View(q, k, blocks, plain(q.shape[2]), plain(k.shape[2]), 24**-0.5)
