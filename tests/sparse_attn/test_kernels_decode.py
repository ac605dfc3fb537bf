"""Decoding and merging kernels against their torch twins and float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from hasten.errors import UsageError
from hasten.sparse_attn.kernels.decode import decode, merge
from hasten.sparse_attn.mask import Mask, causal
from hasten.sparse_attn.merge import merge as twin_merge
from hasten.sparse_attn.text import decode as twin
from tests.sparse_attn.kernel_cases import deviation

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """What is not written is NaN: PyTorch fills new memory with it while it has to be deterministic."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def tensors(
    seed: int, heads: tuple[int, int], new: int, places: int, dims: tuple[int, int], batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    (hq, hk), (d, dv) = heads, dims
    shapes = ((hq, new, d), (hk, places, d), (hk, places, dv))
    q, k, v = (torch.randn(batch, *shape, generator=g).to(dtype) for shape in shapes)
    return q, k, v


def chosen(seed: int, rows: int, places: int, pieces: int, block: int = 32) -> twin.Work:
    """Work over random blocks of the cache; the second row reads nothing."""
    g = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, places + 1, (rows, 6), generator=g).sort(1).values
    bounds = torch.cat([torch.zeros(rows, 1), cuts, torch.full((rows, 1), places)], 1).int()
    keep = torch.rand(rows, 7, generator=g) < 0.6
    keep[1 % rows] = rows == 1
    return twin.select(keep, bounds, pieces, block)


def agree(q: Tensor, k: Tensor, v: Tensor, work: twin.Work, mask: Mask | None = None, scale: float = 0.3) -> None:
    """The kernel is within twice the twin's own error of float64, or within the rounding of a few operations."""
    found = decode(q, k, v, work, scale=scale, mask=mask)
    truth = twin.decode(q.double(), k.double(), v.double(), work, scale=scale, mask=mask, backend="torch")
    own = twin.decode(q, k, v, work, scale=scale, mask=mask, backend="torch")
    assert found.o.dtype == q.dtype and found.o.shape == truth.o.shape and not found.o.isnan().any()
    assert torch.equal(found.lse.isinf(), truth.lse.isinf()) and not found.lse.isnan().any()
    for name in ("o", "lse"):
        x, y, z = getattr(found, name), getattr(own, name), getattr(truth, name).double()
        error, limit = deviation(x, z), 2 * deviation(y, z) + 4 * torch.finfo(x.dtype).eps
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e}"
    assert (found.o[truth.lse.isinf()] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pieces", [1, 3, 8, 40])
def test_any_number_of_pieces(pieces: int, dtype: torch.dtype) -> None:
    q, k, v = tensors(1, (10, 2), 1, 200, (32, 32), dtype=dtype)
    agree(q, k, v, chosen(1, 4, 200, pieces))


@pytest.mark.parametrize("heads", [(1, 1), (6, 6), (6, 2), (20, 1)])
@pytest.mark.parametrize("new", [1, 3])
def test_queries_of_a_key_head_are_one_tile(heads: tuple[int, int], new: int) -> None:
    q, k, v = tensors(2, heads, new, 130, (40, 24))
    agree(q, k, v, chosen(2, 2 * heads[1], 130, 5))


def test_more_queries_than_a_program_holds() -> None:
    q, k, v = tensors(3, (8, 1), 17, 64, (16, 16), batch=1)
    agree(q, k, v, chosen(3, 1, 64, 3), causal(17, 64))


@pytest.mark.parametrize("mask", [causal(4, 90), Mask(left=30, right=0, offset=86), "tree"])
def test_new_queries_among_themselves(mask: Mask | str) -> None:
    q, k, v = tensors(4, (4, 2), 4, 90, (16, 16))
    tree = Mask(None, 0, 86, torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool())
    work = twin.whole(torch.tensor([90, 90]), 2, 90, 5, 32)
    agree(q, k, v, work, tree if isinstance(mask, str) else mask)


def test_ragged_batches_and_what_lies_behind_them() -> None:
    q, k, v = tensors(5, (4, 2), 1, 100, (16, 16), batch=3)
    lengths = torch.tensor([100, 1, 37])
    for sample, length in enumerate(lengths.tolist()):
        k[sample, :, length:] = torch.nan
        v[sample, :, length:] = torch.nan
    agree(q, k.clone(), v.clone(), twin.whole(lengths, 2, 100, 7, 32))


def test_pages() -> None:
    q, k, v = tensors(6, (4, 2), 2, 12 * 10, (16, 16), batch=3)
    table = torch.randperm(12, generator=torch.Generator().manual_seed(6)).view(3, 4)
    work = twin.pages(table, torch.tensor([40, 11, 25]), 2, 10, 6)
    agree(q, k[:1], v[:1], work)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6), heads=st.sampled_from([(1, 1), (4, 2), (5, 1)]), new=st.integers(1, 4),
    places=st.integers(1, 90), dims=st.tuples(st.integers(1, 20), st.integers(1, 20)), pieces=st.integers(1, 9),
)  # fmt: skip
def test_any_work(
    seed: int, heads: tuple[int, int], new: int, places: int, dims: tuple[int, int], pieces: int
) -> None:
    q, k, v = tensors(seed, heads, new, places, dims)
    agree(q, k, v, chosen(seed, 2 * heads[1], places, pieces, 16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_merge(count: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(count)
    shape = (2, 3, 41)
    parts = [
        (torch.randn(*shape, 24, generator=g).to(dtype), torch.randn(*shape, generator=g) * 9) for _ in range(count)
    ]
    for o, lse in parts:
        empty = torch.rand(*shape, generator=g) < 0.4
        o[empty], lse[empty] = torch.nan, -torch.inf
    o, lse = merge(parts)
    exact = [(o.double(), lse.double()) for o, lse in parts]
    truth, truth_lse = twin_merge(exact)
    assert torch.equal(lse.isinf(), truth_lse.isinf()) and not o.isnan().any() and o.dtype == dtype
    assert (o[lse.isinf()] == 0).all()
    own, own_lse = twin_merge(parts)
    assert deviation(o, truth) <= 2 * deviation(own, truth) + 2 * torch.finfo(dtype).eps
    assert deviation(lse, truth_lse) <= 2 * deviation(own_lse, truth_lse) + 4e-7


def test_merging_parts_gives_the_whole() -> None:
    q, k, v = tensors(7, (4, 2), 1, 96, (16, 16))
    whole = decode(q, k, v, twin.whole(torch.tensor([96, 96]), 2, 96, 4, 32), scale=0.3)
    parts = []
    for first, last in ((0, 10), (10, 64), (64, 96)):
        ends = torch.tensor([last, last])
        work = twin.whole(ends, 2, 96, 4, 32, starts=torch.tensor([first, first]))
        part = decode(q, k, v, work, scale=0.3)
        parts.append((part.o, part.lse))
    o, lse = merge(parts)
    torch.testing.assert_close(o, whole.o, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, whole.lse, rtol=0, atol=1e-6)


def test_refusals() -> None:
    o, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    with pytest.raises(UsageError, match="no parts"):
        merge([])
    with pytest.raises(UsageError, match="part 1"):
        merge([(o, lse), (o, lse[:, :2])])
    with pytest.raises(UsageError, match="float64"):
        merge([(o.double(), lse)])
    q, k, v = tensors(8, (2, 1), 1, 30, (16, 16))
    with pytest.raises(UsageError, match="cast them to one dtype"):
        decode(q, k.half(), v, chosen(8, 2, 30, 2), scale=1.0)
