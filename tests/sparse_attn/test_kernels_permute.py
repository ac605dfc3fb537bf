"""Rows put in order and back, bit by bit, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from hasten.errors import UsageError
from hasten.sparse_attn.blocks import Order
from hasten.sparse_attn.kernels import permute


def order(perm: torch.Tensor) -> Order:
    n = perm.shape[1]
    return Order(perm, torch.tensor([[0, n]], dtype=torch.int32), torch.zeros(1, dtype=torch.int8))


@settings(max_examples=10, deadline=None)
@given(
    b=st.integers(1, 2), h=st.integers(1, 3), s=st.integers(1, 90), d=st.sampled_from([1, 5, 16, 40, 128]),
    dv=st.sampled_from([3, 64]), shared=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_agrees_with_the_torch_version(
    b: int, h: int, s: int, d: int, dv: int, shared: bool, dtype: torch.dtype
) -> None:
    k = torch.randn(b, s, h, d).to(dtype).transpose(1, 2)  # strided, as diffusers hands it over
    v = torch.randn(b, h, s, dv).to(dtype)
    perm = torch.stack([torch.randperm(s) for _ in range(1 if shared else b * h)])
    first, second = permute.arrange(k, v, perm)
    assert torch.equal(first, order(perm).arrange(k)) and torch.equal(second, order(perm).arrange(v))
    assert first.is_contiguous() and second.is_contiguous()
    assert torch.equal(permute.restore(first, perm), k) and torch.equal(order(perm).restore(second), v)


def test_nothing_is_computed_with() -> None:
    """NaN, infinities and signed zeros come through, and rows that are not asked for are not looked at."""
    k = torch.tensor([float("nan"), float("inf"), -0.0, 1.0]).view(1, 1, 4, 1)
    perm = torch.tensor([[2, 0, 3, 1]])
    first, _ = permute.arrange(k, k, perm)
    assert torch.equal(first.view(torch.int32), k[:, :, perm[0]].view(torch.int32))


def test_duplicates_are_allowed_when_gathering() -> None:
    x = torch.randn(1, 2, 6, 3)
    perm = torch.tensor([[5, 5, 0, 1, 1, 1]])
    assert torch.equal(permute.arrange(x, x, perm)[0], x[:, :, perm[0]])


def test_refuses_what_does_not_fit() -> None:
    x = torch.zeros(2, 3, 5, 4)
    with pytest.raises(UsageError, match=r"\[1, 5\] or \[6, 5\]"):
        permute.arrange(x, x, torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(UsageError, match="agree"):
        permute.arrange(x, x[:, :, :4], torch.zeros(1, 5, dtype=torch.int64))
    assert permute.restore(x[:, :, :0], torch.zeros(1, 0, dtype=torch.int64)).shape == (2, 3, 0, 4)
