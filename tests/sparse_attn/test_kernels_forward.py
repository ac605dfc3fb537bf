"""The sparse forward kernel and its column sums against float64, within twice the error of the torch executor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from hasten.errors import UsageError
from hasten.sparse_attn.backends import columns as twin_columns
from hasten.sparse_attn.kernels import config, launch
from hasten.sparse_attn.kernels.columns import column_sums
from hasten.sparse_attn.kernels.forward import forward
from hasten.sparse_attn.mask import Mask, causal
from hasten.sparse_attn.plan import Output
from tests.sparse_attn.kernel_cases import Case, agree, case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(problem: Case) -> Output:
    k, v = problem.arranged()
    return forward(problem.q, k, v, problem.plan, problem.scale, problem.tables())


def draft(queries: int, keys: int) -> Mask:
    """A draft tree over the last keys, causal before them."""
    tree = torch.rand(queries, min(keys, 9), generator=torch.Generator().manual_seed(3)) < 0.5
    return Mask(None, 0, keys - queries, tree)


MASKS = {
    "none": None,
    "causal": causal(70, 90),
    "window": Mask(left=20, right=7, offset=5),
    "left only": Mask(left=11, right=None),
    "tree": draft(70, 90),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("perm", ["none", "shared", "own"])
def test_orders_and_dtypes(dtype: torch.dtype, perm: str) -> None:
    problem = case(1, batch=2, heads=(2, 1), perm=perm, dtype=dtype)
    agree(run(problem), problem)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("perm", ["none", "own"])
def test_masks_speak_of_original_positions(name: str, perm: str) -> None:
    problem = case(2, perm=perm, mask=MASKS[name], density=0.7)
    agree(run(problem), problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [1, 2])
def test_compensation(order: int, dtype: torch.dtype) -> None:
    problem = case(3, heads=(4, 2), compensation=order, density=0.3, dtype=dtype, counts=(5, 19))
    agree(run(problem), problem)


@pytest.mark.parametrize("order", [1, 2])
def test_compensation_beside_a_mask(order: int) -> None:
    problem = case(4, compensation=order, mask=causal(70, 90), density=0.3, perm="none", counts=(9, 12))
    agree(run(problem), problem)


def test_compensation_of_everything_and_of_nothing() -> None:
    for density in (0.0, 1.0):
        problem = case(5, compensation=1, density=density)
        agree(run(problem), problem)


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (5, 1), (4, 2)])
def test_grouped_queries(heads: tuple[int, int]) -> None:
    problem = case(6, batch=2, heads=heads, tokens=(33, 47))
    agree(run(problem), problem)


@pytest.mark.parametrize("compensation", [0, 2])
@pytest.mark.parametrize("dims", [(40, 40), (80, 24), (24, 96), (1, 3)])
def test_head_dimensions_are_padded(dims: tuple[int, int], compensation: int) -> None:
    problem = case(7, tokens=(20, 50), dims=dims, heads=(1, 1), compensation=compensation)
    agree(run(problem), problem)


@pytest.mark.parametrize("compensation", [0, 1])
def test_rows_shared_by_planes(compensation: int) -> None:
    problem = case(8, batch=2, heads=(4, 2), shared=True, compensation=compensation, perm="shared")
    assert problem.plan.row_start.numel() == 4
    agree(run(problem), problem)


def test_tiles_of_more_queries_than_a_program_holds() -> None:
    problem = case(9, tokens=(150, 60), tile=(256, 32), counts=(2, 4), heads=(1, 1))
    agree(run(problem), problem)


def test_chunks_that_are_no_power_of_two() -> None:
    problem = case(10, tile=(20, 24))
    agree(run(problem), problem)


@pytest.mark.parametrize("name", ["none", "tree"])
@pytest.mark.parametrize("block_n", [64, 100])
def test_long_chunks_are_read_in_parts(block_n: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = draft(20, 250) if name == "tree" else None
    problem = case(23, tokens=(20, 250), heads=(1, 1), tile=(32, block_n), counts=(2, 4), density=0.9, mask=mask)
    arguments = launched(monkeypatch)
    agree(run(problem), problem)
    assert arguments[0]["PARTS"] > 1
    k, _ = problem.arranged()
    lse = problem.truth().lse.float()
    found = column_sums(problem.q, k, lse, problem.plan, problem.scale)
    assert arguments[1]["PARTS"] > 1
    assert found.sum().item() == pytest.approx(lse.isfinite().sum().item(), rel=1e-4)


def test_wide_heads() -> None:
    problem = case(24, tokens=(20, 70), heads=(1, 1), dims=(160, 136), tile=(128, 64), compensation=2)
    agree(run(replace(problem, scale=0.05)), replace(problem, scale=0.05))


def test_only_full_chunks() -> None:
    problem = case(11, heads=(1, 1), tokens=(64, 64), counts=(1, 1), poison=False, perm="none")
    plan = problem.plan
    assert torch.equal(plan.row_full, plan.row_end) and plan.chunk_start.numel() == 4
    agree(run(problem), problem)


def test_everything_read_is_dense_attention() -> None:
    problem = case(12, density=1.0, poison=False, counts=(1, 7), perm="own")
    dense = F.scaled_dot_product_attention(problem.q, problem.k, problem.v, scale=problem.scale, enable_gqa=True)
    torch.testing.assert_close(run(case(12, density=1.1, poison=False, counts=(1, 7))).o, dense, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dims", [(16, 16), (24, 40)])
def test_full_chunks_through_the_copy_engine(dims: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case(21, batch=2, heads=(4, 2), dims=dims, density=0.8, counts=(3, 3))
    plain = run(problem)
    table = config.forward_config
    monkeypatch.setattr(config, "forward_config", lambda *args, **more: replace(table(*args, **more), tma=True))
    arguments = launched(monkeypatch)
    found = run(problem)
    assert arguments[0]["k_view"] is not None and arguments[0]["v_view"] is not None
    agree(found, problem)
    torch.testing.assert_close(found.o, plain.o, rtol=0, atol=1e-6)


def test_the_copy_engine_is_not_asked_for_odd_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case(22, dims=(3, 16))
    table = config.forward_config
    monkeypatch.setattr(config, "forward_config", lambda *args, **more: replace(table(*args, **more), tma=True))
    arguments = launched(monkeypatch)
    agree(run(problem), problem)
    assert arguments[0]["k_view"] is None and arguments[0]["v_view"] is None


def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of launches to come."""
    found: list[dict[str, Any]] = []
    go = launch.Launch.run

    def run_and_tell(self: launch.Launch, beside: Tensor) -> None:
        found.append(self.arguments)
        go(self, beside)

    monkeypatch.setattr(launch.Launch, "run", run_and_tell)
    return found


def test_rows_without_chunks_give_nothing() -> None:
    problem = case(13)
    plan = replace(problem.plan, row_full=problem.plan.row_start, row_end=problem.plan.row_start)
    k, v = problem.arranged()
    found = forward(problem.q, k, v, plan, problem.scale)
    assert (found.o == 0).all() and (found.lse == -torch.inf).all() and found.lse_exact is None
    assert (found.rho == 0).all()


def test_tiles_without_queries_do_nothing() -> None:
    problem = case(14)
    plan = problem.plan
    spare = replace(
        plan,
        tile_start=torch.cat([plan.tile_start, plan.tile_start.new_tensor([0])]),
        tile_length=torch.cat([plan.tile_length, plan.tile_length.new_tensor([0])]),
        tile_plane=torch.cat([plan.tile_plane, plan.tile_plane.new_tensor([0])]),
        tile_row=torch.cat([plan.tile_row, plan.tile_row.new_tensor([0])]),
    )
    agree(run(replace(problem, plan=spare)), problem)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_any_scale(scale: float) -> None:
    problem = replace(case(15, compensation=2), scale=scale)
    agree(run(problem), problem)


def test_tensors_with_strides() -> None:
    problem = case(16, perm="none", batch=2, heads=(2, 2))
    k, v = problem.arranged()
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (problem.q, k, v)]
    found = forward(apart[0], apart[1], apart[2], problem.plan, problem.scale)
    agree(found, problem)
    rows_last = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (problem.q, k, v)]
    again = forward(rows_last[0], rows_last[1], rows_last[2], problem.plan, problem.scale)
    assert torch.equal(found.o, again.o)


def test_large_logits_do_not_overflow() -> None:
    problem = replace(case(17, compensation=1), scale=40.0)
    agree(run(problem), problem)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_plan(data: st.DataObject) -> None:
    whole = st.integers(1, 60)
    heads = data.draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (5, 1)]))
    tokens = data.draw(st.tuples(whole, whole))
    problem = case(
        data.draw(st.integers(0, 10**6)),
        heads=heads,
        tokens=tokens,
        dims=data.draw(st.tuples(st.integers(1, 33), st.integers(1, 33))),
        counts=data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9))),
        tile=data.draw(st.sampled_from([(16, 16), (32, 16), (48, 32)])),
        perm=data.draw(st.sampled_from(["none", "shared", "own"])),
        shared=data.draw(st.booleans()),
        density=data.draw(st.floats(0, 1)),
        mask=data.draw(st.sampled_from([None, causal(*tokens), Mask(left=3, right=9), draft(*tokens)])),
        compensation=data.draw(st.integers(0, 2)),
    )
    agree(run(problem), problem)


@pytest.mark.parametrize("name", ["none", "causal", "tree"])
@pytest.mark.parametrize("perm", ["none", "own"])
def test_column_sums(name: str, perm: str) -> None:
    problem = case(18, batch=2, heads=(4, 2), perm=perm, mask=MASKS[name])
    k, _ = problem.arranged()
    lse = problem.truth().lse.float()
    found = column_sums(problem.q, k, lse, problem.plan, problem.scale)
    wanted = twin_columns.column_sums(problem.q, k.nan_to_num(), lse, problem.plan, problem.scale)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert found.sum().item() == pytest.approx(lse.isfinite().sum().item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_column_sums_of_short_floats(dtype: torch.dtype) -> None:
    problem = case(19, dtype=dtype, dims=(40, 16))
    k, _ = problem.arranged()
    lse = problem.truth().lse.float()
    found = column_sums(problem.q, k, lse, problem.plan, problem.scale)
    wanted = twin_columns.column_sums(problem.q, k.nan_to_num(), lse, problem.plan, problem.scale)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


def test_columns_of_queries_that_count_nothing() -> None:
    problem = case(25)
    k, _ = problem.arranged()
    lse = problem.truth().lse.float()
    lse[..., ::3] = -torch.inf
    found = column_sums(problem.q, k, lse, problem.plan, problem.scale)
    wanted = twin_columns.column_sums(problem.q, k.nan_to_num(), lse, problem.plan, problem.scale)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    problem = case(20)
    k, v = problem.arranged()
    q, plan = problem.q, problem.plan
    with pytest.raises(UsageError, match="the plan was made for"):
        forward(q[:, :, 1:], k, v, plan, 1.0)
    with pytest.raises(UsageError, match="head dimension 8"):
        forward(q[..., :8], k, v, plan, 1.0)
    with pytest.raises(UsageError, match="cast them to one dtype"):
        forward(q, k.half(), v, plan, 1.0)
    with pytest.raises(UsageError, match="float64"):
        forward(q.double(), k.double(), v.double(), plan, 1.0)
    with pytest.raises(UsageError, match="1 to 256"):
        forward(q, k, torch.zeros(1, 1, 90, 300), plan, 1.0)
    with pytest.raises(UsageError, match="chunks of 512 keys"):
        forward(q, k, v, replace(plan, block_n=512), 1.0)
    with pytest.raises(UsageError, match="on cpu, got meta"):
        forward(q.to("meta"), k.to("meta"), v.to("meta"), plan, 1.0)
