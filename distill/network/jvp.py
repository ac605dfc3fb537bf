"""Tangents: how a network's answer changes along a direction, in one forward pass.

Continuous-time methods need dF/ds along a curve (x + s dx, tau + s dtau). `torch.func.jvp` gives it exactly, through
adapters and hooks as well, for every operation but one: fused attention has no forward derivative. While
`jvp_safe_attention` is open, attention is computed by a rule that has one.

With S = q k^T scale + mask and P = softmax(S), the tangent of O = P v is

    tO = (P tS) v + P tv - rowsum(P tS) O,    tS = (tq k^T + q tk^T) scale     (products with P taken entry by entry)

(differentiate the softmax; the memory-saving order of the sums is that of rCM's algorithm 2, arXiv 2510.08431, done here
in query chunks). It needs P for one chunk of queries at a time, so that no L x L buffer is held. On CUDA devices a kernel
computes both in one pass wherever no gradient is recorded (`hasten.sparse_attn.kernels.forward_tangent`).

Shapes: B rows; x [B, ...]; tau float64 [B]; attention q [..., L, d], k [..., S, d], v [..., S, e].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hasten.distill.network import tangent_kernel
from hasten.distill.network.host_call import Condition
from hasten.distill.network.paths import HALF_TURN, spread
from hasten.distill.network.tangent_kernel import Backend
from hasten.errors import ModelError, UsageError

How = Literal["exact"] | Annotated[float, Field(gt=0, le=0.2)]
"""`exact`: `torch.func.jvp`. A number: a difference over so many radians (times dtau) to either side.

The features by which networks hear their time turn by up to 2000 radians per radian of the angle. A difference over 1e-4
sees them and agrees with the exact tangent (as well as float32 can); one over 0.05 averages them out, at the same cost.
That matters for teachers that were never made smooth in time: tiny-image's exact tangent at tau = 1.3 is 3.7 large where the
difference over 0.05 is 1.3, and a straight way would have 1.0 (benchmarks/tangents.py). No step along a trajectory sees such
ripple. sCM and SANA-Sprint retrain the teacher instead.
"""

CHUNK = 512
"""Queries of which scores are held at one time."""

LENGTH = 2048
"""Up to as many queries attention is written out, so that its tangent can itself be differentiated."""

class Velocity(Protocol):
    """A role, guided or not: what gives F."""

    def velocity(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor: ...

    def playing(self) -> AbstractContextManager[None]: ...


def tangent(
    role: Velocity, x: Tensor, tau: Tensor, condition: Condition, dx: Tensor, dtau: Tensor, how: How = "exact",
    end: float = HALF_TURN,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(F, dF): the role's velocity at (x, tau), and its change along (dx, dtau), both [B, ...] without gradient.

    dx [B, ...]: the direction in which x moves; the *teacher's* velocity (times dtau) wherever a loss asks for the
    change along the trajectory. The line from data to noise has another direction as soon as the teacher is guided.
    dtau float64 [B]. end: the largest angle of the role's path. Raises as `along` and `difference` do.
    """

    def velocity(x: Tensor, tau: Tensor) -> Tensor:
        return role.velocity(x, tau, condition)

    with role.playing():  # adapters cannot be switched while torch differentiates
        return along(velocity, x, tau, dx, dtau, how, end)


@torch.no_grad()
def along(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, tau: Tensor, dx: Tensor, dtau: Tensor, how: How = "exact",
    end: float = HALF_TURN,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(value, change) of any function of x and tau; see `tangent`. The role that it calls must be playing already.

    Raises `ModelError` where an operation of the network has no forward derivative.
    """
    tau, dtau = tau.double(), dtau.to(tau.device, torch.float64)
    if how != "exact":
        return difference(function, x, tau, dx, dtau, how, end)
    try:
        with jvp_safe_attention():
            found: Any = torch.func.jvp(function, (x, tau), (dx.to(x.dtype), dtau))
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error) and "jvp" not in str(error):
            raise
        raise ModelError(
            f"The network has an operation without a forward derivative: {str(error).splitlines()[0][:200]} Use tangent ="
            " 0.001 (a difference over so many radians, in float32), or a method without tangents (lcm, pairs)."
        ) from error
    value, change = found
    return value, change


@torch.no_grad()
def difference(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, tau: Tensor, dx: Tensor, dtau: Tensor, step: float,
    end: float = HALF_TURN,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(value, change) from the value and two more points along (dx, dtau): one on either side, and both on the inner
    side for rows that are nearer than `step` to an end of [0, `end`]. Of second order in `step` for either.

    Raises `UsageError` in half precision: there rounding is larger than the difference (measured: 120 % wrong at 1e-3).
    """
    if x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        raise UsageError(
            f"A difference in {kind} is rounding, not a tangent. Use tangent = exact, or precision = 'no' (float32)."
        )
    one, two = _points(tau, dtau, step, end)
    first = function(x, tau)
    if first.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"The network answers in {first.dtype}; a difference needs float32. Use tangent = exact.")
    at_one, at_two = (function(x + spread(s, x) * dx, tau + s * dtau) for s in (one, two))
    # The slope at 0 of the parabola through 0, `one` and `two`.
    weights = -(one + two) / (one * two), two / (one * (two - one)), -one / (two * (two - one))
    terms = (spread(w, first) * value for w, value in zip(weights, (first, at_one, at_two), strict=True))
    return first, sum(terms, torch.zeros_like(first))


def _points(tau: Tensor, dtau: Tensor, step: float, end: float) -> tuple[Tensor, Tensor]:
    """Two places along the direction for each row, float64 [B]: (-step, step), or (s, 2 s) away from a near end."""
    reach, away = step * dtau.abs(), torch.where(dtau < 0, -step, step).double()
    low, high = tau < reach, tau > end - reach
    one = torch.where(low, away, torch.where(high, -away, -step))
    return one, torch.where(low | high, 2 * one, step)


# --- attention -------------------------------------------------------------------------------------


@contextmanager
def jvp_safe_attention(length: int = LENGTH, chunk: int = CHUNK, backend: Backend = "auto") -> Iterator[None]:
    """While open, `scaled_dot_product_attention` in this thread has a forward derivative. Nothing global is switched:
    other threads and networks keep their kernels.

    length: up to so many queries the softmax is written out, and gradients may be taken through tangents; longer ones
    take the chunked rule, `chunk` queries at a time, forward only. backend: whether a kernel computes attention that
    moves, of any length; why it cannot is said once (`tangent_kernel.Backend`).
    """
    with _Attention(length, chunk, backend):
        yield


class _Attention(TorchFunctionMode):
    def __init__(self, length: int, chunk: int, backend: Backend = "auto") -> None:
        super().__init__()
        self.length, self.chunk, self.backend = length, chunk, backend

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Arguments as torch's; [..., L, e]."""
        if dropout_p:
            raise ModelError(f"Attention with dropout {dropout_p:g} has no tangent. Call the network in eval mode.")
        if enable_gqa:
            shared = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(shared, -3), value.repeat_interleave(shared, -3)
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        found, reason = tangent_kernel.attend(query, key, value, attn_mask, is_causal, factor, self.backend)
        if found is not None:
            return found
        if reason is not None:  # Python says the same sentence from the same place once
            warnings.warn(f"hasten: attention takes its tangent without the kernel: {reason}", stacklevel=2)
        mask = _added(attn_mask, is_causal, query, key)
        if query.shape[-2] <= self.length:
            return _softmax(query, key, mask, factor) @ value
        out: Tensor = _Chunked.apply(query, key, value, mask, factor, self.chunk)  # type: ignore[no-untyped-call]
        return out


def _added(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as numbers to be added to scores, [..., L or 1, S]; None for none."""
    if causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, -math.inf)


def _softmax(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """P [..., L, S]. The scores of half-precision inputs are float32, as the fused kernels keep them."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.transpose(-1, -2)).to(wide) * scale
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(query.dtype)


def _chunks(query: Tensor, mask: Tensor | None, chunk: int) -> Iterator[tuple[slice, Tensor | None]]:
    """(queries, their part of the mask), in order."""
    for start in range(0, query.shape[-2], chunk):
        part = slice(start, start + chunk)
        yield part, mask if mask is None or mask.shape[-2] == 1 else mask[..., part, :]


class _Chunked(torch.autograd.Function):
    """Attention in query chunks with its tangent. Forward mode alone: losses hold tangents without gradient."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, chunk: int
    ) -> Tensor:
        parts = [
            _softmax(query[..., part, :], key, some, scale) @ value for part, some in _chunks(query, mask, chunk)
        ]
        return torch.cat(parts, -2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        query, key, value, mask, ctx.scale, ctx.chunk = inputs
        ctx.masked = mask is not None
        ctx.save_for_forward(query, key, value, output, *([mask] if ctx.masked else []))

    @staticmethod
    def jvp(ctx: Any, *changes: Any) -> Tensor:
        query, key, value, output, *rest = ctx.saved_tensors
        mask = rest[0] if ctx.masked else None
        tq, tk, tv, moving = changes[:4]
        found = []
        for part, some in _chunks(query, mask, ctx.chunk):
            weights = _softmax(query[..., part, :], key, some, ctx.scale)
            scores = ctx.scale * _change(query[..., part, :], key, tq if tq is None else tq[..., part, :], tk)
            if moving is not None:
                scores = scores + (moving if moving.shape[-2] == 1 else moving[..., part, :])
            moved = weights * scores
            change = moved @ value - moved.sum(-1, keepdim=True) * output[..., part, :]
            found.append(change if tv is None else change + weights @ tv)
        return torch.cat(found, -2)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise ModelError(
            "Attention in chunks has no backward pass. Take the tangent under torch.no_grad(), or open"
            " jvp_safe_attention with a `length` of at least the number of queries (it then holds all scores)."
        )


def _change(query: Tensor, key: Tensor, tq: Tensor | None, tk: Tensor | None) -> Tensor:
    """tq k^T + q tk^T; either may be still."""
    change = query.new_zeros(()) if tq is None else tq @ key.transpose(-1, -2)
    return change if tk is None else change + query @ tk.transpose(-1, -2)
