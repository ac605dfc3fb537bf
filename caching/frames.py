"""Keys and values of a video's finished frames, for the chunks that come after them.

Shapes: B rows, Hk heads, N tokens of a frame, D, Dv head dimensions; k [B, Hk, S, D], v [B, Hk, S, Dv] with S = N x frames.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Turn = Callable[[Tensor, int], Tensor]
"""(keys, frames) -> the same keys as if they stood that many frames later."""


class FrameStore:
    """The store of one run: frames in the order of time, by attention site. It has no branches: a student with guidance
    inside makes one evaluation.

    tokens: N. window: how many of the latest frames stay; None for all. sink: how many of the first ones stay besides.
    """

    def __init__(self, tokens: int, sink: int = 0, window: int | None = None) -> None:
        self.tokens, self.sink, self.window = tokens, sink, window
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def frames(self) -> int:
        """How many frames are kept."""
        return next((k.shape[2] // self.tokens for k, _ in self._kept.values()), 0)

    def read(self, site: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all kept frames, and behind them these."""
        if site not in self._kept:
            return k, v
        before = self._kept[site]
        return torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)

    def keep(self, site: int, k: Tensor, v: Tensor) -> None:
        """Frames that follow the kept ones are finished. No gradient passes the store."""
        self._kept[site] = self.read(site, k.detach(), v.detach())

    def slide(self, turn: Turn) -> None:
        """Drop frames that no longer count, once all sites have kept theirs.

        The sink's keys are turned so that they stand right before the window: no key is then farther away than the kept
        frames are many, however long the clip (as attention sinks of language models are moved, arXiv 2309.17453, section
        3.2)."""
        dropped = 0 if self.window is None else max(0, self.frames - self.sink - self.window)
        if not dropped:
            return
        head, rest = self.sink * self.tokens, (self.sink + dropped) * self.tokens
        for site, (k, v) in self._kept.items():
            stays = turn(k[:, :, :head], dropped) if head else k[:, :, :head]
            self._kept[site] = torch.cat([stays, k[:, :, rest:]], 2), torch.cat([v[:, :, :head], v[:, :, rest:]], 2)

    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for pair in self._kept.values() for t in pair)
