"""Tokens put into the order of a layout, and back: rows of two tensors gathered in one launch.

Shapes: B batch, H heads, P = B * H planes, S tokens, D, Dv head dimensions. Inputs may be strided (diffusers hands over
transposed views), so no contiguous copy is made first; outputs are contiguous. Values are copied, never computed with.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.kernels import launch


@triton.jit
def _copy(x, out, plane, heads, x_b, x_h, x_s, n, take, put, real,
          D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """out[put] = x[take] for rows of one plane."""
    on_d = tl.arange(0, BLOCK_D)
    held = real[:, None] & (on_d < D)[None, :]
    at = x + (plane // heads) * x_b + (plane % heads) * x_h + take[:, None] * x_s + on_d[None, :]
    tl.store(out + (plane * n + put)[:, None] * D + on_d[None, :], tl.load(at, mask=held), mask=held)


@triton.jit(do_not_specialize=["n", "perm_plane"])
def _permute(
    x, y, x_out, y_out, perm, n, perm_plane, x_b, x_h, x_s, y_b, y_h, y_s,
    HEADS: tl.constexpr, DX: tl.constexpr, DY: tl.constexpr, BLOCK_DX: tl.constexpr, BLOCK_DY: tl.constexpr,
    BLOCK_N: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """BACK: row i goes to perm[i] (`restore`); else row perm[i] goes to i."""
    plane = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = row < n
    other = tl.load(perm + plane * perm_plane + row, mask=real, other=0).to(tl.int64)
    row = row.to(tl.int64)
    if BACK:
        take, put = row, other
    else:
        take, put = other, row
    _copy(x, x_out, plane, HEADS, x_b, x_h, x_s, n, take, put, real, DX, BLOCK_DX)
    if y is not None:
        _copy(y, y_out, plane, HEADS, y_b, y_h, y_s, n, take, put, real, DY, BLOCK_DY)


def arrange(k: Tensor, v: Tensor, perm: Tensor) -> tuple[Tensor, Tensor]:
    """k [B, H, S, D] and v [B, H, S, Dv] in the order of perm (int64 [1 or P, S]): `Order.arrange` of both at once.

    Raises `UsageError` for shapes that do not fit and tensors that are not on the kernel's device.
    """
    if v.shape[:3] != k.shape[:3]:
        raise UsageError(f"k is {tuple(k.shape)}, v {tuple(v.shape)}; they have to agree but for the last dimension.")
    first, second = _launch(k, v, perm, back=False)
    assert second is not None
    return first, second


def restore(x: Tensor, perm: Tensor) -> Tensor:
    """x [B, H, S, D], which stands in the order of perm, in its original order: `Order.restore`."""
    return _launch(x, None, perm, back=True)[0]


def _launch(x: Tensor, y: Tensor | None, perm: Tensor, back: bool) -> tuple[Tensor, Tensor | None]:
    b, h, s, _ = x.shape
    if perm.shape[1] != s or perm.shape[0] not in (1, b * h):
        raise UsageError(f"perm is {tuple(perm.shape)}; for {tuple(x.shape)} it is [1, {s}] or [{b * h}, {s}].")
    launch.check(_permute, x=x, y=y, perm=perm)
    x_out, y_out, job = prepare(launch.rows(x), None if y is None else launch.rows(y), perm, back=back)
    if s and b * h:
        job.run(x)
    return x_out, y_out


def prepare(x: Tensor, y: Tensor | None, perm: Tensor, *, back: bool) -> tuple[Tensor, Tensor | None, launch.Launch]:
    """The launch of `arrange` or, with `back`, of `restore`, and the tensors that it fills."""
    b, h, s, d = x.shape
    x_out = torch.empty(b, h, s, d, dtype=x.dtype, device=x.device)
    y_out = None if y is None else torch.empty(y.shape, dtype=y.dtype, device=y.device)
    dy = 1 if y is None else y.shape[-1]
    block = max(1, 4096 // launch.power(max(d, dy)))
    arguments = {
        "x": x, "y": y, "x_out": x_out, "y_out": y_out, "perm": perm.contiguous(), "n": s,
        "perm_plane": s if perm.shape[0] > 1 else 0, "HEADS": h, "DX": d, "DY": dy, "BLOCK_DX": launch.power(d, 1),
        "BLOCK_DY": launch.power(dy, 1), "BLOCK_N": block, "BACK": back,
    }  # fmt: skip
    arguments |= {f"x_{axis}": x.stride(i) for i, axis in enumerate("bhs")}
    arguments |= {f"y_{axis}": 0 if y is None else y.stride(i) for i, axis in enumerate("bhs")}
    return x_out, y_out, launch.Launch(_permute, (triton.cdiv(s, block), b * h), arguments, 4, 1)
