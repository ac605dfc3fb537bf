"""Linear attention in blocks: states of blocks of keys, their running sum, and outputs.

Shapes: B batch, Hq, Hk heads, P = B * H planes, S tokens, F features (the head dimension, or as many as random features
there are), Dv value dimension, N pieces of the keys. A state is sum phi(k) v^T [F, Dv] with sum phi(k) [F].

Lightning Attention-2 (arXiv 2401.04658, section 3.2) splits causal linear attention into what lies within a block, as
ordinary masked products, and what lies before it, as a product with the running state. What differs: it walks along
the sequence with the state in shared memory, one program per head; here blocks are done side by side and a small kernel
adds their states up, which fills a device with few heads too. All products are float32 (TF32 for 16-bit inputs): states
are sums over the whole sequence, and the kernels wait for memory, not for products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.kernels import launch

BLOCK = 64
"""Tokens of one step; half as many where more than 128 features would not fit into registers."""

PIECE = 256
"""Tokens of a piece where attention is causal, a multiple of `BLOCK`: each has a state of F * Dv numbers in memory, and
costs its queries masked products with the keys of their own piece."""
PIECES = 32
"""Pieces per plane of keys where attention is not causal."""

WIDTH = 1024
"""Numbers of a state that one program adds up."""

FEATURES = {"none": 0, "relu": 1, "elu": 2}
MAX_DIM = 256


@triton.jit
def _phi(x, FEATURE: tl.constexpr):
    """Feature map in float32: 0 is the identity, 1 relu, 2 elu + 1."""
    x = x.to(tl.float32)
    if FEATURE == 1:
        x = tl.maximum(x, 0.0)
    if FEATURE == 2:
        x = tl.where(x > 0, x + 1.0, tl.exp2(tl.minimum(x, 0.0) * 1.4426950408889634))
    return x


@triton.jit
def _rows(x, plane, token, real, x_b, x_h, x_s, at, F: tl.constexpr, HEADS: tl.constexpr):
    """[tokens, columns `at`] of one plane of [B, H, S, F], 0 behind the end."""
    base = x + plane // HEADS * x_b + plane % HEADS * x_h
    return tl.load(base + token.to(tl.int64)[:, None] * x_s + at[None, :],
                   mask=real[:, None] & (at < F)[None, :], other=0.0)  # fmt: skip


@triton.jit(do_not_specialize=["n", "piece", "pieces"])
def _states(
    k, v, log_decay, state, norm, n, piece, pieces, k_b, k_h, k_s, v_b, v_h, v_s,
    HK: tl.constexpr, F: tl.constexpr, DV: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, FEATURE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """state[plane, piece] = sum over its tokens of phi(k) v^T, each times decay ** (tokens behind it in the piece)."""
    number, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    on_f = tl.arange(0, BLOCK_F)
    on_dv = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_F, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_F], tl.float32)
    end = (number + 1) * piece
    rate = 0.0
    if log_decay is not None:
        rate = tl.load(log_decay + plane % HK)
    for first in tl.range(number * piece, tl.minimum(end, n), BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        real = token < tl.minimum(end, n)
        y = _phi(_rows(k, plane, token, real, k_b, k_h, k_s, on_f, F, HK), FEATURE)
        y = tl.where(real[:, None] & (on_f < F)[None, :], y, 0.0)  # elu + 1 of nothing is 1
        if log_decay is not None:
            away = tl.where(real, end - 1 - token, 0).to(tl.float32)
            y = y * tl.exp2(away * rate)[:, None]
        z = _rows(v, plane, token, real, v_b, v_h, v_s, on_dv, DV, HK).to(tl.float32)
        acc = tl.dot(tl.trans(y), z, acc, input_precision=PRECISION)
        total += tl.sum(y, 0)
    base = plane * pieces + number
    held = (on_f < F)[:, None] & (on_dv < DV)[None, :]
    tl.store(state + (base * F + on_f)[:, None] * DV + on_dv[None, :], acc, mask=held)
    if tl.program_id(2) == 0:
        tl.store(norm + base * F + on_f, total, mask=on_f < F)


@triton.jit(do_not_specialize=["pieces", "piece", "width"])
def _add_up(
    state, log_decay, pieces, piece, width, HK: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr
):  # fmt: skip
    """In place: into each piece the sum of those before it, older ones decayed; else into the first the sum of all."""
    plane = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = at < width
    factor = 1.0
    if log_decay is not None:
        factor = tl.exp2(piece * tl.load(log_decay + plane % HK))
    total = tl.zeros([BLOCK], tl.float32)
    for number in tl.range(0, pieces):
        place = state + (plane * pieces + number) * width + at
        own = tl.load(place, mask=held, other=0.0)
        if CAUSAL:
            tl.store(place, total, mask=held)
        total = total * factor + own
    if not CAUSAL:
        tl.store(state + plane * pieces * width + at, total, mask=held)


@triton.jit(do_not_specialize=["n", "piece", "pieces"])
def _outputs(
    q, k, v, log_decay, state, norm, top, bottom, n, piece, pieces, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    HQ: tl.constexpr, GROUPS: tl.constexpr, F: tl.constexpr, DV: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    FEATURE: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """top = phi(q) state, bottom = phi(q).norm; with CAUSAL the state before the piece, and what lies within it."""
    number, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    HK: tl.constexpr = HQ // GROUPS
    key_plane = plane // HQ * HK + plane % HQ // GROUPS
    on_f, on_n = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_N)
    on_dv = tl.program_id(2) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    token = number * BLOCK_N + on_n
    real, real_f = token < n, on_f < F
    x = _phi(_rows(q, plane, token, real, q_b, q_h, q_s, on_f, F, HQ), FEATURE)
    x = tl.where(real_f[None, :], x, 0.0)
    begin = number * BLOCK_N // piece * piece
    base = key_plane * pieces + (begin // piece if CAUSAL else 0)
    held = real_f[:, None] & (on_dv < DV)[None, :]
    h = tl.load(state + (base * F + on_f)[:, None] * DV + on_dv[None, :], mask=held, other=0.0)
    z = tl.load(norm + base * F + on_f, mask=real_f, other=0.0)
    over = tl.dot(x, h, input_precision=PRECISION)
    under = tl.sum(x * z[None, :], 1)
    if CAUSAL:
        rate = 0.0
        if log_decay is not None:
            rate = tl.load(log_decay + key_plane % HK)
            age = tl.exp2((token - begin + 1).to(tl.float32) * rate)
            over, under = over * age[:, None], under * age
        for first in tl.range(begin, (number + 1) * BLOCK_N, BLOCK_N):
            other = first + on_n
            y = _phi(_rows(k, key_plane, other, other < n, k_b, k_h, k_s, on_f, F, HK), FEATURE)
            y = tl.where(real_f[None, :], y, 0.0)
            w = _rows(v, key_plane, other, other < n, v_b, v_h, v_s, on_dv, DV, HK).to(tl.float32)
            s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
            distance = token[:, None] - other[None, :]
            if log_decay is not None:
                s = s * tl.exp2(tl.maximum(distance, 0).to(tl.float32) * rate)
            s = tl.where(distance >= 0, s, 0.0)
            over = tl.dot(s, w, over, input_precision=PRECISION)
            under += tl.sum(s, 1)
    at = plane * n + token
    tl.store(top + at[:, None] * DV + on_dv[None, :], over, mask=real[:, None] & (on_dv < DV)[None, :])
    if tl.program_id(2) == 0:
        tl.store(bottom + at, under, mask=real)


KERNEL = _outputs


def linear(
    q: Tensor, k: Tensor, v: Tensor, feature: str, *, causal: bool = False, decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Numerator float32 [B, Hq, Sq, Dv] and denominator [B, Hq, Sq] of linear attention.

    q [B, Hq, Sq, F], k [B, Hk, Sk, F], v [B, Hk, Sk, Dv] of one dtype. feature: "relu", "elu" (elu + 1), or "none"
    where q and k are features already. causal: query i reads keys up to i, Sq = Sk. decay: [Hk] in (0, 1], with causal.
    Raises `UsageError` for shapes that do not fit. The torch twin is `hasten.sparse_attn.stand_ins.linear`.
    """
    launch.same_dtype(q=q, k=k, v=v)
    launch.check(_outputs, q=q, k=k, v=v, decay=decay)
    if max(q.shape[3], v.shape[3]) > MAX_DIM or q.shape[1] % k.shape[1]:
        raise UsageError(f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; up to {MAX_DIM} features.")
    (top, bottom), jobs = prepare(q, k, v, feature, causal=causal, decay=decay)
    for job in jobs:
        if all(job.grid):
            job.run(q)
    return top, bottom


def prepare(
    q: Tensor, k: Tensor, v: Tensor, feature: str, *, causal: bool, decay: Tensor | None
) -> tuple[tuple[Tensor, Tensor], list[launch.Launch]]:
    """The launches of `linear` in order, and the numerator and denominator that they fill."""
    q, k, v = launch.rows(q), launch.rows(k), launch.rows(v)
    (b, hq, n, f), (hk, keys, dv) = q.shape, (k.shape[1], k.shape[2], v.shape[3])
    device = q.device
    # Without a causal mask one state per plane is wanted; several pieces a plane keep a device busy, then add up.
    piece = PIECE if causal else max(BLOCK, triton.cdiv(keys, PIECES * BLOCK) * BLOCK)
    pieces = max(1, triton.cdiv(keys, piece))
    state = torch.empty(b * hk, pieces, f * dv, device=device)
    norm = torch.empty(b * hk, pieces, f, device=device)
    top, bottom = torch.empty(b, hq, n, dv, device=device), torch.empty(b, hq, n, device=device)
    block_n, block_dv = BLOCK if launch.power(f) <= 128 else BLOCK // 2, min(64, launch.power(dv))
    log_decay = None if decay is None else decay.float().log2().contiguous()
    common: dict[str, Any] = {
        "log_decay": log_decay, "F": f, "DV": dv, "BLOCK_F": launch.power(f), "BLOCK_DV": block_dv, "BLOCK_N": block_n,
        "FEATURE": FEATURES[feature], "PRECISION": launch.precision(q.dtype), "pieces": pieces,
    }  # fmt: skip
    strides = {f"{name}_{a}": x.stride(i) for name, x in (("q", q), ("k", k), ("v", v)) for i, a in enumerate("bhs")}
    of_keys = {name: value for name, value in strides.items() if name[0] != "q"}
    slices, warps = triton.cdiv(dv, block_dv), 8 if launch.power(f) > 64 else 4
    states = common | of_keys | {"k": k, "v": v, "state": state, "norm": norm, "n": keys, "piece": piece, "HK": hk}
    jobs = [launch.Launch(_states, (pieces, b * hk, slices), states, warps, 1)]
    for x in (state, norm):
        found = {"state": x, "log_decay": log_decay, "pieces": pieces, "piece": piece, "width": x.shape[2], "HK": hk}
        grid = (triton.cdiv(x.shape[2], WIDTH), b * hk)
        jobs.append(launch.Launch(_add_up, grid, found | {"BLOCK": WIDTH, "CAUSAL": causal}, 4, 1))
    outputs = common | strides | {"q": q, "k": k, "v": v, "state": state, "norm": norm, "top": top, "bottom": bottom}
    outputs |= {"n": n, "piece": piece, "HQ": hq, "GROUPS": hq // hk, "CAUSAL": causal}
    jobs.append(launch.Launch(_outputs, (triton.cdiv(n, block_n), b * hq, slices), outputs, warps, 1))
    return (top, bottom), jobs

