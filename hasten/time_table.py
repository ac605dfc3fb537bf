"""Numbers that are a function of the time alone: knots with straight lines between them.

A network's parts that change with time (gates, an adapter's strength) read them here, so that they are chosen by t, can
be computed before the network runs, and are the same whatever was evaluated before.

Shapes: B rows; K knots; u float [B], what the network is told as its time over the largest such time, 0 data and 1 noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PACE = 30.0
"""A number is this many times the weight behind it. Gates have to move by several units where an adapter's weights move by
hundredths, and a role is trained at one rate."""


class TimeTable(nn.Module):
    """u [B] -> numbers float32 [B, width]. values: [K, width], the numbers at even knots from 0 to 1, over `PACE`."""

    def __init__(self, knots: int, width: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(knots, width))

    def forward(self, u: Tensor) -> Tensor:
        place = u.to(self.values.device, torch.float32).clamp(0, 1) * (len(self.values) - 1)
        below = place.floor().clamp(max=max(0, len(self.values) - 2)).long()
        above = (below + 1).clamp(max=len(self.values) - 1)
        share = (place - below)[:, None]
        numbers: Tensor = PACE * torch.lerp(self.values[below], self.values[above], share)
        return numbers

    @property
    def constant(self) -> bool:
        """Are the numbers the same at all times, bit for bit?"""
        return bool((self.values == self.values[:1]).all())
