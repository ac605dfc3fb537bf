"""Masks of attention calls: those that only hide padded keys say how many tokens of each segment are real.

Shapes: B batch, H heads, Sq, Sk tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hasten.sparse_attn.segments import Tokens

HIDDEN = -1e4
"""Old models add this instead of minus infinity; nothing is left of such a key after the softmax in float32."""


@dataclass(frozen=True, slots=True)
class Padding:
    """What a mask was found to do. segments: numbers of those with padding. reason: why it is more than padding."""

    segments: tuple[int, ...] = ()
    reason: str = ""


def understand(mask: Tensor, shapes: tuple[torch.Size, torch.Size], tokens: Tokens) -> Padding:
    """What `mask` (anything that broadcasts to [B, H, Sq, Sk]) hides. Reads it, so once for each kind of call.

    shapes: of q and k. tokens: of the keys.
    """
    if mask.dim() > 4 or mask.shape[-1] not in (1, shapes[1][2]):
        return Padding(reason="its mask has an unknown shape")
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask > HIDDEN)).any()):
        return Padding(reason="its mask adds numbers to the scores")
    allowed = _allowed(mask)
    if not bool((allowed == allowed[:, :1, :1]).all()):
        return Padding(reason="its mask differs between queries or heads")
    padded, readable = [], readable_keys(mask, shapes)
    for number, (start, segment) in enumerate(zip(tokens.starts, tokens.segments, strict=True)):
        part = readable[:, start : start + segment.length]
        if bool(part.all()):
            continue
        places = torch.arange(segment.length, device=part.device)
        if not torch.equal(part, places < part.sum(-1, keepdim=True)):
            return Padding(reason="its mask hides keys in front of others that it shows")
        padded.append(number)
    return Padding(tuple(padded))


def readable_keys(mask: Tensor, shapes: tuple[torch.Size, torch.Size]) -> Tensor:
    """bool [B, Sk] of a mask that was understood. Waits for nothing."""
    return _allowed(mask)[:, 0, 0].expand(shapes[1][0], shapes[1][2])


def with_padding(tokens: Tokens, padding: Padding, readable: Tensor) -> Tokens:
    """The segments, with the number of real tokens in those that have padding."""
    parts = list(tokens.segments)
    for number in padding.segments:
        start = tokens.starts[number]
        valid = readable[:, start : start + parts[number].length].sum(-1)
        parts[number] = replace(parts[number], valid=valid)
    return Tokens(tuple(parts))


def _allowed(mask: Tensor) -> Tensor:
    """bool, four dimensions."""
    shown = mask if mask.dtype == torch.bool else mask > HIDDEN
    return shown[(None,) * (4 - shown.dim())]
