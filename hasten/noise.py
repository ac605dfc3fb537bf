"""Random numbers that depend on a seed and a place, not on who else is in the batch.

A generator's stream would give a text other numbers when its neighbours change. Here each number is a hash of (seed,
step, slot, token): SplitMix64's finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.errors import UsageError

_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB as signed 64-bit numbers (products wrap)."""


def seeds(generator: torch.Generator | Sequence[torch.Generator] | None, rows: int) -> Tensor:
    """One seed per text, int64 [rows]: from one generator, or from a generator for each, or from PyTorch's own.

    Raises `UsageError` where the number of generators is not `rows`.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = generator.device if generator is not None else None
        return torch.randint(1 << 62, (rows,), generator=generator, device=device).cpu()
    if len(generator) != rows:
        raise UsageError(f"There are {rows} texts and {len(generator)} generators. Pass one generator, or one for each text.")
    return torch.cat([torch.randint(1 << 62, (1,), generator=g, device=g.device).cpu() for g in generator])


def uniform(seed: Tensor, step: Tensor, slot: Tensor, tokens: int) -> Tensor:
    """Numbers in (0, 1), float64 [..., tokens]. seed, step, slot: int64, of shapes that broadcast to [...]."""
    state = _mix(_mix(_mix(seed) + step * _GOLDEN) + slot * _GOLDEN)
    token = torch.arange(tokens, device=state.device)
    bits = _mix(state[..., None] + token * _GOLDEN)
    return (_shift(bits, 12).double() + 0.5) * 2.0**-52


def gumbel(seed: Tensor, step: Tensor, slot: Tensor, tokens: int) -> Tensor:
    """Standard Gumbel noise, float32 [..., tokens]: the argmax of logits / T + it is a draw from softmax(logits / T)."""
    return -torch.log(-torch.log(uniform(seed, step, slot, tokens))).float()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical shift to the right (torch's keeps the sign)."""
    return (x >> by) & ((1 << (64 - by)) - 1)
