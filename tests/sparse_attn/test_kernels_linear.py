"""Linear attention kernels against their torch twin and float64, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from hasten.errors import UsageError
from hasten.sparse_attn.kernels import linear as kernels
from hasten.sparse_attn.stand_ins.linear import Sums, linear_attention


def inputs(
    b: int, hq: int, hk: int, sq: int, sk: int, f: int, dv: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sq + sk)
    shapes = ((b, hq, sq, f), (b, hk, sk, f), (b, hk, sk, dv))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def agree(q: Tensor, k: Tensor, v: Tensor, feature: Any, **how: Any) -> None:
    """The kernels' error is at most twice the twin's, against float64, plus what float32 sums may lose."""
    exact = linear_attention(q.double(), k.double(), v.double(), feature, backend="torch", **how)
    twin = linear_attention(q, k, v, feature, backend="torch", **how)
    found = Sums(*kernels.linear(q, k, v, feature, **how))
    for ours, theirs, wanted in (
        (found.numerator, twin.numerator, exact.numerator), (found.denominator, twin.denominator, exact.denominator)
    ):  # fmt: skip
        size = wanted.abs().amax().clamp(min=1)
        assert ours.shape == wanted.shape
        assert (ours - wanted).abs().max() <= 2 * (theirs - wanted).abs().max() + 2e-6 * size


@settings(max_examples=4, deadline=None)
@given(
    sq=st.integers(1, 90), sk=st.integers(1, 150), f=st.sampled_from([5, 16, 40]), dv=st.sampled_from([3, 70]),
    groups=st.sampled_from([1, 3]), feature=st.sampled_from(["relu", "elu", "none"]),
)  # fmt: skip
def test_everything_reads_everything(sq: int, sk: int, f: int, dv: int, groups: int, feature: str) -> None:
    agree(*inputs(2, 2 * groups, 2, sq, sk, f, dv, torch.float32), feature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("decayed", [False, True])
def test_causal_over_several_pieces(dtype: torch.dtype, decayed: bool) -> None:
    decay = torch.tensor([0.97, 1.0]) if decayed else None
    agree(*inputs(1, 4, 2, 270, 270, 16, 20, dtype), "elu", causal=True, decay=decay)


@pytest.mark.parametrize("n", [1, 64, 65, 257, 530])
def test_causal_at_the_edges_of_pieces(n: int) -> None:
    agree(*inputs(1, 1, 1, n, n, 16, 16, torch.float32), "relu", causal=True, decay=torch.tensor([0.9]))


def test_the_future_is_not_read() -> None:
    q, k, v = inputs(1, 2, 2, 270, 270, 16, 16, torch.float32)
    before = kernels.linear(q, k, v, "elu", causal=True)[0]
    k[:, :, 150:], v[:, :, 150:] = 7.0, -9.0
    after = kernels.linear(q, k, v, "elu", causal=True)[0]
    assert torch.equal(before[:, :, :150], after[:, :, :150]) and not torch.equal(before, after)


def test_strided_inputs_and_nothing_to_read() -> None:
    q, k, v = inputs(2, 3, 3, 40, 50, 8, 8, torch.float32)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    agree(q, k, v, "relu")
    top, bottom = kernels.linear(q, k[:, :, :0], v[:, :, :0], "elu")
    assert (top == 0).all() and (bottom == 0).all()
    with pytest.raises(UsageError, match="features"):
        kernels.linear(torch.zeros(1, 1, 2, 300), torch.zeros(1, 1, 2, 300), torch.zeros(1, 1, 2, 4), "none")
