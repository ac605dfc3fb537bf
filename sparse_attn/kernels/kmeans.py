"""K-means on the device: nearest centroid of each token, and the mean of each cluster. Nothing waits for the host.

Shapes: P planes (batch times heads), n tokens, C clusters, D head dimension. Neither n nor C is baked into a kernel, so
another resolution or number of clusters compiles nothing anew. Lloyd's two steps as in SVG2 (arXiv 2505.18875, section
4.1) and Flash-KMeans (arXiv 2603.09229, which has the fused arg min); the differences are named at each function.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.kernels import launch


@triton.jit(do_not_specialize=["n", "count"])
def _assign(
    x, step, norm, labels, n, count,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """labels [n] = arg min over c of norm[c] - 2 x.step[c], for one tile of tokens of one plane."""
    plane = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    on_c, on_d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    real, real_d = token < n, on_d < D
    x_at = x + (plane * n + token)[:, None] * D + on_d[None, :]
    y = tl.load(x_at, mask=real[:, None] & real_d[None, :], other=0.0)
    if UPCAST:
        y = y.to(tl.float32)
    y = tl.where(tl.abs(y) < float("inf"), y, 0.0)
    best = tl.full([BLOCK_N], float("inf"), tl.float32)
    label = tl.zeros([BLOCK_N], tl.int32)
    for first in tl.range(0, count, BLOCK_C):
        c = first + on_c
        e_at = step + (plane * count + c)[None, :] * D + on_d[:, None]
        e = tl.load(e_at, mask=(c < count)[None, :] & real_d[:, None], other=0.0)
        if UPCAST:
            e = e.to(tl.float32)
        size = tl.load(norm + plane * count + c, mask=c < count, other=float("inf"))
        distance = size[None, :] - 2.0 * tl.dot(y, e, input_precision=PRECISION)
        least, at = tl.min(distance, 1, return_indices=True)
        nearer = least < best
        best = tl.where(nearer, least, best)
        label = tl.where(nearer, first + at, label)
    tl.store(labels + plane * n + token, label, mask=real)


@triton.jit(do_not_specialize=["n", "count", "perm_plane", "bounds_plane"])
def _means(
    x, perm, bounds, old, out, n, count, perm_plane, bounds_plane,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[c] = mean of the tokens perm[bounds[c] : bounds[c + 1]], or old[c] where there are none."""
    block, plane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin = tl.load(bounds + plane * bounds_plane + block)
    end = tl.load(bounds + plane * bounds_plane + block + 1)
    on_n, on_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    real_d = on_d < D
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in tl.range(begin, end, BLOCK_N):
        place = first + on_n
        token = place.to(tl.int64)
        if perm is not None:
            token = tl.load(perm + plane * perm_plane + place, mask=place < end, other=0).to(tl.int64)
        at = x + (plane * n + token)[:, None] * D + on_d[None, :]
        total += tl.load(at, mask=(place < end)[:, None] & real_d[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / tl.maximum(end - begin, 1).to(tl.float32)
    at = (plane * count + block) * D + on_d
    if old is not None:
        kept = tl.load(old + at, mask=real_d, other=0.0).to(tl.float32)
        finite = (mean - mean) == 0.0
        mean = tl.where((end > begin) & finite, mean, kept)
    tl.store(out + at, mean, mask=real_d)


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid (Euclidean) of each token: int32 [P, n] for x [P, n, D] and centroids [P, C, D].

    No [n, C] matrix of distances is ever in memory. Of equal distances the lowest index wins; coordinates of x that are
    not finite count as 0. What differs from Flash-KMeans: centroids enter as steps e from their common mean m,
    rounded to the dtype of x, as arg min of |e|^2 + 2 m.e - 2 x.e. That is the same arg min, but keys of trained
    models share a large offset, and in 16 bits the offset would take the digits in which centroids differ. Products of
    float32 are TF32 ones on a GPU, which is as exact as a choice among neighbours has to be.

    Raises `UsageError` for shapes that do not fit, no clusters, or tensors that are not on the kernel's device.
    """
    _check_shape(x)
    planes, _, d = x.shape
    if centroids.dim() != 3 or (centroids.shape[0], centroids.shape[2]) != (planes, d) or not centroids.shape[1]:
        raise UsageError(
            f"centroids have shape {tuple(centroids.shape)}; for x of {tuple(x.shape)} they are"
            f" [{planes}, C, {d}], C > 0."
        )
    launch.check(_assign, x=x, centroids=centroids)
    labels, job = prepare_assign(x, centroids)
    if labels.numel():
        job.run(x)
    return labels


def prepare_assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, launch.Launch]:
    """The launch of `assign`, and the labels that it fills."""
    (planes, n, d), count = x.shape, centroids.shape[1]
    middle = centroids.float().mean(1, keepdim=True)
    step = (centroids.float() - middle).to(x.dtype)
    exact = step.float()
    labels = torch.empty(planes, n, dtype=torch.int32, device=x.device)
    block_n, block_c, warps, stages = ASSIGN.get(launch.power(d), (32, 32, 8, 1))
    if x.dtype == torch.float32:
        block_c, stages = 32, 1
    arguments = {
        "x": x.contiguous(), "step": step, "norm": (exact.square() + 2 * exact * middle).sum(-1), "labels": labels,
        "n": n, "count": count, "D": d, "BLOCK_D": launch.power(d), "BLOCK_N": block_n, "BLOCK_C": block_c,
        "PRECISION": "tf32", "UPCAST": launch.interpreted(_assign) and x.dtype == torch.bfloat16,
    }  # fmt: skip
    return labels, launch.Launch(_assign, (triton.cdiv(n, block_n), planes), arguments, warps, stages)


ASSIGN = {
    16: (128, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2),
}  # fmt: skip
"""Padded D -> (tokens per program, centroids per step, warps, stages). `test_kernels_compile_other` holds that none
spills."""


def runs(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens sorted by label, those of one cluster in their own order: perm int64 [P, n], bounds int32 [P, C + 1].

    labels: int32 [P, n], each below `count`. These are `Order.perm` and `Order.bounds` of the clustered segment.
    """
    # A sort by radix costs its passes by the bits of the key.
    keys = labels.to(torch.int16) if count < 2**15 else labels
    ordered, perm = torch.sort(keys, dim=1, stable=True)
    edges = torch.arange(count + 1, device=labels.device, dtype=ordered.dtype).expand(labels.shape[0], -1)
    return perm, torch.searchsorted(ordered, edges.contiguous(), out_int32=True)


def means(x: Tensor, bounds: Tensor, perm: Tensor | None = None, old: Tensor | None = None) -> Tensor:
    """Mean of each block of tokens: float32 [P, C, D] for x [P, n, D].

    bounds: int32 [1 or P, C + 1]. perm: int64 [1 or P, n], the order that bounds speak of; None: that of x. Empty
    blocks, and coordinates whose mean is not finite, get those of old [P, C, D]; without it an empty block's mean is 0.
    One program adds up one block in a fixed order, without atomics: the same input gives the same bits.
    """
    _check_shape(x)
    launch.check(_means, x=x, bounds=bounds, perm=perm, old=old)
    found, job = prepare_means(x, bounds, perm, old)
    if found.numel():
        job.run(x)
    return found


def prepare_means(x: Tensor, bounds: Tensor, perm: Tensor | None, old: Tensor | None) -> tuple[Tensor, launch.Launch]:
    """The launch of `means`, and the means that it fills."""
    (planes, n, d), count = x.shape, bounds.shape[1] - 1
    found = torch.empty(planes, count, d, dtype=torch.float32, device=x.device)
    arguments = {
        "x": x.contiguous(), "bounds": bounds.contiguous(), "out": found, "n": n, "count": count,
        "perm": None if perm is None else perm.contiguous(), "old": None if old is None else old.contiguous(),
        "perm_plane": n if perm is not None and perm.shape[0] > 1 else 0,
        "bounds_plane": count + 1 if bounds.shape[0] > 1 else 0,
        "D": d, "BLOCK_D": launch.power(d), "BLOCK_N": 32,
    }  # fmt: skip
    return found, launch.Launch(_means, (count, planes), arguments, 2, 2)


def update(x: Tensor, labels: Tensor, count: int, old: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each cluster and its number of tokens: float32 [P, C, D] and int32 [P, C].

    x: [P, n, D], labels: int32 [P, n], old: [P, C, D], kept by clusters that have lost all tokens. What differs from
    SVG2: sums run over sorted tokens, one program a cluster, instead of atomic additions; no check of convergence,
    which would wait for the host.
    """
    perm, bounds = runs(labels, count)
    return means(x, bounds, perm, old), bounds[:, 1:] - bounds[:, :-1]


def _check_shape(x: Tensor) -> None:
    if x.dim() != 3:
        raise UsageError(f"x has shape {tuple(x.shape)}; tokens to cluster are [planes, tokens, head dimension].")
