"""What a generation of text gives back.

Shapes: B texts, P slots of the longest prompt, G of the longest text that was generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.canvas import Canvas, Row

if TYPE_CHECKING:
    from hasten.report_diffusion import TextDiffusionReport


@dataclass(frozen=True, slots=True)
class TextOutput:
    """A batch of texts.

    sequences int64 [B, P + G]: prompts, padded on the left, and what was written behind them, padded on the right, as
    transformers has it, so that `sequences[:, P:]` is what was written. texts: that in words, without special tokens;
    None without a tokenizer. lengths int64 [B]: tokens written, up to and with the one that ends the text. nfe int64 [B]:
    evaluations of the model that a text took part in. tokens_per_forward float32 [B]: their quotient. commit_step int64
    [B, G]: the evaluation at which each token was written, from 0; -1 where there is none. token_layers float64 [B]:
    computed tokens times layers. interrupted: a callback stopped it before all was written. history: `sequences` after
    each step, on request. report: what it cost, ready to print.
    """

    sequences: Tensor
    texts: list[str] | None
    lengths: Tensor
    nfe: Tensor
    tokens_per_forward: Tensor
    commit_step: Tensor
    token_layers: Tensor
    interrupted: bool
    history: tuple[Tensor, ...]
    report: TextDiffusionReport


@dataclass(frozen=True, slots=True)
class Sheet:
    """How a canvas is laid out in a result. slot int64 [B, P + G]: which slot stands where, L (none) in padding. width: P."""

    slot: Tensor
    width: int
    pad_id: int

    @classmethod
    def of(cls, rows: list[Row], width: int, canvas: Canvas, pad_id: int) -> Sheet:
        """The layout for texts that stand as `rows` say."""
        device = canvas.ids.device
        start = torch.tensor([row.start for row in rows], device=device)
        end = torch.tensor([row.end for row in rows], device=device)
        longest = max((row.end - row.start for row in rows), default=0)
        slot = torch.arange(width + longest, device=device) - width + start[:, None]
        return cls(torch.where((slot >= 0) & (slot < end[:, None]), slot, canvas.slots), width, pad_id)

    def lay(self, values: Tensor, fill: int) -> Tensor:
        """Values [B, L] of the slots, in the layout, with `fill` where there is no slot."""
        return torch.nn.functional.pad(values, (0, 1), value=fill).gather(1, self.slot)

    def sequences(self, ids: Tensor) -> Tensor:
        """`ids` of the slots as `TextOutput.sequences`."""
        return self.lay(ids, self.pad_id)
