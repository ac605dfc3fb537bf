"""The torch executor computes what the map of blocks says, whatever the plan looks like."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.sparse_attn.backends.columns import column_sums
from hasten.sparse_attn.backends.executor import execute, plain_part, softmax_part
from hasten.sparse_attn.backends.jobs import jobs_of
from hasten.sparse_attn.blocks import Blocks, Order, uniform
from hasten.sparse_attn.mask import Mask, causal
from hasten.sparse_attn.merge import merge
from hasten.sparse_attn.pack import pack
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.reference import dense, reference, token_map
from hasten.sparse_attn.stand_ins.compensate import centroids
from tests.sparse_attn.kernel_cases import Case, case

TREE = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)


def run(problem: Case) -> Output:
    return execute(problem.q, *problem.arranged(), problem.plan, problem.scale, problem.compensation)


def agrees(found: Output, truth: Output) -> None:
    """Sums are float32 and rounded once: o is within half a unit of its dtype, the LSE within a few of float32."""
    assert torch.equal(found.lse.isinf(), truth.lse.isinf())
    nothing = truth.lse.isinf()
    assert (found.o[nothing] == 0).all()
    rounding = torch.finfo(found.o.dtype).eps / 2 * truth.o.abs()
    largest = truth.o.abs().max().clamp(min=1)
    assert ((found.o.double() - truth.o).abs() <= rounding + 3e-6 * largest).all()
    for name in ("lse", "lse_exact"):
        x, y = getattr(found, name), getattr(truth, name)
        assert (x is None) == (y is None)
        if x is not None:
            assert torch.equal(x.isinf(), y.isinf())
            x, y = x.double().masked_fill(x.isinf(), 0), y.masked_fill(y.isinf(), 0)
            assert (x - y).abs().max() < 4e-6 * y.abs().max().clamp(1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), batch=st.integers(1, 2), hk=st.integers(1, 2), groups=st.sampled_from([1, 2, 5]),
    tokens=st.tuples(st.integers(1, 90), st.integers(1, 110)), dims=st.sampled_from([(16, 16), (8, 24), (40, 8)]),
    counts=st.tuples(st.integers(2, 6), st.integers(2, 7)), tile=st.sampled_from([(32, 16), (16, 16), (128, 64)]),
    perm=st.sampled_from(["none", "shared", "own"]), shared=st.booleans(), density=st.floats(0, 1),
    masked=st.sampled_from(["none", "causal", "window", "tree"]), compensation=st.integers(0, 2),
)  # fmt: skip
def test_random_plans(
    seed: int, batch: int, hk: int, groups: int, tokens: tuple[int, int], dims: tuple[int, int],
    counts: tuple[int, int], tile: tuple[int, int], perm: str, shared: bool, density: float, masked: str,
    compensation: int,
) -> None:  # fmt: skip
    sq, sk = tokens
    mask = {"none": None, "causal": causal(sq, sk), "window": Mask(5, 3, sk - sq), "tree": None}[masked]
    if masked == "tree" and sk > 3:
        mask = Mask(None, 0, sk - sq, torch.rand(sq, 3, generator=torch.Generator().manual_seed(seed)) < 0.5)
    problem = case(
        seed, batch=batch, heads=(hk * groups, hk), tokens=tokens, dims=dims, counts=counts, tile=tile, perm=perm,
        shared=shared, density=density, mask=mask, compensation=compensation,
    )  # fmt: skip
    agrees(run(problem), problem.truth())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("compensation", [0, 2])
def test_dtypes(dtype: torch.dtype, compensation: int) -> None:
    problem = case(1, heads=(4, 2), dtype=dtype, compensation=compensation)
    found = run(problem)
    assert found.o.dtype == dtype and found.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    agrees(found, problem.truth())


def everything(sq: int, sk: int, hq: int, hk: int, mask: Mask | None = None, block: int = 16) -> tuple[Blocks, Tensor]:
    blocks = Blocks(*(Order(None, uniform(s, block), torch.zeros(-(-s // block), dtype=torch.int8)) for s in (sq, sk)))
    return blocks, torch.ones(1, blocks.q.count, blocks.k.count, dtype=torch.bool)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_causal", [False, True])
def test_density_1_is_dense_attention(dtype: torch.dtype, is_causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 83, 24).to(dtype) for h in (4, 2, 2))
    mask = causal(83, 83) if is_causal else None
    blocks, keep = everything(83, 83, 4, 2)
    found = execute(q, k, v, pack(blocks, keep, (2, 4, 2), mask=mask, block_m=32, block_n=16), 24**-0.5)
    truth = reference(q, k, v, blocks, keep, mask=mask)
    host = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    assert (found.o - truth.o).abs().max() <= 2 * (host - truth.o).abs().max()
    own = dense(q, k, v, mask=mask)
    assert (own.o - truth.o).abs().max() <= 2 * (host - truth.o).abs().max()
    assert (own.lse - truth.lse).abs().max() < 1e-5


def test_rows_that_are_one_range_become_one_call() -> None:
    blocks, keep = everything(64, 96, 3, 3)
    jobs = jobs_of(pack(blocks, keep, (1, 3, 3), block_m=16, block_n=16))
    assert jobs.count.tolist() == [64, 64, 64]
    (batch,) = jobs.batches()
    assert batch.span == (0, 96) and len(batch.jobs) == 3
    keep[0, 2, 1] = False  # one block of queries reads two ranges
    assert len(jobs_of(pack(blocks, keep, (1, 3, 3), block_m=16, block_n=16)).count) == 6


def test_heads_that_share_keys_become_one_job() -> None:
    problem = case(3, heads=(6, 2), shared=True, poison=False)
    assert int(jobs_of(problem.plan).count.max()) > int(problem.plan.tile_length.max())
    agrees(run(problem), problem.truth())


def test_queries_keep_their_places_under_a_permutation() -> None:
    problem = case(4, heads=(2, 2), perm="none", poison=False)
    plain = run(problem)
    order_q, order_k = torch.randperm(70), torch.randperm(90)
    blocks = Blocks(replace(problem.blocks.q, perm=order_q[None]), replace(problem.blocks.k, perm=order_k[None]))
    plan = pack(blocks, problem.keep, (1, 2, 2), block_m=32, block_n=16)
    q = torch.empty_like(problem.q).index_copy_(2, order_q, problem.q)
    found = execute(q, problem.k, problem.v, plan, problem.scale)
    assert torch.equal(found.o[:, :, order_q], plain.o)
    assert torch.equal(found.lse[:, :, order_q], plain.lse)


def test_parts_of_the_keys_merge_to_the_whole() -> None:
    problem = case(5, heads=(4, 2), density=0.8)
    half = torch.rand(problem.keep.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    k, v = problem.arranged()
    parts = []
    for keep in (problem.keep & half, problem.keep & ~half):
        plan = pack(problem.blocks, keep, (1, 4, 2), block_m=32, block_n=16)
        out = execute(problem.q, k, v, plan, problem.scale)
        parts.append((out.o, out.lse))
    o, lse = merge(parts)
    agrees(Output(o, lse), problem.truth())


@pytest.mark.parametrize("second", [False, True])
def test_standing_in_for_everything_is_attention_to_the_means(second: bool) -> None:
    problem = case(6, heads=(2, 2), poison=False)
    k, v = problem.arranged()
    keep = torch.zeros_like(problem.keep)
    plan = pack(problem.blocks, keep, (1, 2, 2), block_m=32, block_n=16)
    tables = centroids(k, v, problem.blocks.k, ~keep.flatten(0, 1), second_order=second)
    found = execute(problem.q, k, v, plan, problem.scale, tables)
    logits = problem.q[0] @ tables.keys.mT * problem.scale + tables.log_sizes[:, None]
    if second:
        logits = logits + problem.q[0].square() @ tables.variances.mT * problem.scale**2 / 2
    assert torch.allclose(found.o[0], logits.softmax(-1) @ tables.values, atol=2e-6)
    assert torch.allclose(found.lse[0], logits.logsumexp(-1), atol=4e-6)
    assert (found.lse_exact == -math.inf).all() and (found.rho == 0).all()


def test_standing_in_for_nothing_changes_nothing() -> None:
    problem = case(7, heads=(2, 1), compensation=1, poison=False)
    assert problem.compensation is not None
    tables = replace(problem.compensation, approximate=torch.zeros_like(problem.compensation.approximate))
    k, v = problem.arranged()
    found = execute(problem.q, k, v, problem.plan, problem.scale, tables)
    without = execute(problem.q, k, v, problem.plan, problem.scale)
    assert torch.equal(found.o, without.o) and torch.equal(found.lse, without.lse)
    assert torch.equal(found.lse_exact, without.lse)
    assert torch.equal(found.rho, without.rho)


def test_room_that_a_plan_did_not_need_is_skipped() -> None:
    problem = case(8)
    plan = problem.plan
    room = torch.full((3,), -(2**31), dtype=torch.int32)
    zero = torch.zeros(3, dtype=torch.int32)
    wider = replace(
        plan, tile_start=torch.cat([plan.tile_start, zero]), tile_length=torch.cat([plan.tile_length, zero]),
        tile_plane=torch.cat([plan.tile_plane, zero]), tile_row=torch.cat([plan.tile_row, zero]),
        row_start=plan.row_start + 3, row_full=plan.row_full + 3, row_end=plan.row_end + 3,
        chunk_start=torch.cat([room, plan.chunk_start, room]), chunk_length=torch.cat([room, plan.chunk_length, room]),
    )  # fmt: skip
    agrees(execute(problem.q, *problem.arranged(), wider, problem.scale), problem.truth())


def test_plain_products_agree_with_the_fused_kernel() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 9, 8), torch.randn(3, 700, 8), torch.randn(3, 700, 8)
    bias = torch.zeros(3, 1, 700).masked_fill(torch.rand(3, 1, 700) < 0.5, -math.inf)
    bias[1] = -math.inf
    for some in (bias, None):
        for x, y in zip(softmax_part(q, k, v, some, 0.3), plain_part(q, k, v, some, 0.3), strict=True):
            assert torch.allclose(x, y, atol=2e-6)


@pytest.mark.parametrize("perm", ["none", "own"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_column_sums(perm: str, is_causal: bool) -> None:
    mask = causal(70, 90) if is_causal else None
    problem = case(9, batch=2, heads=(4, 2), perm=perm, mask=mask)
    out = run(problem)
    k, _ = problem.arranged()
    found = column_sums(problem.q, k, out.lse, problem.plan, problem.scale)
    pairs = token_map(problem.blocks, problem.keep, 8, 2)
    if mask is not None:
        pairs &= mask.allowed(torch.arange(70), torch.arange(90), 90)
    logits = problem.q.double() @ problem.k.double().repeat_interleave(2, 1).mT * problem.scale
    shares = logits.masked_fill(~pairs.view(2, 4, 70, 90), -math.inf).softmax(-1).nan_to_num(0)
    assert found.shape == (2, 2, 90) and found.dtype == torch.float32
    assert torch.allclose(found.double(), shares.view(2, 2, 2, 70, 90).sum((2, 3)), atol=1e-5)
    assert torch.allclose(found.sum(), out.lse.isfinite().sum().float())


def in_blocks(keep: Tensor, planes: int, mask: Mask | None = None) -> tuple[Blocks, Case]:
    """A problem of blocks of 8 tokens and head dimension 4, `keep` [planes, Cq, Ck]."""
    torch.manual_seed(0)
    sides = [Order(None, uniform(8 * count, 8), torch.zeros(count, dtype=torch.int8)) for count in keep.shape[1:]]
    blocks = Blocks(sides[0], sides[1])
    q, k, v = (torch.randn(1, planes, 8 * count, 4) for count in (keep.shape[1], keep.shape[2], keep.shape[2]))
    plan = pack(blocks, keep, (1, planes, planes), block_m=8, block_n=8, mask=mask)
    return blocks, Case(q, k, v, blocks, keep, plan, mask)


def test_rows_of_one_range_whose_stand_ins_differ_stay_apart() -> None:
    keep = torch.tensor([[[1, 0, 0], [1, 0, 0]]], dtype=torch.bool)
    blocks, problem = in_blocks(keep, 1)
    stands = torch.tensor([[0, 1, 0], [0, 0, 1]], dtype=torch.bool)
    problem = replace(problem, compensation=centroids(problem.k, problem.v, blocks.k, stands))
    agrees(run(problem), problem.truth())


def test_a_range_that_not_all_planes_read() -> None:
    keep = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0]], dtype=torch.bool)[:, None]
    _, problem = in_blocks(keep, 3)
    agrees(run(problem), problem.truth())


@pytest.mark.parametrize(("sq", "sk"), [(0, 5), (5, 0), (1, 1), (40, 1)])
def test_sequences_of_no_token_and_of_one(sq: int, sk: int) -> None:
    blocks, keep = everything(sq, sk, 2, 1)
    plan = pack(blocks, keep, (1, 2, 1))
    q, k, v = torch.randn(1, 2, sq, 8), torch.randn(1, 1, sk, 8), torch.randn(1, 1, sk, 4)
    found = execute(q, k, v, plan, 0.3)
    assert found.o.shape == (1, 2, sq, 4)
    assert torch.equal(found.o, v[:, :, :1].expand(1, 2, sq, 4)) if sk == 1 else found.o.abs().sum() == 0
    assert column_sums(q, k, found.lse, plan, 0.3).shape == (1, 1, sk)


def test_means_that_nobody_asks_for_may_be_anything() -> None:
    problem = case(10, compensation=2)
    poisoned = problem.tables()
    assert poisoned is not None and poisoned.keys.isnan().any()
    agrees(execute(problem.q, *problem.arranged(), problem.plan, problem.scale, poisoned), problem.truth())


def test_a_job_without_full_chunks_beside_one_with_some() -> None:
    # Plane 0 reads two blocks that are full under the mask and the one that the diagonal cuts, plane 1 only the latter.
    keep = torch.tensor([[1, 1, 1], [0, 0, 1]], dtype=torch.bool)[:, None]
    _, problem = in_blocks(keep, 2, Mask(None, 0, 16))
    agrees(run(problem), problem.truth())
    k, v = problem.k.clone(), problem.v.clone()
    k[:, 0], v[:, 1, :16] = math.nan, math.nan
    found = execute(problem.q, k, v, problem.plan, problem.scale)
    assert torch.allclose(found.o[:, 1].double(), problem.truth().o[:, 1], atol=1e-6), "one plane spoils another"


@pytest.mark.parametrize("mask", [None, causal(70, 90)])
@pytest.mark.parametrize("compensation", [0, 2])
def test_without_the_fused_kernel(monkeypatch: pytest.MonkeyPatch, mask: Mask | None, compensation: int) -> None:
    """As on devices that are not CPUs."""
    monkeypatch.setattr("hasten.sparse_attn.backends.executor.softmax_part", plain_part)
    problem = case(11, batch=2, heads=(4, 2), mask=mask, compensation=compensation)
    agrees(run(problem), problem.truth())
