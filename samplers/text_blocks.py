"""Which part of a text is worked on, and when the text is over.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.canvas import Canvas, TextFacts
from hasten.part import Part
from hasten.recipe import Blocks
from hasten.samplers.scores import Scores, Sees


class BlockRule(Part):
    """Which slots are the next block? A family; `start()` gives the state for one generation.

    sees: whose logits it wants when a block begins.
    """

    sees: ClassVar[Sees] = "block"

    def start(self, facts: TextFacts) -> BlockState:
        """State of one generation."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class BlockState:
    """The state of a `BlockRule`."""

    def next(self, canvas: Canvas) -> Tensor:
        """The block after the present one, int64 [B, 2], clipped to what is generated; called for all texts."""
        raise NotImplementedError(f"{type(self).__name__} has no next().")

    def settle(self, canvas: Canvas, scores: Scores) -> None:
        """After each evaluation, before slots are written: may change blocks that have just begun (`since == 0`)."""


class EndRule(Part):
    """When is a text over? A family; `start()` gives the state for one generation."""

    sees: ClassVar[Sees] = "block"

    def start(self, facts: TextFacts) -> EndState:
        """State of one generation."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class EndState:
    """The state of an `EndRule`."""

    def ends(self, canvas: Canvas, scores: Scores) -> Tensor | None:
        """One past the last slot of each text, int64 [B], where it is known to be shorter; None: nothing changes."""
        raise NotImplementedError(f"{type(self).__name__} has no ends().")


class AtEndToken(EndRule):
    """At the first end-of-text token that is written and has nothing open before it.

    Exact: what lies behind it does not count, and nothing before it can still change. (Learn2PD cuts at the *most
    confident* predicted end without any threshold; see `docs/text-diffusion.md`.)
    """

    kind: ClassVar[str] = "end-token"

    def start(self, facts: TextFacts) -> EndState:
        return _AtEndTokenState(facts)


class _AtEndTokenState(EndState):
    def __init__(self, facts: TextFacts) -> None:
        self.facts = facts

    def ends(self, canvas: Canvas, scores: Scores) -> Tensor | None:
        if not self.facts.eos_ids:
            return None
        eos = torch.tensor(self.facts.eos_ids, device=canvas.ids.device)
        behind = canvas.place >= canvas.start[:, None]
        settled = (canvas.masked & behind).cumsum(1) == 0
        over = torch.isin(canvas.ids, eos) & (canvas.status == 2) & settled
        first = torch.where(over, canvas.place, canvas.slots).min(1).values
        return torch.minimum(first + 1, canvas.end)


class InBlocks(Blocks):
    """Blocks by `rule`, one after the other; the text is over when `end` says so (None: when all is written)."""

    kind: ClassVar[str] = "in-blocks"
    rule: BlockRule
    end: EndRule | None = AtEndToken()


class Whole(BlockRule):
    """One block: all that is generated (Dream, Saber)."""

    kind: ClassVar[str] = "whole"

    def start(self, facts: TextFacts) -> BlockState:
        return _FixedState(1 << 40, False)


class Fixed(BlockRule):
    """Blocks of `size` slots from left to right (LLaDA's semi-autoregressive order).

    aligned: blocks start at multiples of `size` from the beginning of the prompt, so that the first is shorter: what
    block-causal models were trained with. None: aligned for those models, and with their block size. The last block may
    be shorter in any case; LLaDA asserts that it is not.
    """

    kind: ClassVar[str] = "fixed"
    size: int = Field(32, ge=1)
    aligned: bool | None = None

    def start(self, facts: TextFacts) -> BlockState:
        if self.aligned is None and facts.block is not None:
            return _FixedState(facts.block, True)
        return _FixedState(self.size, bool(self.aligned))


class _FixedState(BlockState):
    def __init__(self, size: int, aligned: bool) -> None:
        self.size, self.aligned = size, aligned

    def next(self, canvas: Canvas) -> Tensor:
        low = canvas.span[:, 1]
        high = (low // self.size + 1) * self.size if self.aligned else low + self.size
        return torch.stack([low, torch.minimum(high, canvas.end)], 1)
