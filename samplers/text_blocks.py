"""Which part of a text is worked on.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.canvas import Canvas, TextFacts
from hasten.errors import UsageError
from hasten.part import Part
from hasten.recipe import Blocks
from hasten.samplers.scores import Scores, Sees
from hasten.samplers.text_ends import AtEndToken, EndRule


class BlockRule(Part):
    """Which slots are the next block? A family; `start()` gives the state for one generation.

    sees: whose logits it wants when a block begins. moves: the block moves while it is worked on, so that drafts cannot be
    verified in it.
    """

    sees: ClassVar[Sees] = "block"
    moves: ClassVar[bool] = False

    def start(self, facts: TextFacts) -> BlockState:
        """State of one generation."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class BlockState:
    """The state of a `BlockRule`. grain: slots per block of a block-causal model, 1 where every query sees all."""

    def __init__(self, facts: TextFacts) -> None:
        self.grain = facts.block or 1

    def next(self, canvas: Canvas) -> Tensor:
        """The block after the present one, int64 [B, 2], clipped to what is generated; called for all texts."""
        raise NotImplementedError(f"{type(self).__name__} has no next().")

    def outer(self, canvas: Canvas, span: Tensor) -> Tensor:
        """The block that `span` is a part of, int64 [B, 2] each, for caches: by default whole blocks of the model."""
        low = span[:, 0] // self.grain * self.grain
        high = (span[:, 1] + self.grain - 1) // self.grain * self.grain
        return torch.stack([torch.maximum(low, canvas.start), torch.minimum(high, canvas.end)], 1)

    def settle(self, canvas: Canvas, scores: Scores) -> None:
        """After each evaluation, before slots are written: may change blocks that have just begun (`since == 0`)."""

    def slide(self, canvas: Canvas) -> Tensor | None:
        """After each step: where the active blocks are now, int64 [B, 2]; None: where they were."""
        return None


class InBlocks(Blocks):
    """Blocks by `rule`, one after the other; the text is over when `end` says so (None: when all is written)."""

    kind: ClassVar[str] = "in-blocks"
    rule: BlockRule
    end: EndRule | None = AtEndToken()


class Whole(BlockRule):
    """One block: all that is generated (Dream, Saber)."""

    kind: ClassVar[str] = "whole"

    def start(self, facts: TextFacts) -> BlockState:
        return _FixedState(facts, 1 << 40, False)


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
            return _FixedState(facts, facts.block, True)
        return _FixedState(facts, self.size, bool(self.aligned))


class _FixedState(BlockState):
    def __init__(self, facts: TextFacts, size: int, aligned: bool) -> None:
        super().__init__(facts)
        self.size, self.aligned = size, aligned

    def next(self, canvas: Canvas) -> Tensor:
        low = canvas.span[:, 1]
        high = (low // self.size + 1) * self.size if self.aligned else low + self.size
        return torch.stack([low, torch.minimum(high, canvas.end)], 1)


class SubBlocks(BlockRule):
    """Blocks of `size` slots, and in each of them parts of `inner` slots from left to right (Fast-dLLM v2, arXiv
    2509.26328: 32 and 8).

    The active block is the part; `Canvas.outer` is what it is a part of, which is what an exact cache goes by. Blocks and
    parts of block-causal models are aligned to the beginning of the prompt and have the model's size; others begin
    where the prompt ends.
    """

    kind: ClassVar[str] = "sub-blocks"
    size: int = Field(32, ge=1)
    inner: int = Field(8, ge=1)

    def start(self, facts: TextFacts) -> BlockState:
        return _SubBlocksState(facts, facts.block or self.size, self.inner)


class _SubBlocksState(BlockState):
    def __init__(self, facts: TextFacts, size: int, inner: int) -> None:
        super().__init__(facts)
        self.size, self.inner, self.aligned = size, inner, facts.block is not None

    def next(self, canvas: Canvas) -> Tensor:
        low = canvas.span[:, 1]
        block = self._block(canvas, low)
        part = block + ((low - block) // self.inner + 1) * self.inner
        return torch.stack([low, torch.minimum(torch.minimum(part, block + self.size), canvas.end)], 1)

    def outer(self, canvas: Canvas, span: Tensor) -> Tensor:
        block = self._block(canvas, span[:, 0])
        return torch.stack([torch.maximum(block, canvas.start), torch.minimum(block + self.size, canvas.end)], 1)

    def _block(self, canvas: Canvas, low: Tensor) -> Tensor:
        """Where the block of slot `low` begins (with aligned blocks: maybe in the prompt)."""
        origin = torch.zeros_like(low) if self.aligned else canvas.start
        return origin + (low - origin) // self.size * self.size


class Window(BlockRule):
    """The leftmost `size` open slots, after each step anew (Elastic-Cache, arXiv 2510.14973: 16, for Dream 32).

    The block begins with what was written in the last step, so that caches which compute blocks see it once as it is. On
    block-causal models it does not reach beyond the model's block.
    """

    kind: ClassVar[str] = "window"
    moves: ClassVar[bool] = True
    size: int = Field(16, ge=1)

    def start(self, facts: TextFacts) -> BlockState:
        return _WindowState(facts, self.size)


class _WindowState(BlockState):
    def __init__(self, facts: TextFacts, size: int) -> None:
        super().__init__(facts)
        self.size, self.causal = size, facts.block is not None

    def next(self, canvas: Canvas) -> Tensor:
        new = (canvas.committed >= canvas.step[:, None] - 1) & (canvas.committed >= 0)
        low = _before_first(canvas.masked | new)
        high = (canvas.masked.cumsum(1) < self.size).sum(1) + 1
        if self.causal:
            high = torch.minimum(high, (_before_first(canvas.masked) // self.grain + 1) * self.grain)
        high = torch.minimum(high, canvas.end)
        return torch.stack([torch.minimum(low, high), high], 1)

    def slide(self, canvas: Canvas) -> Tensor | None:
        return self.next(canvas)


class AtDelimiter(BlockRule):
    """Blocks that end where a sentence does (AdaBlock, arXiv 2509.26432).

    The first evaluation of a block looks at its first `share` of all generated slots: of those where a delimiter is
    predicted, the surest one ends the block (and is in it) if its confidence is at least `above`; otherwise the block
    has `size` slots. On block-causal models it does not reach beyond the model's block.

    words: delimiters as text, each a single token; the pipeline makes `ids` of them. Defaults are the paper's (line
    breaks; its ablation adds "," and "."). Their code has a batch of 1, and truncates `share` of the slots likewise.
    """

    kind: ClassVar[str] = "at-delimiter"
    sees: ClassVar[Sees] = "rest"
    above: float = Field(0.3, ge=0, le=1)
    size: int = Field(32, ge=1)
    share: float = Field(0.25, gt=0, le=1)
    words: tuple[str, ...] = ("\n",)
    ids: tuple[int, ...] = ()

    def told(self, encode: Callable[[str], Sequence[int]]) -> AtDelimiter:
        """The same with `ids` from a tokenizer's encode (without special tokens). Words of several tokens are left out;
        raises `UsageError` where nothing remains."""
        single = [tuple(encode(word)) for word in self.words]
        ids = tuple(tokens[0] for tokens in single if len(tokens) == 1)
        if not ids:
            raise UsageError(
                f"None of the delimiters {list(self.words)} is a single token of this tokenizer. Set the block rule's words"
                " to ones that are, or its ids."
            )
        return self.model_copy(update={"ids": ids})

    def start(self, facts: TextFacts) -> BlockState:
        if not self.ids:
            raise UsageError(
                "Blocks that end at delimiters need the ids of these. Pass a tokenizer to the pipeline, or set the block"
                " rule's ids."
            )
        return _AtDelimiterState(self, facts)


class _AtDelimiterState(BlockState):
    def __init__(self, rule: AtDelimiter, facts: TextFacts) -> None:
        super().__init__(facts)
        self.rule, self.causal = rule, facts.block is not None

    def next(self, canvas: Canvas) -> Tensor:
        low = canvas.span[:, 1]
        return torch.stack([low, torch.minimum(low + self.rule.size, self._limit(canvas, low))], 1)

    def settle(self, canvas: Canvas, scores: Scores) -> None:
        low = canvas.span[:, 0]
        reach = ((canvas.end - canvas.start) * self.rule.share).long()
        window = canvas.inside(low, torch.minimum(low + reach, self._limit(canvas, low)))
        delimiters = torch.tensor(self.rule.ids, device=canvas.ids.device)
        marks = window & canvas.masked & scores.seen & torch.isin(scores.token, delimiters)
        surest, at = torch.where(marks, scores.confidence, -1.0).max(1)
        span = torch.stack([low, torch.where(surest >= self.rule.above, at + 1, canvas.span[:, 1])], 1)
        canvas.enter(canvas.open & (canvas.since == 0), span, self.outer(canvas, span))

    def _limit(self, canvas: Canvas, low: Tensor) -> Tensor:
        """One past the last slot that the block may have."""
        return torch.minimum(canvas.end, (low // self.grain + 1) * self.grain) if self.causal else canvas.end


def _before_first(chosen: Tensor) -> Tensor:
    """How many slots stand before the first of `chosen` (bool [B, L]), int64 [B]; L where there is none."""
    return (chosen.cumsum(1) == 0).sum(1)
