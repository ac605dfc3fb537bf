"""The same kernels on a GPU, at sizes at which mistakes of pipelining and of int32 offsets show. `pytest -m gpu`."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass, replace
from typing import TypeVar

import pytest
import torch

pytest.importorskip("triton")

from hasten.sparse_attn.kernels.decode import merge
from hasten.sparse_attn.kernels.forward import forward
from hasten.sparse_attn.kernels.forward_tangent import forward_tangent
from hasten.sparse_attn.mask import Mask, causal
from hasten.sparse_attn.plan import Output
from tests.sparse_attn.kernel_cases import agree, case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
]

T = TypeVar("T")


def moved(x: T, device: str) -> T:
    """A tensor, or a dataclass of tensors, on a device."""
    if isinstance(x, torch.Tensor):
        return x.to(device)  # type: ignore[return-value]
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{field.name: moved(getattr(x, field.name), device) for field in fields(x)})
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("compensation", [0, 1, 2])
def test_forward(dtype: torch.dtype, dim: int, compensation: int) -> None:
    problem = case(
        dim + compensation, batch=2, heads=(4, 2), tokens=(700, 1100), dims=(dim, dim), counts=(9, 30), tile=(128, 64),
        dtype=dtype, compensation=compensation, density=0.4,
    )  # fmt: skip
    problem = replace(problem, scale=dim**-0.5)
    k, v = problem.arranged()
    q, k, v = (x.cuda() for x in (problem.q, k, v))
    found = forward(q, k, v, moved(problem.plan, "cuda"), problem.scale, moved(problem.tables(), "cuda"))
    agree(moved(found, "cpu"), problem)


@pytest.mark.parametrize("mask", [causal(700, 1100), Mask(left=90, right=30)])
def test_masks(mask: Mask) -> None:
    short = torch.bfloat16
    problem = case(1, tokens=(700, 1100), dims=(64, 64), tile=(128, 64), counts=(6, 12), mask=mask, dtype=short)
    k, v = problem.arranged()
    q, k, v = (x.cuda() for x in (problem.q, k, v))
    agree(moved(forward(q, k, v, moved(problem.plan, "cuda"), problem.scale), "cpu"), problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_tangent(dtype: torch.dtype, dim: int, causal: bool) -> None:
    """Against the derivative of a softmax in float64; the twin's error is that of the same softmax in this dtype."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the kernel is tested in the interpreter only")
    g = torch.Generator().manual_seed(dim)
    x = [torch.randn(2, 3, n, dim, generator=g).to(dtype).cuda() for n in (700, 1100, 1100) * 2]

    def slow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.mT) * dim**-0.5
        if causal:
            scores = scores.masked_fill(~torch.ones(700, 1100, dtype=torch.bool, device="cuda").tril(), -torch.inf)
        return scores.softmax(-1) @ v

    found = forward_tangent(*x, dim**-0.5, causal=causal)
    truth = torch.func.jvp(slow, tuple(t.double() for t in x[:3]), tuple(t.double() for t in x[3:]))
    twin = torch.func.jvp(slow, tuple(x[:3]), tuple(x[3:]))
    for ours, theirs, exact in zip(found[:2], twin, truth, strict=True):
        limit = 2 * (theirs - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= limit


def test_merge() -> None:
    problem = case(2, tokens=(300, 200), poison=False, density=1.1, counts=(3, 3), tile=(128, 64))
    q = problem.q.cuda()
    k, v = (x.cuda() for x in problem.arranged())
    whole = forward(q, k, v, moved(problem.plan, "cuda"), problem.scale)
    o, lse = merge([(whole.o, whole.lse), (whole.o, whole.lse)])
    torch.testing.assert_close(o, whole.o)
    torch.testing.assert_close(lse, whole.lse + torch.tensor(2.0).log().cuda())


def test_planes_beyond_32_bits() -> None:
    """Offsets of the last plane do not fit into 32 bits: 17 heads of 1M keys of 128."""
    heads, keys = 17, 2**20
    problem = case(3, heads=(heads, heads), tokens=(64, 64), dims=(128, 128), counts=(1, 1), tile=(64, 64), perm="none",
                   poison=False, dtype=torch.bfloat16)  # fmt: skip
    k = torch.zeros(1, heads, keys, 128, dtype=torch.bfloat16, device="cuda")
    v = torch.zeros_like(k)
    k[:, :, -64:], v[:, :, -64:] = problem.k.cuda(), problem.v.cuda()
    plan = replace(problem.plan, keys=keys, chunk_start=problem.plan.chunk_start + keys - 64)
    found: Output = forward(problem.q.cuda(), k, v, moved(plan, "cuda"), problem.scale)
    agree(moved(found, "cpu"), problem)
