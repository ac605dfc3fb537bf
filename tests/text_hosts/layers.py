"""Layers that several families share, with their names of modules: Llama-type norms, MLPs and rotary embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Root mean square over the last dimension, in float32."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)


class GatedMLP(nn.Module):
    """SiLU(gate) * up, then down."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Rotary(nn.Module):
    """(x, position_ids [B, N]) -> cos, sin [B, N, D] in the dtype of x."""

    def __init__(self, dim: int, theta: float = 10_000.0) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].float() * self.inv_freq
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, N, D]; cos, sin [B, N, R] act on the first R of D dimensions."""
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-high, low), dim=-1) * sin, rest), dim=-1)


def heads(x: Tensor, size: int) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def shared(x: Tensor, groups: int) -> Tensor:
    """Key or value heads repeated for their groups of query heads, as code before `enable_gqa` did."""
    return x.repeat_interleave(groups, dim=1)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Full attention as a kernel of a package would do it: without torch's function, so nothing can catch it."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q @ shared(k, q.shape[1] // k.shape[1]).mT * scale).softmax(-1) @ shared(v, q.shape[1] // v.shape[1])
