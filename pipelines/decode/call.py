"""One call of `generate` as it reaches a decode loop, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput


@dataclass(frozen=True, eq=False)
class Call:
    """What `generate` has prepared. ids int64 [B, P]; arguments: the model's, with `past_key_values` and `attention_mask`."""

    ids: Tensor
    processors: Any
    criteria: Any
    config: Any
    streamer: Any
    arguments: dict[str, Any]

    @property
    def mask(self) -> Tensor:
        """int64 [B, P]: 1 for tokens, 0 for padding."""
        mask = self.arguments.get("attention_mask")
        return torch.ones_like(self.ids) if mask is None else mask.to(self.ids.dtype)

    @property
    def pad(self) -> int | None:
        """Id behind finished rows; None where no criterion knows an end token, and rows write on."""
        ends = any(hasattr(each, "eos_token_id") for each in self.criteria)
        return int(self.config._pad_token_tensor) if ends else None

    @property
    def keeps(self) -> tuple[bool, bool]:
        """Are processed scores, are raw logits to be returned?"""
        named = bool(self.config.return_dict_in_generate)
        return named and bool(self.config.output_scores), named and bool(self.config.output_logits)

    def result(self, sequences: Tensor, scores: list[list[Tensor]], logits: list[list[Tensor]], cache: Any) -> Any:
        """`sequences`, or all of it in transformers' output class. scores, logits: of each row, for each of its new tokens
        [V]; columns behind a finished row are zeros (its tokens there are padding)."""
        if not self.config.return_dict_in_generate:
            return sequences
        new = sequences.shape[1] - self.ids.shape[1]
        kept, raw = self.keeps
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=_columns(scores, new) if kept else None,
            logits=_columns(logits, new) if raw else None,
            past_key_values=cache,
        )


def _columns(rows: list[list[Tensor]], new: int) -> tuple[Tensor, ...]:
    """One tensor [B, V] for each of `new` columns."""
    nothing = torch.zeros_like(next(row[0] for row in rows if row))
    return tuple(torch.stack([row[column] if column < len(row) else nothing for row in rows]) for column in range(new))
