"""Draws from one law that stay, as often as they can, what was drawn from another (maximal coupling).

Shapes: [...] places, V tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def coupled(p: Tensor, q: Tensor, token: Tensor, there: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws from `p` [..., V], int64 [...]. Where `there` (bool [...]), `token` int64 [...] was drawn from `q` [..., V], and it
    stays with probability sum_x min(p, q): kept with min(1, p / q), else drawn from max(0, p - q), normalised. Never waits for
    the device."""
    chance = torch.empty_like(p[..., 0]).uniform_(generator=generator)
    p_of, q_of = (each.gather(-1, token[..., None])[..., 0] for each in (p, q))
    keep = there & (chance * q_of < p_of)
    rest = (p - q).clamp(min=0)
    rest = torch.where((there & (rest.sum(-1) > 0))[..., None], rest, p)
    noise = torch.empty_like(rest).exponential_(1.0, generator=generator).clamp(min=torch.finfo(p.dtype).tiny)
    return torch.where(keep, token, (rest / noise).argmax(-1))
