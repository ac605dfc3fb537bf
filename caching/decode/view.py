"""What attention may read of one layer's slots now.

Shapes: see `hasten.caching.decode`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hasten.caching.decode.packed import NONE


@dataclass(frozen=True, slots=True)
class View:
    """What may be read now: k [B, Hk, S + N, D], v [B, Hk, S + N, Dv], place int32 [B, P, S + N] (`NONE`: not to be read).

    tail: N, the newest tokens, which are not committed. reads: bool [B or 1, N, N], which of them each reads (a draft);
    None: those whose place is not behind its own. holes: may a place be `NONE`?
    """

    k: Tensor
    v: Tensor
    place: Tensor
    tail: int
    reads: Tensor | None
    holes: bool

    def behind(self, k: Tensor, v: Tensor, place: Tensor) -> View:
        """The same with these slots in front: k [B, Hk, n, D], v [B, Hk, n, Dv], place int32 [B, P, n]."""
        planes = max(place.shape[1], self.place.shape[1])
        places = torch.cat([place.expand(-1, planes, -1), self.place.expand(-1, planes, -1)], -1)
        return replace(self, k=torch.cat([k, self.k], 2), v=torch.cat([v, self.v], 2), place=places)

    def of(self, chosen: Tensor) -> View:
        """The same without the slots whose places `chosen`, bool [B, L], does not name; for P = 1."""
        near = self.place.clamp(min=0).long()
        stays = chosen[:, None].gather(-1, near) & (self.place >= 0)
        return replace(self, place=torch.where(stays, self.place, NONE).to(self.place.dtype), holes=True)
