"""Mixed spans: what each head of each layer reads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hasten.errors import RecipeError
from hasten.sparse_attn.blocks import Blocks, Order, uniform
from hasten.sparse_attn.mask import causal
from hasten.sparse_attn.scorers.scorer import View
from hasten.sparse_attn.scorers.spans import Depth, Full, Near, Shards, Span, Spans
from hasten.sparse_attn.segments import plain
from hasten.sparse_attn.text.causal import CausalAttention


def order(s: int, block: int) -> Order:
    bounds = uniform(s, block)
    return Order(None, bounds, torch.zeros(bounds.shape[1] - 1, dtype=torch.int8), tokens=s)


def scores(spans: tuple[Span, ...], sq: int, sk: int, block: int, hq: int = 4, hk: int = 2) -> Tensor:
    q, k = torch.zeros(1, hq, sq, 8), torch.zeros(1, hk, sk, 8)
    seen = View(q, k, Blocks(order(sq, block), order(sk, block)), plain(sq), plain(sk), 1.0, causal(sq, sk))
    return Spans(spans=spans).start().scores(seen)


def by_token(reads: Tensor, block: int) -> Tensor:
    """bool [Cq, Ck]: any pair of tokens of a block pair, for reads [Sq, Sk]."""
    sq, sk = (-(-size // block) * block for size in reads.shape)
    whole = torch.zeros(sq, sk, dtype=torch.bool)
    whole[: reads.shape[0], : reads.shape[1]] = reads
    return whole.view(sq // block, block, sk // block, block).any(3).any(1)


@pytest.mark.parametrize(("sq", "sk"), [(37, 37), (11, 37)])
@pytest.mark.parametrize("block", [1, 4, 6])
def test_spans_by_definition(sq: int, sk: int, block: int) -> None:
    spans = (Near(window=9, sinks=3), Shards(count=3, width=4, window=5))
    found = scores(spans, sq, sk, block) > -math.inf
    i, j = torch.arange(sq)[:, None] + sk - sq, torch.arange(sk)[None]
    past = j <= i
    near = ((i - j < 9) & past) | (j < 3)
    shard = ((i - j < 5) & past) | (j // 4 % 3 == 1)
    for head in range(4):
        expected = by_token(near if head < 2 else shard, block)
        assert torch.equal(found[head] & by_token(past, block), expected & by_token(past, block)), head


def test_all_shards_together_are_the_whole_context() -> None:
    found = scores((Shards(count=4, width=8, window=1),), 64, 64, 8, hq=8, hk=4) > -math.inf
    past = torch.ones(8, 8, dtype=torch.bool).tril()
    assert torch.equal(found.view(4, 2, 8, 8)[:, 0].any(0), past)
    assert torch.equal(found.view(4, 2, 8, 8)[:, 0], found.view(4, 2, 8, 8)[:, 1]), "grouped queries share a shard"
    assert (found[:, -1].sum(-1) == 3).sum() >= 2, "each head holds two of eight stretches, and its own"


def test_one_shard_for_all_heads_is_a_stride() -> None:
    found = scores((Shards(count=4, width=8, window=1, heads=1),), 64, 64, 8, hq=4, hk=4) > -math.inf
    assert all(torch.equal(found[0], found[head]) for head in range(4))


def test_a_span_of_all_heads_is_one_plane() -> None:
    assert scores((Full(),), 16, 16, 4).shape == (1, 4, 4) and scores((Full(), Near()), 16, 16, 4).shape == (4, 4, 4)
    assert torch.equal(scores((Full(),), 16, 16, 4)[0] == 0, torch.ones(4, 4, dtype=torch.bool).tril())


def test_depth_is_a_share_of_the_layers() -> None:
    third = CausalAttention(dense=(Depth(begin=1 / 3, end=2 / 3),))
    assert [third.acts_on(layer, 6) for layer in range(6)] == [True, True, False, False, True, True]
    assert [third.acts_on(layer, 4) for layer in range(4)] == [True, False, False, True]
    assert not any(CausalAttention(dense=(Depth(),)).acts_on(layer, 5) for layer in range(5))


def test_no_spans_is_a_mistake() -> None:
    with pytest.raises((RecipeError, ValueError), match="spans"):
        Spans(spans=())
