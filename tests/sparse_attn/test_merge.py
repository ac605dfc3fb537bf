"""Parts of attention, merged by their LSE, are attention over all of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.merge import merge, merge_rows

NAN = float("nan")


def part(logits: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(o, lse) of a softmax over these logits [..., S], with o poisoned where nothing may be read."""
    lse = logits.logsumexp(-1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], -math.inf)
    o = (logits - lse[..., None]).exp() @ v
    return o.masked_fill((lse == -math.inf)[..., None], NAN), lse


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=5), queries=st.integers(1, 5), seed=st.integers(0, 2**20))
def test_any_partition_gives_the_whole(sizes: list[int], queries: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = 20 * torch.randn(2, queries, sum(sizes), generator=draw, dtype=torch.float64)
    logits[0, 0] = -math.inf  # this query reads nothing at all
    logits = logits.masked_fill(torch.rand(logits.shape, generator=draw) < 0.3, -math.inf)
    v = torch.randn(2, sum(sizes), 3, generator=draw, dtype=torch.float64)
    o, lse = merge([part(*both) for both in zip(logits.split(sizes, -1), v.split(sizes, 1), strict=True)])
    whole, total = part(logits, v)
    nothing = total == -math.inf
    assert nothing[0, 0] and (o[nothing] == 0).all()
    torch.testing.assert_close(o[~nothing], whole[~nothing], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, total, rtol=1e-12, atol=1e-12)


def test_far_apart_parts_neither_overflow_nor_vanish() -> None:
    o = [torch.full((1, 2), value) for value in (1.0, 2.0, 3.0)]
    lse = [torch.tensor([value]) for value in (-2e4, 5e4, 5e4)]
    merged, total = merge(list(zip(o, lse, strict=True)))
    torch.testing.assert_close(merged, torch.full((1, 2), 2.5))
    torch.testing.assert_close(total, torch.tensor([5e4 + math.log(2)]))


def test_half_precision_parts_are_added_in_float32() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, v = torch.randn(1, 4, 64, generator=draw), torch.randn(1, 64, 8, generator=draw)
    parts = [part(*both) for both in zip(logits.split(1, -1), v.split(1, 1), strict=True)]
    o, lse = merge([(o.bfloat16(), lse) for o, lse in parts])
    assert o.dtype == torch.bfloat16 and lse.dtype == torch.float32
    whole, _ = part(logits, v)
    # Each part is rounded once, the sum once: 2^-9 each, of values up to the largest v.
    assert (o.float() - whole).abs().max() < 2**-8 * v.abs().max()


def test_gradients_reach_all_parts() -> None:
    draw = torch.Generator().manual_seed(0)
    o = torch.randn(3, 2, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    lse = torch.randn(3, 2, generator=draw, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda o, lse: merge(list(zip(o, lse, strict=True))), (o, lse))
    row = torch.tensor([0, 0, 2])
    assert torch.autograd.gradcheck(lambda o, lse: merge_rows(o, lse, row, 3)[0], (o, lse))


def test_gradients_stay_finite_where_nothing_was_read() -> None:
    o = torch.zeros(2, 1, 4, requires_grad=True)
    lse = torch.full((2, 1), -math.inf, requires_grad=True)
    merged, _ = merge(list(zip(o, lse, strict=True)))
    merged.sum().backward()
    assert torch.isfinite(o.grad).all() and torch.isfinite(lse.grad).all()  # type: ignore[arg-type]


def test_rows_without_pieces_are_empty() -> None:
    o, lse = merge_rows(torch.full((2, 1, 3), NAN), torch.full((2, 1), -math.inf), torch.tensor([1, 1]), 3)
    assert (o == 0).all() and (lse == -math.inf).all()


def test_mistakes_say_what_fits() -> None:
    with pytest.raises(UsageError, match="no parts"):
        merge([])
    with pytest.raises(UsageError, match="part 1"):
        merge([(torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(2, 4), torch.zeros(2))])
