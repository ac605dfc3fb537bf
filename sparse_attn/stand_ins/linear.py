"""The linear branch: one pass over all keys, whatever their number, as sums that can be added to exact attention.

Shapes: B batch, Hq, Hk heads, Sq, Sk tokens, F features, Dv value dimension, Pq = B * Hq, Pk = B * Hk planes, Cq, Ck
blocks.

Linear attention replaces exp(s q.k) by phi(q).phi(k): its numerator phi(q) sum phi(k) v^T and its denominator
phi(q).sum phi(k) need one state of F x Dv numbers per head. That is the extreme of compensation: where a centroid
stands in for a block, one state stands in for everything that is not read (`rest`), and the two kinds of sums add up
in `merge` because both come with their denominator.

What needs training and what does not: relu and elu + 1 say nothing about exp(s q.k). Networks are trained or fine-tuned
for them (LiT, arXiv 2501.12976: relu, few heads, a depthwise convolution on the values that starts from nothing, and
distillation from the softmax network); without that their sums are in units of their own, and adding them to exact
attention is wrong. `random_features` are in the units of exp(s q.k), so they need no training; they are noisy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.backends.choice import installed
from hasten.sparse_attn.blocks import Blocks, Order

Feature = Literal["relu", "elu", "none"]
"""relu: LiT's. elu: elu + 1 (Katharopoulos et al. 2020). none: q and k are features already."""

PIECE = 256
"""Tokens of a causal sequence that are read as masked products at once."""


@dataclass(frozen=True, slots=True)
class Sums:
    """numerator: float32 [B, Hq, Sq, Dv], denominator: float32 [B, Hq, Sq] (float64 for float64 inputs)."""

    numerator: Tensor
    denominator: Tensor

    def pair(self, log_factor: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """(o, lse) as `merge` takes it: 0 and -inf where the denominator is not positive.

        log_factor: what the features were divided by (`random_features`), or a trained gain; broadcast to [B, Hq, Sq].
        """
        seen = self.denominator > 0
        safe = self.denominator.masked_fill(~seen, 1)
        o = (self.numerator / safe[..., None]).masked_fill(~seen[..., None], 0)
        return o, (safe.log() + log_factor).masked_fill(~seen, -math.inf)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, feature: Feature = "relu", *, causal: bool = False, decay: Tensor | None = None,
    backend: str = "auto",
) -> Sums:  # fmt: skip
    """Linear attention of q [B, Hq, Sq, F] over k [B, Hk, Sk, F] and v [B, Hk, Sk, Dv].

    causal: query i reads keys up to i, in blocks as Lightning Attention-2 (arXiv 2401.04658, section 3.2); Sq = Sk.
    decay: [Hk], in (0, 1], only with causal: a key that is n tokens back counts decay ** n. Lightning's own network has
    no denominator and takes `numerator` alone.

    backend: "auto" takes Triton on CUDA devices, "torch" and "triton" insist; the torch version is differentiable.
    Raises `UsageError` for shapes that do not fit.
    """
    _check(q, k, v, feature, causal, decay, backend)
    if backend == "triton" or (backend == "auto" and _kernels_fit(q, k, v)):
        kernels = import_module("hasten.sparse_attn.kernels.linear")
        return Sums(*kernels.linear(q, k, v, feature, causal=causal, decay=decay))
    exact = torch.promote_types(q.dtype, torch.float32)
    (b, hq, sq, width), hk = q.shape, k.shape[1]
    x = features(q.to(exact), feature).reshape(b, hk, hq // hk, sq, width)
    y, z = features(k.to(exact), feature)[:, :, None], _counted(v.to(exact))[:, :, None]
    found = _causal(x, y, z, decay) if causal else x @ (y.mT @ z)
    found = found.flatten(1, 2)
    return Sums(found[..., :-1], found[..., -1])


def rest(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, approximate: Tensor, feature: Feature = "relu"
) -> Sums:  # fmt: skip
    """Linear attention of each query to the blocks that `approximate` (bool [1 or Pq, Cq, Ck]) names for its block.

    q [B, Hq, Sq, F], k [B, Hk, Sk, F], v [B, Hk, Sk, Dv] arranged; so are the sums. One state per block of keys, added
    up per block of queries: Pq * Cq * F * Dv numbers. Merged with exact attention to the other blocks, this is a
    sparse-linear hybrid. Reads the sizes of the largest blocks, which on a GPU waits for it. Differentiable.
    """
    _check(q, k, v, feature, False, None, "torch")
    exact = torch.promote_types(q.dtype, torch.float32)
    (b, hq, sq, _), hk = q.shape, k.shape[1]
    x, at = _by_block(features(q.to(exact), feature).flatten(0, 1), blocks.q)
    y, _ = _by_block(features(k.to(exact), feature).flatten(0, 1), blocks.k)
    z, _ = _by_block(_counted(v.to(exact)).flatten(0, 1), blocks.k)
    states = y.mT @ z
    wanted = approximate.to(exact).expand(b * hq, -1, -1).reshape(b * hk, -1, blocks.k.count) @ states.flatten(2)
    found = (x @ wanted.view(b * hq, blocks.q.count, *states.shape[2:])).flatten(1, 2)
    out = found.new_zeros(b * hq, sq, found.shape[2]).scatter_add(1, at[..., None].expand_as(found), found)
    out = out.view(b, hq, sq, -1)
    return Sums(out[..., :-1], out[..., -1])


def features(x: Tensor, feature: Feature) -> Tensor:
    """phi(x), element by element."""
    if feature == "relu":
        return x.relu()
    return F.elu(x).add(1) if feature == "elu" else x


def projection(count: int, dim: int, seed: int = 0, device: torch.device | None = None) -> Tensor:
    """float32 [count, dim]: rows are Gaussian in length and orthogonal in groups of `dim` (Performer, section 3.2 of
    arXiv 2009.14794), which lowers the noise of `random_features`. The same seed gives the same rows."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.randn(-(-count // dim), dim, dim, generator=generator)
    rows: Tensor = torch.linalg.qr(squares)[0].mT.flatten(0, 1)[:count]
    lengths: Tensor = torch.randn(count, dim, generator=generator).norm(dim=1, keepdim=True)
    return (rows * lengths).to(device)


def random_features(x: Tensor, rows: Tensor, scale: float, *, keys: bool) -> tuple[Tensor, Tensor]:
    """Features whose product is exp(scale q.k) on average: float32 [B, H, S, count], all positive; and log factors.

    x: [B, H, S, D], rows: `projection(count, D)`. phi(x) = exp(w.y - |y|^2 / 2) / sqrt(count) with y = sqrt(scale) x
    (Performer, arXiv 2009.14794, lemma 1), divided by the exponential of the log factor, which keeps it from
    overflowing: [B, H, S] for queries; [B, H, 1] with `keys`, because keys are summed. Give the sum of both to
    `Sums.pair`. The relative noise of a product grows as exp(scale |q + k|^2 / 2): for the small logits of what is
    not read, not for the large ones.
    """
    y = x.float() * math.sqrt(scale)
    exponent = y @ rows.to(y).mT - y.square().sum(-1, keepdim=True) / 2
    top = exponent.detach().amax((-2, -1) if keys else -1, keepdim=True)
    return (exponent - top).exp() / math.sqrt(rows.shape[0]), top[..., 0]


def _counted(v: Tensor) -> Tensor:
    """v with a column of ones, whose sum is the denominator."""
    return F.pad(v, (0, 1), value=1.0)


def _causal(x: Tensor, y: Tensor, z: Tensor, decay: Tensor | None) -> Tensor:
    """Pieces one after the other: x [B, Hk, G, S, F], y [B, Hk, 1, S, F] and z [B, Hk, 1, S, Dv + 1] give
    [B, Hk, G, S, Dv + 1]."""
    rate = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device) if decay is None else decay.to(x).log()
    rate = rate[:, None, None, None]
    state = x.new_zeros(*y.shape[:3], y.shape[-1], z.shape[-1])
    found = []
    for first in range(0, x.shape[3], PIECE):
        own = slice(first, first + PIECE)
        q, k, v = x[..., own, :], y[..., own, :], z[..., own, :]
        place = torch.arange(q.shape[3], device=x.device)
        distance = place[:, None] - place
        weights = (rate * distance.clamp(min=0)).exp() * (distance >= 0)
        age = (rate * (place[:, None] + 1)).exp()
        found.append((q @ k.mT * weights) @ v + age * (q @ state))
        behind = (rate * (q.shape[3] - 1 - place[:, None])).exp()
        state = state * (rate * q.shape[3]).exp() + (k * behind).mT @ v
    return torch.cat(found, 3) if found else x.new_zeros(*x.shape[:4], z.shape[-1])


def _by_block(x: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """x [P, S, F] block by block, zeros behind the end of each: [P, C, largest, F]; and the places:
    [P, C * largest]."""
    most = max(1, int(order.sizes.max())) if order.count else 1
    place = order.bounds[:, :-1, None].long() + torch.arange(most, device=x.device)
    real = (place < order.bounds[:, 1:, None]).expand(x.shape[0], -1, -1)
    at = place.clamp(max=max(0, x.shape[1] - 1)).expand_as(real).flatten(1)
    found = x.gather(1, at[..., None].expand(-1, -1, x.shape[2])).masked_fill(~real.flatten(1)[..., None], 0)
    return found.view(*real.shape, x.shape[2]), at


def _kernels_fit(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """On a GPU, no wider than the kernels take, and nobody wants gradients, which they do not give."""
    wide = max(q.shape[3], v.shape[3]) > 256 or q.dtype == torch.float64
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return q.is_cuda and not wide and not trained and installed("triton")


def _check(
    q: Tensor, k: Tensor, v: Tensor, feature: str, causal: bool, decay: Tensor | None, backend: str
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise UsageError(f"Shapes do not fit: {shapes}; wanted [B, Hq, Sq, F], [B, Hk, Sk, F], [B, Hk, Sk, Dv].")
    if feature not in ("relu", "elu", "none"):
        raise UsageError(f"There is no feature map {feature!r}; allowed: relu, elu, none.")
    if causal and q.shape[2] != k.shape[2]:
        raise UsageError(f"Causal linear attention needs as many queries as keys; got {shapes}.")
    if decay is not None and (not causal or decay.shape != k.shape[1:2]):
        raise UsageError(f"decay is {tuple(decay.shape)} with causal={causal}; it is [{k.shape[1]}], with causal=True.")
    if backend not in ("auto", "torch", "triton"):
        raise UsageError(f"There is no backend {backend!r} for linear attention; allowed: auto, torch, triton.")
