"""What stands in for blocks that are not read: against naive means, and end to end."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hasten.sparse_attn.attention import sparse_attention
from hasten.sparse_attn.blocks import ALWAYS, NEVER, SELECT, SPARSE, Blocks
from hasten.sparse_attn.extent import FULL, block_states
from hasten.sparse_attn.layouts.kmeans import KMeans
from hasten.sparse_attn.layouts.layout import Identity
from hasten.sparse_attn.layouts.tiles import Tiles
from hasten.sparse_attn.mask import causal
from hasten.sparse_attn.measure.synthetic import heads
from hasten.sparse_attn.pack import pack
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.scorers.mass import Oracle
from hasten.sparse_attn.scorers.scorer import View
from hasten.sparse_attn.segments import Tokens, plain, video
from hasten.sparse_attn.selectors.top import TopK
from hasten.sparse_attn.stand_ins.compensate import (
    Compensate,
    approximate_map,
    centroids,
    log_mass,
    query_squares,
)
from hasten.sparse_attn.sums import block_sums, in_segments
from tests.sparse_attn.random_blocks import Case, cases, normal


@given(cases())
@settings(max_examples=40, deadline=None)
def test_tables_are_the_means_of_blocks(case: Case) -> None:
    b, _, hk = case.heads
    order = case.blocks.k
    k, v = normal(case.seed, b, hk, order.length, 5), normal(case.seed + 1, b, hk, order.length, 3)
    found = centroids(k, v, order, torch.zeros(1, order.count, dtype=torch.bool), second_order=True)
    assert found.variances is not None
    labels = order.labels()
    for plane in range(b * hk):
        own = labels[plane % labels.shape[0]]
        for block in range(order.count):
            keys, values = (x.flatten(0, 1)[plane][own == block].double() for x in (k, v))
            if not len(keys) or order.roles[block] != SELECT:
                assert found.log_sizes[plane, block] == -math.inf
                assert not found.keys[plane, block].any() and not found.values[plane, block].any()
                continue
            assert torch.allclose(found.keys[plane, block].double(), keys.mean(0), atol=1e-5)
            assert torch.allclose(found.values[plane, block].double(), values.mean(0), atol=1e-5)
            assert torch.allclose(found.variances[plane, block].double(), keys.var(0, correction=0), atol=1e-5)
            assert float(found.log_sizes[plane, block]) == pytest.approx(math.log(len(keys)), abs=1e-6)


@given(cases())
@settings(max_examples=40, deadline=None)
def test_sums_of_blocks_are_the_same_both_ways_and_in_parts(case: Case) -> None:
    """The way of a GPU, which adds in one order, and the way of a CPU; and parts of the rows add up."""
    order = case.blocks.k
    planes = case.heads[0] * case.heads[2]
    rows = normal(case.seed, planes, order.length, 3)
    whole = block_sums(rows, order.bounds)
    other = in_segments(rows.reshape(-1, 3), order.sizes.expand(planes, -1))
    assert torch.allclose(whole, other, atol=1e-5)
    cut = order.length // 3
    parts = block_sums(rows[:, :cut], order.bounds) + block_sums(rows[:, cut:], order.bounds, cut)
    assert torch.allclose(whole, parts, atol=1e-5)
    there = order.bounds.clamp(cut, order.length).diff(dim=1).expand(planes, -1)
    assert torch.allclose(in_segments(rows[:, cut:].reshape(-1, 3), there), block_sums(rows[:, cut:], order.bounds, cut), atol=1e-5)


def test_long_sequences_are_summed_in_groups_of_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    k, never = normal(0, 2, 3, 50, 5), torch.zeros(1, 4, dtype=torch.bool)
    shared = Identity(block=13).start().blocks(k, k, plain(50), plain(50)).k
    own = replace(shared, bounds=torch.tensor([[0, 3 + p, 20, 30 + p, 50] for p in range(6)], dtype=torch.int32))
    for order in (shared, own):
        whole = centroids(k, k, order, never, second_order=True)
        with monkeypatch.context() as patch:
            patch.setattr("hasten.sparse_attn.sums.HELD", 600)
            parts = centroids(k, k, order, never, second_order=True)
        assert torch.equal(whole.keys, parts.keys)
        assert whole.variances is not None and parts.variances is not None
        assert torch.equal(whole.variances, parts.variances)


def test_variances_of_tight_blocks_keep_their_digits() -> None:
    x = 1000 + 0.01 * normal(0, 1, 1, 64, 4)
    order = Identity(block=16).start().blocks(x, x, plain(64), plain(64)).k
    found = centroids(x, x, order, torch.zeros(1, 4, dtype=torch.bool), second_order=True).variances
    expected = x.double().view(1, 4, 16, 4).var(2, correction=0)
    assert found is not None and torch.allclose(found.double(), expected, rtol=0.05)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_every_block_is_read_stands_in_or_may_not(case: Case) -> None:
    keep = case.blocks.force(case.keep)
    found = approximate_map(case.blocks, keep, groups=case.groups)
    q, k = case.blocks.q.roles[:, None], case.blocks.k.roles[None, :]
    sizes = case.blocks.k.sizes
    sizes = sizes if sizes.shape[0] == 1 else sizes.repeat_interleave(case.groups, 0)
    mayhap = (q == SPARSE) & (k == SELECT) & (sizes > 0)[:, None, :]
    assert torch.equal(found, mayhap & ~keep)
    plan = pack(case.blocks, keep, case.heads, block_m=8, block_n=8)
    assert plan.row_start.numel() == found.shape[0] * found.shape[1], "a row of the map for each row of the plan"


@given(cases())
@settings(max_examples=40, deadline=None)
def test_only_blocks_wholly_in_the_past_stand_in(case: Case) -> None:
    mask = causal(case.blocks.q.length, case.blocks.k.length)
    keep = case.blocks.force(case.keep)
    found = approximate_map(case.blocks, keep, groups=case.groups, mask=mask)
    state = block_states(case.blocks, mask, case.groups)
    assert not (found & (state != FULL)).any()
    assert torch.equal(found, approximate_map(case.blocks, keep, groups=case.groups) & (state == FULL))
    plan = pack(case.blocks, keep, case.heads, block_m=8, block_n=8, mask=mask)
    assert plan.row_start.numel() == found.shape[0] * found.shape[1]


def attended(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, keep: Tensor, order: Any, *, is_causal: bool = False
) -> Output:
    """Sparse attention with compensation of that order (None: without), in original order."""
    heads = (q.shape[0], q.shape[1], k.shape[1])
    mask = causal(q.shape[2], k.shape[2]) if is_causal else None
    plan = pack(blocks, keep, heads, block_m=16, block_n=16, mask=mask)
    ka, va = blocks.k.arrange(k), blocks.k.arrange(v)
    tables = None
    if order is not None:
        stand_in = approximate_map(blocks, keep, groups=heads[1] // heads[2], mask=mask)
        tables = Compensate(order=order).tables(ka, va, blocks.k, stand_in)
    return sparse_attention(q, ka, va, plan, compensation=tables, arranged=True)


def clusters(seed: int, *, width: float, count: int = 8, size: int = 32) -> tuple[Tensor, Tensor, Tensor, Blocks]:
    """q, k, v [1, 2, count * size, 16] with keys in Gaussian clusters, one per block."""
    q = normal(seed, 1, 2, count * size, 16)
    k = normal(seed + 1, 1, 2, count, 1, 16) + width * normal(seed + 2, 1, 2, count, size, 16)
    v = normal(seed + 3, 1, 2, count, 1, 16) + width * normal(seed + 4, 1, 2, count, size, 16)
    k, v = k.flatten(2, 3), v.flatten(2, 3)
    tokens = plain(count * size)
    return q, k, v, Identity(block=size).start().blocks(q, k, tokens, tokens)


def test_with_every_block_left_out_it_is_attention_to_centroids() -> None:
    q, k, v, blocks = clusters(0, width=0.5)
    k, v, blocks = k[:, :, :-5], v[:, :, :-5], replace(blocks, k=Identity(block=32).start().blocks(
        q, k[:, :, :-5], plain(256), plain(251)).k)  # fmt: skip
    out = attended(q, k, v, blocks, torch.zeros(1, 8, 8, dtype=torch.bool), 1)
    means = [torch.stack([x[:, :, at : at + 32].double().mean(2) for at in range(0, 256, 32)], 2) for x in (k, v)]
    sizes = torch.tensor([32.0] * 7 + [27.0], dtype=torch.float64).log()
    logits = q.double() @ means[0].mT / 4 + sizes
    assert torch.allclose(out.o.double(), logits.softmax(-1) @ means[1], atol=1e-5)
    assert torch.allclose(out.lse.double(), logits.logsumexp(-1), atol=1e-5)
    assert (out.rho == 0).all()


def test_with_every_block_read_it_is_attention() -> None:
    q, k, v, blocks = clusters(5, width=0.5)
    out = attended(q, k, v, blocks, torch.ones(1, 8, 8, dtype=torch.bool), 2)
    assert torch.allclose(out.o, scaled_dot_product_attention(q, k, v), atol=1e-5)
    assert torch.allclose(out.rho, torch.ones(1, 2, 256), atol=1e-6)


def test_means_of_equal_keys_are_exact() -> None:
    q, k, v, blocks = clusters(10, width=0.0)
    keep = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    for order in (1, 2):
        out = attended(q, k, v, blocks, keep, order)
        assert torch.allclose(out.o, scaled_dot_product_attention(q, k, v), atol=1e-5)


def test_the_second_order_is_nearer_to_the_truth_on_gaussian_clusters() -> None:
    q, k, v, blocks = clusters(15, width=0.8)
    truth = scaled_dot_product_attention(q, k, v)
    mass = (q.double() @ k.double().mT / 4).view(1, 2, 256, 8, 32).logsumexp(-1)[0]
    never = torch.zeros(1, 8, dtype=torch.bool)
    logs = [
        (log_mass(q[0], centroids(k, v, blocks.k, never, second_order=second), 0.25) - mass).abs().mean()
        for second in (False, True)
    ]
    assert logs[1] < 0.5 * logs[0], "the logarithm of each block's mass"
    keep = torch.eye(8, dtype=torch.bool)[None]
    outputs = [float((attended(q, k, v, blocks, keep, order).o - truth).norm()) for order in (None, 1, 2)]
    assert outputs[2] < outputs[1] < 0.5 * outputs[0]


@pytest.mark.parametrize("groups", [1, 2])
def test_the_second_order_has_a_limit_for_queries_of_usual_size(groups: int) -> None:
    q, k = 3 * normal(0, 1, 2 * groups, 64, 16), normal(1, 1, 2, 4, 32, 16)
    k = (k * torch.tensor([0.05, 0.2, 1.0, 3.0])[:, None, None]).flatten(2, 3)
    order = Identity(block=32).start().blocks(q, k, plain(64), plain(128)).k
    never = torch.zeros(1, 1, 4, dtype=torch.bool)
    squares = query_squares(q, groups, 0.25)
    assert torch.allclose(squares, q.view(2, -1, 16).square().mean(1) / 16)
    free, bound = (Compensate(most=0.5).tables(k, k, order, never, x).variances for x in (None, squares))
    assert free is not None and bound is not None
    added, limited = ((x * squares[:, None]).sum(-1) / 2 for x in (free, bound))
    assert torch.allclose(limited, added.clamp(max=0.5))
    assert (added[:, 3] > 5).all() and torch.equal(free[:, 0], bound[:, 0])


def test_with_its_limit_no_order_is_worse_where_blocks_are_wide() -> None:
    """A head that looks at neighbours, over tiles: the mass of a wide block is due to a few keys, not to their mean."""
    q, k, v = heads((4, 12, 12), 48, ["spatial", "local3d"])
    blocks = Tiles(block=64).start().blocks(q, k, Tokens((video(4, 12, 12),)), Tokens((video(4, 12, 12),)))
    scale = 48**-0.5
    truth, view = scaled_dot_product_attention(q, k, v), [blocks.k.arrange(x) for x in (k, v)]
    keep = block_mass_of(blocks, q, k, scale)
    left = approximate_map(blocks, keep)
    plan = pack(blocks, keep, (1, 2, 2), block_m=64, block_n=16)
    errors = []
    for order, squares in ((1, None), (2, None), (2, query_squares(q, 1, scale))):
        tables = Compensate.model_validate({"order": order}).tables(*view, blocks.k, left, squares)
        out = sparse_attention(q, *view, plan, scale=scale, compensation=tables, arranged=True)
        errors.append(float((out.o - truth).norm() / truth.norm()))
    first, free, bound = errors
    assert free > 1.1 * first, "without a limit"
    assert bound < 1.05 * first


def block_mass_of(blocks: Blocks, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The tenth of the blocks with most mass: bool [Pq, Cq, Ck]."""
    tokens = Tokens((video(4, 12, 12),))
    view = View(blocks.q.arrange(q), blocks.k.arrange(k), blocks, tokens, tokens, scale)
    return TopK(share=0.1).start().keep(Oracle().start().scores(view), blocks)


@pytest.mark.parametrize("seed", [0, 1])
def test_rho_is_the_share_that_was_read(seed: int) -> None:
    q, k, v, _ = clusters(20 + seed, width=0.5)
    layout = KMeans(q_size=32, k_size=16).start()
    blocks = layout.blocks(q, k, plain(256), plain(256))
    keep = torch.rand(2, blocks.q.count, blocks.k.count, generator=torch.Generator().manual_seed(seed)) < 0.2
    exact, first, second = (attended(q, k, v, blocks, keep, order) for order in (None, 1, 2))
    truth = (exact.lse - (q @ k.mT / 4).logsumexp(-1)).exp()
    assert (second.rho - truth).abs().mean() < 0.01
    assert (second.rho - truth).abs().mean() < (first.rho - truth).abs().mean()
    assert (first.rho - truth).mean() > 0, "the first order underrates what is left out"


@pytest.mark.parametrize("order", [None, 1, 2])
def test_nothing_tells_of_the_future(order: Any) -> None:
    q, k, v, blocks = clusters(30, width=0.5)
    keep = torch.eye(8, dtype=torch.bool)[None]
    before = attended(q, k, v, blocks, keep, order, is_causal=True)
    k[:, :, 100:], v[:, :, 100:] = normal(1, 156, 16), normal(2, 156, 16)
    after = attended(q, k, v, blocks, keep, order, is_causal=True)
    assert torch.equal(before.o[:, :, :96], after.o[:, :, :96]), "blocks before the change"
    assert torch.allclose(before.o[:, :, 96:100], after.o[:, :, 96:100], atol=1e-6), "and within its block"
    assert not torch.allclose(before.o[:, :, 128:], after.o[:, :, 128:], atol=1e-2)


def test_with_a_causal_mask_the_past_stands_in() -> None:
    q, k, v, blocks = clusters(35, width=0.0)
    keep = torch.eye(8, dtype=torch.bool)[None]
    out = attended(q, k, v, blocks, keep, 1, is_causal=True)
    assert torch.allclose(out.o, scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5)


def test_padding_that_holds_anything_stands_in_for_nothing() -> None:
    q, k, v, blocks = clusters(40, width=0.5)
    roles = torch.tensor([SELECT] * 6 + [ALWAYS, NEVER], dtype=torch.int8)
    blocks = replace(blocks, k=replace(blocks.k, roles=roles))
    k[:, :, 224:], v[:, :, 224:] = math.nan, math.nan
    keep = blocks.force(torch.eye(8, dtype=torch.bool)[None])
    out = attended(q, k, v, blocks, keep, 2)
    assert out.o.isfinite().all() and out.lse.isfinite().all()
