"""Attention with its tangent in one pass, in Triton's interpreter: against its twin, the rule in chunks of
`distill/network/jvp.py`, and against float64.

Shapes: B, H, L, S, D, Dv as in the kernel's file.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

pytest.importorskip("triton")

from hasten.distill.network.jvp import jvp_safe_attention
from hasten.errors import ModelError, RefusedError, UsageError
from hasten.sparse_attn.kernels import forward_tangent as kernels
from hasten.sparse_attn.kernels.forward_tangent import Moved, forward_tangent

Shape = tuple[int, int, int, int, int, int]
SCALE = 0.3
SMALL: Shape = (1, 2, 19, 23, 8, 5)


def given(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """q, k, v and their tangents."""
    b, h, length, keys, d, dv = shape
    g = torch.Generator().manual_seed(seed)
    shapes = [(b, h, length, d), (b, h, keys, d), (b, h, keys, dv)]
    return [torch.randn(shape, generator=g).to(dtype) for shape in (*shapes, *shapes)]


def rule(x: list[Tensor], **how: Any) -> tuple[Tensor, Tensor]:
    """(o, tangent) by the rule in chunks."""

    def attend(*qkv: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(*qkv, scale=SCALE, **how)

    with torch.no_grad(), jvp_safe_attention(length=0, chunk=16, backend="torch"):
        found: tuple[Tensor, Tensor] = torch.func.jvp(attend, tuple(x[:3]), tuple(x[3:]))
    return found


def poisoned(x: list[Tensor], *, mask: Tensor | None = None, causal: bool = False) -> Moved:
    """As `forward_tangent`, into memory that was full of NaN."""
    upcast = x[0].dtype == torch.bfloat16
    found, job = kernels.prepare(*x, SCALE, 0, mask=mask, causal=causal, upcast=upcast)
    for out in found:
        out.fill_(math.nan)
    job.run(x[0])
    return Moved(found.o.to(x[0].dtype), found.tangent.to(x[0].dtype), found.lse)


def agree(x: list[Tensor], *, mask: Tensor | None = None, causal: bool = False) -> None:
    """Within twice the twin's own error of float64, in the same dtype, or the rounding of one operation."""
    wide = [t.double() for t in x]
    wide_mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    truth = rule(wide, attn_mask=wide_mask, is_causal=causal)
    twin, found = rule(x, attn_mask=mask, is_causal=causal), poisoned(x, mask=mask, causal=causal)
    for ours, theirs, exact in zip((found.o, found.tangent), twin, truth, strict=True):
        assert ours.dtype == x[0].dtype and ours.shape == exact.shape
        own, size = float((theirs - exact).abs().max()), float(exact.abs().max())
        error = float((ours - exact).abs().max())  # a NaN that was left fails, too
        assert error <= 2 * own + 4 * torch.finfo(ours.dtype).eps * size, f"error {error:.2e}, the twin's {own:.2e}"
    torch.testing.assert_close(found.lse.double(), lse(wide, wide_mask, causal), rtol=1e-5, atol=1e-5)


def lse(x: list[Tensor], mask: Tensor | None, causal: bool) -> Tensor:
    """Logarithms of the denominators, in float64."""
    scores = x[0] @ x[1].mT * SCALE
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.logsumexp(-1)


CASES: dict[str, tuple[Shape, torch.dtype, str]] = {
    "one of everything": ((1, 1, 1, 1, 1, 1), torch.float32, "plain"),
    "odd": ((2, 3, 19, 37, 17, 5), torch.float32, "plain"),
    "wide": ((1, 1, 33, 65, 128, 128), torch.float32, "plain"),
    "keys": ((1, 2, 21, 70, 16, 16), torch.float32, "keys"),
    "bias": ((2, 2, 21, 34, 40, 40), torch.float32, "bias"),
    "causal": ((1, 2, 50, 50, 33, 33), torch.float32, "causal"),
    "causal, more keys": ((1, 1, 20, 70, 16, 16), torch.float32, "causal"),
    "causal, fewer keys": ((1, 1, 70, 20, 16, 16), torch.float32, "causal"),
    "bfloat16": ((1, 2, 65, 131, 64, 64), torch.bfloat16, "plain"),
    "bfloat16 causal": ((1, 1, 130, 130, 24, 24), torch.bfloat16, "causal"),
    "float16": ((1, 1, 31, 45, 80, 80), torch.float16, "keys"),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_tangent_are_those_of_the_twin(name: str) -> None:
    shape, dtype, kind = CASES[name]
    masks = {"keys": torch.arange(shape[3]).reshape(1, 1, 1, -1) % 3 > 0}
    masks["bias"] = torch.linspace(-2, 2, shape[2] * shape[3]).reshape(shape[2], shape[3]).to(dtype)
    agree(given(shape, dtype), mask=masks.get(kind), causal=kind == "causal")


@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 2)])
def test_what_does_not_move_need_not_be_given(moving: tuple[int, ...]) -> None:
    x = given(SMALL)
    some = [t if i in moving else None for i, t in enumerate(x[3:])]
    zeros = [torch.zeros_like(t) if i is None else i for i, t in zip(some, x[3:], strict=True)]
    one, two = forward_tangent(*x[:3], *some, SCALE), forward_tangent(*x[:3], *zeros, SCALE)
    torch.testing.assert_close(one.tangent, two.tangent, rtol=1e-5, atol=1e-6)
    assert one.tangent.abs().max() > 0.01


def test_the_tangent_is_linear_and_zero_for_zero() -> None:
    x, y = given(SMALL), given(SMALL, seed=1)
    (tq, tk, tv), others = x[3:], y[3:]
    still = [torch.zeros_like(t) for t in x[3:]]
    assert not forward_tangent(*x[:3], *still, SCALE).tangent.any()
    both = [2 * a - 3 * b for a, b in zip((tq, tk, tv), others, strict=True)]
    one, two, three = (forward_tangent(*x[:3], *t, SCALE).tangent for t in (x[3:], others, both))
    torch.testing.assert_close(three, 2 * one - 3 * two, rtol=1e-4, atol=1e-5)


def test_the_tangent_is_the_slope() -> None:
    """Against differences in float64, of what no rule computed."""
    x = given(SMALL)
    wide = [t.double() for t in x]

    def at(h: float) -> Tensor:
        q, k, v = (a + h * b for a, b in zip(wide[:3], wide[3:], strict=True))
        return (q @ k.mT * SCALE).softmax(-1) @ v

    slope = (8 * (at(1e-3) - at(-1e-3)) - (at(2e-3) - at(-2e-3))) / 12e-3
    torch.testing.assert_close(rule(wide)[1], slope, rtol=0, atol=1e-9)
    torch.testing.assert_close(forward_tangent(*x, SCALE).tangent.double(), slope, rtol=0, atol=2e-5)


def test_steps_of_any_size_and_keys_that_nobody_may_read() -> None:
    x = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in given((2, 3, 19, 37, 8, 8))]
    agree([*x[:4], x[4][:1, :1].expand_as(x[4]), x[5]])
    wanted, low = forward_tangent(*x, SCALE), torch.finfo(torch.float32).min
    mask = torch.zeros(19, 37).masked_fill(torch.arange(37) > 30, low)
    same = forward_tangent(*x, SCALE, mask=mask > low)
    torch.testing.assert_close(forward_tangent(*x, SCALE, mask=mask).tangent, same.tangent)
    assert not torch.allclose(wanted.tangent, same.tangent)
    alike = torch.full((19, 37), low)  # all keys alike, not none
    for ours, theirs in zip(poisoned(x, mask=alike)[:2], rule(x, attn_mask=alike), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    nothing = forward_tangent(*x, SCALE, mask=torch.zeros(1, 1, 19, 37, dtype=torch.bool))
    assert not nothing.o.any() and not nothing.tangent.any() and nothing.lse.isneginf().all()


REFUSED: dict[str, tuple[Callable[[list[Tensor]], list[Tensor]], str]] = {
    "dimension": (lambda x: [torch.zeros(1, 1, 3, 130)] * 6, "head dimension 130.*1 to 128"),
    "dtypes": (lambda x: [*x[:3], x[3].half(), *x[4:]], "tq is torch.float16 and q torch.float32"),
    "float64": (lambda x: [t.double() for t in x], "float64; kernels take"),
    "tangent": (lambda x: [*x[:4], x[4][:, :, 1:], x[5]], r"tk is \(1, 2, 22, 8\).*\(1, 2, 23, 8\)"),
    "three axes": (lambda x: [t[0] for t in x], "batch, heads, tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused(name: str) -> None:
    change, words = REFUSED[name]
    with pytest.raises(UsageError, match=words):
        forward_tangent(*change(given(SMALL)), SCALE)


# --- as torch differentiates --------------------------------------------------------------------------


def attend(*qkv: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(*qkv, scale=SCALE)


def test_torch_takes_value_and_tangent_from_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    x, passes, plain = given(SMALL), 0, kernels.prepare

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal passes
        passes += 1
        return plain(*args, **more)

    monkeypatch.setattr(kernels, "prepare", counted)
    with torch.no_grad(), jvp_safe_attention(backend="triton"):
        value, change = torch.func.jvp(lambda q, k, v: 2 * attend(3 * q, k, v), tuple(x[:3]), tuple(x[3:]))
        assert passes == 1
        _, by_value = torch.func.jvp(lambda v: attend(x[0], x[1], v), (x[2],), (x[5],))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(attend(forward_ad.make_dual(x[0], x[3]), *x[1:3]))
        assert passes == 3
        attend(*x[:3])
        assert passes == 3, "nothing moved"
    tripled = [3 * x[0], *x[1:3], 3 * x[3], *x[4:]]
    for ours, theirs in zip((value, change), rule(tripled), strict=True):
        torch.testing.assert_close(ours, 2 * theirs, rtol=1e-4, atol=1e-5)
    still = [torch.zeros_like(t) for t in x]
    torch.testing.assert_close(by_value, rule([*x[:3], *still[3:5], x[5]])[1], rtol=1e-4, atol=1e-5)
    assert dual.tangent is not None
    torch.testing.assert_close(dual.tangent, rule([*x[:4], *still[4:]])[1], rtol=1e-4, atol=1e-5)


def test_a_refused_call_says_why_and_takes_the_rule() -> None:
    x = [t.double() for t in given(SMALL)]
    with torch.no_grad(), jvp_safe_attention(backend="triton"), pytest.raises(RefusedError, match=r"float64.*torch"):
        torch.func.jvp(attend, tuple(x[:3]), tuple(x[3:]))
    with torch.no_grad(), warnings.catch_warnings(), jvp_safe_attention():  # a CPU has nothing to say
        warnings.simplefilter("error")
        torch.testing.assert_close(torch.func.jvp(attend, tuple(x[:3]), tuple(x[3:]))[1], rule(x)[1])


def test_a_mask_that_moves_and_gradients_are_left_to_the_rules() -> None:
    x, mask = given(SMALL), torch.linspace(-1, 1, 19 * 23).reshape(19, 23)

    def masked(mask: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(*x[:2], x[5] + mask.sum(), attn_mask=mask)

    with torch.no_grad(), jvp_safe_attention(backend="triton"), pytest.raises(RefusedError, match="mask moves"):
        torch.func.jvp(masked, (mask,), (mask,))
    with jvp_safe_attention(backend="triton"), pytest.raises(RefusedError, match="gradients are recorded"):
        torch.func.jvp(attend, tuple(x[:3]), tuple(x[3:]))


def test_a_tangent_of_a_tangent_is_refused() -> None:
    q, k, v, tq, *_ = given(SMALL)

    def slope(q: Tensor) -> Tensor:
        found: Tensor = torch.func.jvp(lambda q: attend(q, k, v), (q,), (tq,))[1]
        return found

    with torch.no_grad(), jvp_safe_attention(backend="triton"), pytest.raises(ModelError, match='second.*"torch"'):
        torch.func.jvp(slope, (q,), (tq,))
