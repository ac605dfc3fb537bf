"""What MDLM and BD3-LM share: the DiT of SEDD and MDLM with adaptive layer norms over a noise level, under its own
names."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Rotary(nn.Module):
    """x [B, S, C] -> cos, sin [1, S, 3, 1, D] for packed q, k and v; those of v change nothing. Kept by length."""

    def __init__(self, dim: int, base: int = 10_000) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / base ** (torch.arange(0, dim, 2).float() / dim))
        self.seq_len_cached: int | None = None
        self.cos_cached: Any = None
        self.sin_cached: Any = None

    def forward(self, x: Tensor, seq_dim: int = 1) -> tuple[Tensor, Tensor]:
        length = x.shape[seq_dim]
        if length != self.seq_len_cached:
            angle = torch.arange(length, device=x.device).type_as(self.inv_freq)[:, None] * self.inv_freq
            angle = torch.cat((angle, angle), dim=-1)[None, :, None, None, :].repeat(1, 1, 3, 1, 1)
            self.seq_len_cached = length
            self.cos_cached, self.sin_cached = angle.cos(), angle.sin()
            self.cos_cached[:, :, 2], self.sin_cached[:, :, 2] = 1.0, 0.0
        return self.cos_cached, self.sin_cached


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """qkv [B, S, 3, H, D]."""
    low, high = qkv.chunk(2, dim=-1)
    return qkv * cos.to(qkv.dtype) + torch.cat((-high, low), dim=-1) * sin.to(qkv.dtype)


class LayerNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:]) * self.weight


class TimestepEmbedder(nn.Module):
    """sigma [B] -> [B, cond_dim]."""

    def __init__(self, cond_dim: int, frequency_embedding_size: int = 16) -> None:
        super().__init__()
        self.size = frequency_embedding_size
        self.mlp = nn.Sequential(nn.Linear(self.size, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, t: Tensor) -> Tensor:
        half = self.size // 2
        angle = t[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
        return self.mlp(torch.cat((angle.cos(), angle.sin()), dim=-1))


class EmbeddingLayer(nn.Module):
    """An embedding that is a bare parameter."""

    def __init__(self, dim: int, vocab_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding[x]


class DDitFinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_channels: int, cond_dim: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Linear(cond_dim, 2 * hidden_size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DDiTBlock(nn.Module):
    """attend(q, k, v) -> o, all [B, H, S, D], is the family's."""

    def __init__(self, dim: int, n_heads: int, cond_dim: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.adaLN_modulation = nn.Linear(cond_dim, 6 * dim)

    def packed(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[B, S, 3 * C] -> [B, S, 3, H, D], rotated."""
        return rotated(x.unflatten(-1, (3, self.n_heads, -1)), *rotary)

    def finish(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """The residuals. attended [B, S, C]."""
        _, _, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_msa * self.attn_out(attended)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
