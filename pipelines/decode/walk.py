"""Tokens of all rows that are read one at a time behind a `DenseTail`, with what does not change from one to the next made once.

Shapes: B rows, S slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hasten.pipelines.decode.tail import DenseTail


class Walk:
    """At most `most` tokens of each row. Where rows are not equally long, each new token stands behind the longest, and the tail's
    `commit` moves them together when the walk is over."""

    def __init__(self, tail: DenseTail, most: int) -> None:
        self.tail, self.read, self.used = tail, 0, tail.used
        self.position = tail.places[:, None] + torch.arange(most, device=tail.device)
        self.mask: Tensor | None = None
        if not tail.plain:
            slots = tail.slots if tail.static else tail.used + most
            self.mask = tail.committed(slots, ahead=not tail.static)[:, None, None]
            self.shown = tail.form(self.mask)
        self.places = None if tail.window is None else tail.slot_places(tail.used + most)[:, None, None]

    def inputs(self) -> dict[str, Any]:
        """What the model is called with beside the next token of each row."""
        position = self.position[:, self.read : self.read + 1]
        mask = None if self.mask is None else self._mask(self.mask, self.used + self.read, position)
        self.read += 1
        return {"past_key_values": self.tail.cache, "position_ids": position, "use_cache": True, "attention_mask": mask}

    def _mask(self, mask: Tensor, slot: int, position: Tensor) -> Any:
        """For the token that is written at `slot`."""
        if self.tail.static:
            mask[..., slot] = True
            return self.tail.form(mask)
        full = self.shown[..., : slot + 1]
        if self.places is None or self.tail.window is None:
            return full
        near = self.places[..., : slot + 1] > (position - self.tail.window)[:, :, None, None]
        return self.tail.of_kinds(full, self.tail.form(mask[..., : slot + 1] & near))
