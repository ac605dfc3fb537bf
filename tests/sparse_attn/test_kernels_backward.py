"""Gradients of the kernels against the torch version, which autograd makes, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hasten.errors import RefusedError, UsageError
from hasten.sparse_attn.autograd import planned_attention
from hasten.sparse_attn.mask import Mask, causal
from hasten.sparse_attn.plan import Compensation
from tests.sparse_attn.kernel_cases import Case, case

NAMES = ("o", "lse", "q", "k", "v", "bias", "keys", "values")


def gradients(problem: Case, dtype: torch.dtype, backend: str, biased: bool, poison: bool = False) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed random function of both outputs."""
    q, k, v = problem.q, problem.k, problem.v
    if poison and problem.poisoned is not None:
        bad = problem.poisoned.view(*k.shape[:3], 1)
        k, v = (x.masked_fill(bad, torch.nan) for x in (k, v))
    inputs: dict[str, Tensor] = {name: x.to(dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    generator = torch.Generator().manual_seed(7)
    if biased:
        inputs["bias"] = torch.randn(k.shape[:3], generator=generator).to(dtype)
    tables: Compensation | None = problem.tables() if poison else problem.compensation
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if tables is not None:
        inputs |= {"keys": tables.keys.to(wide), "values": tables.values.to(wide)}
    inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    if tables is not None:
        tables = replace(tables, keys=inputs["keys"], values=inputs["values"])
    o, lse = planned_attention(
        inputs["q"], inputs["k"], inputs["v"], problem.plan, problem.scale, compensation=tables,
        bias=inputs.get("bias"), backend=backend,
    )  # fmt: skip
    of_o, of_lse = torch.randn(o.shape, generator=generator), torch.randn(lse.shape, generator=generator)
    found = torch.autograd.grad((o, lse), list(inputs.values()), (of_o.to(o), of_lse.to(lse)))
    return {"o": o.detach(), "lse": lse.detach()} | dict(zip(inputs, found, strict=True))


def agree(problem: Case, biased: bool = False) -> None:
    dtype = problem.q.dtype
    exact = gradients(problem, torch.float64, "torch", biased)
    twin = gradients(problem, dtype, "torch", biased)
    found = gradients(problem, dtype, "triton", biased, poison=True)
    for name, wanted in exact.items():
        ours, theirs = found[name], twin[name]
        assert ours.dtype == theirs.dtype and ours.shape == wanted.shape
        assert torch.equal(ours.isinf(), wanted.isinf()), name
        error, own = (deviation(x, wanted) for x in (ours, theirs))
        # Weights and their gradients are rounded to 16 bits before they are multiplied; the twin rounds once.
        limit = 2 * own + 8 * torch.finfo(dtype).eps
        assert error <= limit, f"gradient of {name}: error {error:.1e}, the twin's {own:.1e}"


def deviation(x: Tensor, wanted: Tensor) -> float:
    finite = wanted.isfinite()
    return float((x.double() - wanted)[finite].abs().max() / wanted[finite].abs().max().clamp(min=1))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"heads": (3, 3), "perm": "none", "shared": True, "dims": (24, 8)},
        {"heads": (4, 2), "batch": 2, "tokens": (33, 61), "tile": (16, 16)},
        {"tokens": (40, 40), "mask": causal(40, 40), "perm": "shared"},
        {"tokens": (30, 50), "mask": Mask(12, 5, 20), "perm": "own"},
        {"tokens": (30, 50), "mask": Mask(None, 0, 20, torch.rand(30, 9) < 0.5), "perm": "none"},
        {"tokens": (40, 20), "mask": causal(40, 20), "perm": "shared", "density": 0.8},  # half read nothing
        {"density": 0.0}, {"density": 1.0, "poison": False},
        {"tokens": (150, 40), "tile": (128, 32), "counts": (2, 6)},
    ],
)  # fmt: skip
def test_agrees_with_the_torch_version(how: dict[str, Any]) -> None:
    agree(case(1, **how))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("compensation", [0, 1])
def test_every_dtype_with_a_bias_and_compensation(dtype: torch.dtype, biased: bool, compensation: int) -> None:
    agree(case(2, dtype=dtype, compensation=compensation, dims=(12, 20), tokens=(50, 60)), biased)


def test_queries_that_read_nothing_have_no_gradient() -> None:
    found = gradients(case(3), torch.float32, "triton", False, poison=True)
    nothing = found["lse"].isinf()
    assert nothing.any() and not nothing.all()
    assert (found["q"][nothing] == 0).all() and found["q"][~nothing].abs().amax(-1).min() > 0
    never = case(3).poisoned
    assert never is not None and never.any()
    bad = never.view(found["k"].shape[:3])
    assert (found["k"][bad] == 0).all() and (found["v"][bad] == 0).all()


def test_refuses_what_it_cannot_differentiate() -> None:
    problem = case(4, compensation=2)
    assert problem.compensation is not None
    with pytest.raises(RefusedError, match="variances"):
        planned_attention(problem.q, problem.k, problem.v, problem.plan, compensation=problem.compensation,
        backend="triton")
    with pytest.raises(RefusedError, match="float64"):
        planned_attention(*(x.double() for x in (problem.q, problem.k, problem.v)), problem.plan, backend="triton")
    with pytest.raises(UsageError, match="the plan was made for"):
        planned_attention(problem.q, problem.k[:, :, :5], problem.v, problem.plan)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RefusedError, match="no fixed order"):
            planned_attention(problem.q, problem.k, problem.v, problem.plan, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
