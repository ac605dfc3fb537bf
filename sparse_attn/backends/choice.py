"""Which code runs a plan: Triton, plain torch, xformers or FlexAttention, and why the others do not.

"auto" is Triton on CUDA devices and plain torch elsewhere; the other two are taken when they are asked for by name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from hasten.errors import RefusedError, UsageError, nearest
from hasten.sparse_attn.plan import Compensation, Output, Plan

HALF = (torch.float16, torch.bfloat16)
WIDEST = 256
"""Head dimension that kernels hold in registers at most."""


class Execute(Protocol):
    """What every backend is: q and the output in original order, k and v arranged."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, compensation: Compensation | None = None
    ) -> Output: ...


@dataclass(frozen=True, slots=True)
class Backend:
    """The choice for one kind of call. refused: why backends that would be faster were not taken, one sentence each;
    whoever makes many calls asks once with `choose` and reports them once."""

    name: str
    execute: Execute
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """What a backend is asked about. head_dims: of queries and keys, and of values."""

    device: torch.device
    dtype: torch.dtype
    head_dims: tuple[int, int]
    plan: Plan
    compensated: bool


def choose(
    q: Tensor, v: Tensor, plan: Plan, compensation: Compensation | None = None, backend: str = "auto"
) -> Backend:
    """The backend for calls like this one.

    Raises `UsageError` for an unknown name, `RefusedError` with the reason where the one that was named cannot run.
    "auto" never waits for the device; xformers and FlexAttention have to read the plan to know whether it is theirs.
    """
    call = Call(q.device, q.dtype, (q.shape[-1], v.shape[-1]), plan, compensation is not None)
    if backend == "auto":
        if call.device.type == "cpu":
            return Backend("torch", _load("torch"))
        reason = _triton_refuses(call)
        if reason is None:
            return Backend("triton", _load("triton"))
        return Backend("torch", _load("torch"), (f"Triton kernels cannot run: {reason} Plain torch does, slowly.",))
    if backend not in HOMES:
        allowed = ("auto", *HOMES)
        raise UsageError(f"There is no backend {backend!r}; allowed: {', '.join(allowed)}.{nearest(backend, allowed)}")
    reason = _triton_refuses(call) if backend == "triton" else None
    if backend in ("xformers", "flex"):
        reason = importlib.import_module(f"hasten.sparse_attn.{HOMES[backend]}").refuses(call)
    if reason is not None:
        raise RefusedError(f'backend="{backend}" cannot run this call: {reason} backend="auto" takes one that can.')
    return Backend(backend, _load(backend))


HOMES = {
    "triton": "kernels.forward",
    "torch": "backends.executor",
    "xformers": "backends.xformers",
    "flex": "backends.flex",
}
"""Backend -> the module that has it, imported when it is first used."""


def _load(backend: str) -> Execute:
    module = importlib.import_module(f"hasten.sparse_attn.{HOMES[backend]}")
    return cast(Execute, module.forward if backend == "triton" else module.execute)


@functools.cache
def installed(module: str) -> bool:
    """Whether a third-party module is there, without importing it."""
    return importlib.util.find_spec(module) is not None


def _triton_refuses(call: Call) -> str | None:
    """Why Triton kernels cannot run a call; None where they can."""
    if not installed("triton"):
        return "triton is not installed (pip install triton)."
    if call.dtype not in (*HALF, torch.float32):
        return f"the tensors are {call.dtype}, kernels take float16, bfloat16 and float32."
    if max(call.head_dims) > WIDEST:
        return f"a head dimension is {max(call.head_dims)}, kernels take up to {WIDEST}."
    if call.device.type != "cuda" and not _interpreted():
        return f"the tensors are on {call.device}, kernels run on CUDA devices (or in Triton's interpreter)."
    return None


def _interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels of this process (TRITON_INTERPRET=1 when they were imported)."""
    from hasten.sparse_attn.kernels import forward, launch

    return launch.interpreted(forward._forward)
