"""A video network that sees some frames only: block-causal masks, keys kept from earlier frames, places in time.

An unmodified network of Wan's kind attends among all tokens of a clip and counts frames from 0. While a view is open on it,
its self-attention reads what the view says, and its rotary embedding starts at the view's first frame; then everything is
as it was. Both are put on the one instance, for the time of one evaluation.

Shapes: B rows, F latent frames of N tokens; q, k [B, H, S, D] with S = N F; keys are kept behind their rotary embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.caching.frames import FrameStore
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.attention.processors import SITE, reason_against, stand_in
from hasten.pipelines.attention.sites import Site, Walks
from hasten.pipelines.host import is_whole_compiled
from hasten.session import Attachment

KNOWN = ("WanTransformer3DModel",)
"""Networks whose time, tokens and rotary embedding are laid out as this file expects."""

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class View:
    """What self-attention reads in one evaluation. store: frames that are read before those of the evaluation. keep: put
    the evaluation's own into it, too. mask bool [Sq, Sk], over what is read; None: all of it. begin: number of the first
    frame."""

    store: FrameStore | None = None
    keep: bool = False
    mask: Tensor | None = None
    begin: int = 0

    def wants(self, site: Site) -> bool:
        """All self-attention."""
        return True

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, named: dict[str, Any]) -> Tensor:
        """o [B, H, Sq, D]."""
        keys, values = (k, v) if self.store is None else self.store.read(site.number, k, v)
        if self.keep:
            assert self.store is not None
            self.store.keep(site.number, k, v)
        if self.mask is not None:
            named = named | {"attn_mask": self.mask.to(q.device)}
        return site.dense(q, keys, values, **named)


def causal_mask(chunks: Spans, tokens: int) -> Tensor:
    """bool [S, S]: a token reads its own chunk and those before it. tokens: of a frame."""
    number = _chunk_of(chunks, tokens)
    return number[:, None] >= number[None, :]


def forced_mask(chunks: Spans, tokens: int) -> Tensor:
    """bool [S, 2 S]: of the finished frames in a store a token reads the chunks before its own, of those of the evaluation
    its own chunk (teacher forcing)."""
    number = _chunk_of(chunks, tokens)
    return torch.cat([number[:, None] > number[None, :], number[:, None] == number[None, :]], 1)


def _chunk_of(chunks: Spans, tokens: int) -> Tensor:
    return torch.cat([torch.full(((end - begin) * tokens,), i) for i, (begin, end) in enumerate(chunks)])


class FrameSeam:
    """Opens views on one network. Raises `RefusedError` where that cannot be right, by name."""

    def __init__(self, network: nn.Module) -> None:
        kind = type(network).__name__
        if not any(base.__name__ in KNOWN for base in type(network).__mro__):
            raise RefusedError(f"{kind} cannot be made causal in time: known are {', '.join(KNOWN)}.")
        if is_whole_compiled(network):
            raise RefusedError(f"This {kind} is compiled as a whole, so its attention cannot be changed. Open it uncompiled.")
        self.network: Any = network
        config: Any = network.config
        self.patch: tuple[int, int, int] = tuple(config.patch_size)
        if self.patch[0] != 1:
            raise RefusedError(f"A token of this {kind} spans {self.patch[0]} latent frames; causal in time needs 1.")
        modules = (module for module in network.modules() if getattr(module, "is_cross_attention", None) is False)
        self._attention: list[Any] = list(modules)
        self._walks = Walks()
        self._made: dict[int, tuple[Site, Any]] = {}

    def check(self, frames: int) -> None:
        """Raises `UsageError` for a clip of more latent frames than the network knows places for."""
        longest = int(self.network.config.rope_max_seq_len)
        if frames > longest:
            raise UsageError(
                f"This network knows places in time up to {longest} latent frames; {frames} were asked for. Ask for a shorter"
                " clip."
            )

    def tokens(self, height: int, width: int) -> int:
        """Tokens of a latent frame."""
        return (height // self.patch[1]) * (width // self.patch[2])

    @contextmanager
    def seeing(self, view: View) -> Iterator[None]:
        """While open, the network has this view. Raises `UsageError` where somebody else has its attention."""
        attachment, before = Attachment(), self._walks.now
        try:
            for number, module in enumerate(self._attention):
                attachment.replace(module, "processor", self._processor(number, module.processor))
            if view.begin:
                attachment.replace(self.network.rope, "forward", self._later(self.network.rope.forward, view.begin))
            self._walks.now = view
            yield
        finally:
            self._walks.now = before
            attachment.restore()

    def turn(self, keys: Tensor, frames: int) -> Tensor:
        """Keys [B, H, S, D] as if they stood `frames` later: one more rotation, about the axis of time alone."""
        angles = self.network.rope(torch.empty(1, 1, frames + 1, *self.patch[1:], device="meta"))
        cos, sin = angles[0][0, -1, 0, 0::2].to(keys), angles[1][0, -1, 0, 1::2].to(keys)
        one, two = keys[..., 0::2], keys[..., 1::2]
        return torch.stack([one * cos - two * sin, one * sin + two * cos], -1).flatten(-2)

    def _processor(self, number: int, own: Any) -> Any:
        if hasattr(own, SITE):
            raise UsageError(
                f"The attention of this {type(self.network).__name__} is sparse already, and frames in chunks need it whole."
                " Take one of the two."
            )
        if reason := reason_against(own):
            raise RefusedError(f"Attention of this {type(self.network).__name__} cannot be made causal: {reason}.")
        if number not in self._made or self._made[number][0].original is not own:
            site = Site(f"self-attention {number}", number, own, self._walks)
            self._made[number] = site, stand_in(own, site, site.ticket)
        return self._made[number][1]

    def _later(self, rope: Any, begin: int) -> Any:
        """The rotary embedding of frames that start at `begin`."""

        def shifted(x: Tensor) -> tuple[Tensor, Tensor]:
            channels, frames, height, width = x.shape[1:]
            self.check(begin + frames)
            cos, sin = rope(torch.empty(1, channels, begin + frames, height, width, device="meta"))
            own = frames * self.tokens(height, width)
            return cos[:, -own:], sin[:, -own:]

        return shifted
