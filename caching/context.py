"""Reuse of decided tokens in masked image models: between full evaluations only undecided tokens are computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from hasten.caching.histories import Histories, Key
from hasten.caching.rules import Every
from hasten.caching.signals import Signal, SignalState
from hasten.drift import Rule
from hasten.errors import RecipeError
from hasten.forecast import Hold
from hasten.recipe import ReusePolicy
from hasten.step import Step

OUTPUT = "output"
"""Site of what the last transformer layer returns; the others are key and value projections."""


class ContextReuse(ReusePolicy):
    """Interleave full evaluations with local ones, in which decided tokens are context only (ReCAP, arXiv 2505.19089).

    A local evaluation sends through the transformer layers the tokens that are still masked or were decided since the
    last evaluation. They attend to all tokens, by keys and values kept from when each was last computed; the rest of
    the last layer's output is kept too. Exact where the context has not changed. Differs from the paper: tokens that
    were decided since are computed once more, so that no later step sees the features of a mask in their place.

    rule: a schedule; a step that it skips is a local one.
    """

    kind: ClassVar[str] = "context"
    rule: Rule = Every(interval=2)

    @model_validator(mode="after")
    def _schedules_only(self) -> ContextReuse:
        if self.rule.needs_signal or self.rule.needs_errors:
            raise RecipeError(
                f"reuse.rule = {self.rule.kind!r} compares a signal, and context reuse measures none; allowed are schedules"
                " (every, window, spread, listed). Use the network span with the signal tokens_changed."
            )
        return self

    def start(self, times: Sequence[float] = ()) -> ContextState:
        """Fresh state for one run of one network. times: `Step.time` of each step, where known."""
        return ContextState(self, times)


class ContextState:
    """State of `ContextReuse` for one run: keys, values and the last output of each branch, and the ids they belong to."""

    def __init__(self, policy: ContextReuse, times: Sequence[float] = ()) -> None:
        self.policy = policy
        self.histories = Histories(Hold())
        self._ids: dict[int, Tensor] = {}
        self._rule = policy.rule.start(times)
        self._decided = -1
        self._skipping = False

    def active(self, step: Step, key: Key, ids: Tensor, mask: int) -> Tensor | None:
        """Positions (batch, n) of the tokens to compute; None for all of them. One host synchronisation on local steps.

        ids: (batch, height, width), integers; mask: the id of an undecided token.
        """
        if step.index != self._decided:
            self._decided = step.index
            poisoned = self.histories.drop_poisoned()  # a NaN or Inf was computed: forget it and compute afresh
            self._skipping = self._rule.skip(step, None) and not poisoned
        held = self.held(step, OUTPUT, key) if self._skipping else None
        before, self._ids[step.branch] = self._ids.get(step.branch), ids.clone()
        if held is None or before is None or before.shape != ids.shape:
            return None
        tokens = pooled((ids == mask) | (ids != before), held.shape[1])
        if tokens is None:
            return None
        num = max(1, int(tokens.sum(1).max()))
        return tokens.int().topk(num, dim=1).indices

    def held(self, step: Step, site: str, key: Key) -> Tensor | None:
        """A copy of what `site` gave for all tokens, (batch, tokens, channels)."""
        found = self.histories.estimate(step.branch, site, key, step.time)
        return None if found is None else found[0]

    def keep(self, step: Step, site: str, key: Key, value: Tensor) -> None:
        """`site` now stands at `value` for all tokens."""
        self.histories.store(step.branch, site, key, step.time, [value])


class TokensChanged(Signal):
    """Share of the token ids that differ from the previous step's: how far a masked image model has moved.

    Works on any input; for continuous latents nearly all entries change, so it then says nothing.
    """

    kind: ClassVar[str] = "tokens_changed"

    def start(self) -> SignalState:
        return _TokensChanged()


class _TokensChanged:
    def __init__(self) -> None:
        self.previous: Tensor | None = None

    def measure(self, step: Step, x: Tensor) -> Tensor | None:
        previous, self.previous = self.previous, x.clone()
        return None if previous is None or previous.shape != x.shape else (x != previous).float().mean()

    def observe(self, step: Step, x: Tensor, y: Tensor) -> None:
        return None

    def tensors(self) -> list[Tensor]:
        return [] if self.previous is None else [self.previous]


def pooled(flags: Tensor, num: int) -> Tensor | None:
    """Flags (batch, height, width) of ids as flags (batch, num) of tokens, each of which covers a square of ids.

    None when `num` tokens cannot be squares of them.
    """
    height, width = flags.shape[-2:]
    side = math.isqrt(max(1, height * width // max(1, num)))
    if side * side * num != height * width or height % side or width % side:
        return None
    small: Tensor = F.max_pool2d(flags.float()[:, None], side)
    return (small > 0).flatten(1)


def gathered(x: Tensor, positions: Tensor) -> Tensor:
    """Rows `positions` (batch, n) of `x` (batch, tokens, channels)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def scattered(x: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """`x` (batch, tokens, channels) with `rows` (batch, n, channels) at `positions`."""
    return x.scatter(1, positions[..., None].expand(-1, -1, x.shape[-1]), rows)


def every_second(x: Tensor) -> Tensor:
    """Positions of every second token of `x` (batch, tokens, channels)."""
    return torch.arange(0, x.shape[1], 2, device=x.device).expand(x.shape[0], -1)
