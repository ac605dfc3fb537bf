"""Attention with its tangent in one pass on a GPU, where the kernel can: who refuses it, and why.

Torch's rule for an operation is asked for its tangent after its value, and would read keys and values twice. Here both
are taken from the dual numbers that `torch.func.jvp` hands to attention, before torch differentiates anything.

Shapes: q [B, H, L, D], k [B, H, S, D], v [B, H, S, Dv].
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hasten.errors import ModelError, RefusedError, UsageError
from hasten.sparse_attn.backends.choice import installed

Backend = Literal["auto", "triton", "torch"]
"""auto: the kernel on CUDA devices where it can, with a sentence where it cannot; triton: the kernel or an error."""


def refused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    """Why the kernel cannot take a call; None where it can."""
    if not installed("triton"):
        return "triton is not installed (pip install triton)."
    if torch.is_grad_enabled():
        return "gradients are recorded, and the kernel has none. Take tangents under torch.no_grad()."
    if mask is not None and forward_ad.unpack_dual(mask).tangent is not None:  # type: ignore[no-untyped-call]
        return "the mask moves as well, and the kernel takes masks that stand still."
    from hasten.sparse_attn.kernels import forward_tangent, launch

    if query.device.type == "cpu" and not launch.interpreted(forward_tangent.KERNEL):
        return "the tensors are on the CPU, kernels run on CUDA devices (or in Triton's interpreter)."
    try:
        launch.same_dtype(q=query, k=key, v=value)
        launch.check(forward_tangent.KERNEL, q=query, k=key, v=value, mask=mask)
        forward_tangent.check_shapes(query, key, value, None, None, None, mask)
    except UsageError as error:
        return str(error)
    return None


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, backend: Backend
) -> tuple[Tensor | None, str | None]:
    """(output that carries its tangent, None), or (None, why the kernel was not taken); (None, None) where there is
    nothing to say: on a CPU, where nothing moves, and where torch was asked for.

    Raises `RefusedError` where backend="triton" cannot be had.
    """
    if backend == "torch" or (backend == "auto" and query.device.type != "cuda"):
        return None, None
    primals, tangents = zip(*(_parts(x) for x in (query, key, value)), strict=True)
    if all(t is None for t in tangents):
        return None, None
    reason = refused(query, key, value, mask)
    if reason is not None:
        if backend == "triton":
            raise RefusedError(f'The kernel for tangents cannot take this call: {reason} backend="torch" can.')
        return None, reason
    found: Any = _Fused.apply(*primals, *tangents, mask, causal, scale)  # type: ignore[no-untyped-call]
    out: Tensor = forward_ad.make_dual(*found)  # type: ignore[no-untyped-call]
    return out, None


def _parts(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and tangent; torch's own stand-in for a tangent of zeros has no memory that a kernel could read."""
    primal, tangent = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    return primal, None if tangent is None or tangent._is_zerotensor() else tangent


class _Fused(torch.autograd.Function):
    """(o, its tangent). A function of its own only because torch then hands over plain tensors, with memory."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, mask: Tensor | None,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from hasten.sparse_attn.kernels.forward_tangent import forward_tangent

        found = forward_tangent(q, k, v, tq, tk, tv, scale, mask=mask, causal=causal)
        return found.o, found.tangent

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None: ...

    @staticmethod
    def jvp(ctx: Any, *changes: Any) -> Any:
        raise ModelError(
            'The kernel for tangents has no second one. Open jvp_safe_attention with backend="torch" for a tangent of a'
            " tangent."
        )
