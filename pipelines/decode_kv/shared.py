"""What the prompts of a batch have in common, found in their tokens.

Shapes: see `hasten.caching.decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.caching.decode.packed import NONE


@dataclass(frozen=True, slots=True)
class Stage:
    """Tokens that are computed at once: ids int64 [Bs, n], valid bool [Bs, n] or None (no padding). times: how many rows of
    the next stage continue each of these."""

    ids: Tensor
    valid: Tensor | None
    times: int


def in_stages(ids: Tensor, valid: Tensor | None, least: int) -> list[Stage]:
    """The prompts ids int64 [B, n] as stages, the last of which has all B rows; one stage where nothing is shared.

    First what all rows begin with, if that is at least `least` tokens; then, where rows repeat each other in groups
    (samples of one prompt stand next to each other), each group's prompt; then what is left, at least a token of each
    row. Reads the tokens on the host.
    """
    rows = [row[mask] if mask is not None else row for row, mask in zip(ids.cpu(), _each(valid, len(ids)), strict=True)]
    texts = [tuple(row.tolist()) for row in rows]
    times, stages, done = _repeats(texts), [], 0
    different = texts[::times]
    common = _common(different) if len(different) > 1 else 0
    if common >= least:
        stages.append(Stage(ids.new_tensor(different[0][:common])[None], None, len(different)))
        done = common
    if times > 1 and min(map(len, different)) - 1 - done >= 1:
        stages.append(_stage([text[done:-1] for text in different], times, ids))
        return [*stages, Stage(ids[:, -1:], None, 1)]
    if times > 1 and stages:
        stages[-1] = Stage(stages[-1].ids, None, len(texts))
    return [*stages, _stage([text[done:] for text in texts], 1, ids)] if stages else [Stage(ids, valid, 1)]


def _each(valid: Tensor | None, rows: int) -> Sequence[Tensor | None]:
    return [None] * rows if valid is None else list(valid.cpu())


def _repeats(texts: Sequence[tuple[int, ...]]) -> int:
    """The largest r such that rows come in groups of r equal ones."""
    for size in range(len(texts), 1, -1):
        groups = [texts[at : at + size] for at in range(0, len(texts), size)]
        if len(texts) % size == 0 and all(len(set(group)) == 1 for group in groups):
            return size
    return 1


def _common(texts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all texts begin with; at most one less than the shortest has."""
    most = min(map(len, texts)) - 1
    return next((at for at in range(most) if len({text[at] for text in texts}) > 1), max(0, most))


def _stage(texts: Sequence[tuple[int, ...]], times: int, like: Tensor) -> Stage:
    longest = max(map(len, texts))
    padded = torch.tensor([[NONE] * (longest - len(text)) + list(text) for text in texts], device=like.device)
    return Stage(padded.clamp(min=0), padded >= 0, times)
