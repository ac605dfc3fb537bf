"""What lies behind the active block is computed once more when the block is full, and never again.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from hasten.caching.kv import Rows, TokenKV, TokenKVState, stretches
from hasten.caching.store import KVStore
from hasten.canvas import Canvas, Row, TextFacts
from hasten.errors import RefusedError


class BlockCausal(TokenKV):
    """Full recomputation on block-causal models at the price of a block (SDAR, LLaDA2, BD3-LM, Fast-dLLM v2), exactly.

    A slot's keys depend on what stands in its own block of the model and before, so they stay right until one of these
    slots is written. Each call computes from the first block that has been written in since it was computed to the end of
    the active one. At the first step of a block, that is the block before, full now, and the block itself in one call;
    at the first step of all, the prompt and the first block; in between, the block alone; after the last block, nothing.
    The published samplers pay one more call per block that only stores the clean keys, and one for the prompt.

    Blocks of the recipe may be shorter or longer than the model's; in nested ones too, everything is computed that can
    have changed.
    """

    kind: ClassVar[str] = "block-causal"
    exact: ClassVar[bool] = True

    @property
    def steady(self) -> bool:
        return True

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        if facts.block is None:
            raise RefusedError(
                "kv 'block-causal' is exact on block-causal models only; in this one every token sees all, so that no key"
                " stays as it is. Take 'dual', 'prefix' or another approximate cache, or 'recompute'."
            )
        return _BlockCausalState(facts.block)


class Freeze(TokenKV):
    """Prompt and full blocks are frozen, and what is computed shrinks as the text grows (FreeCache, in FlashDLM, arXiv
    2505.21467).

    Each call computes from the active block to the end of the text; the first one of a block takes the block before along,
    so that what is frozen is the keys of its tokens, and not those of the masks that stood there (the paper does not
    say when it freezes them). Never refreshed: on models in which every token sees all, approximate.
    """

    kind: ClassVar[str] = "freeze"

    @property
    def steady(self) -> bool:
        return True

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        return _FreezeState(facts.block or 1)


class Nested(TokenKV):
    """Blocks within blocks (Fast-dLLM v2, arXiv 2509.26328): `Freeze` across the outer ones, `Dual` across the inner ones.

    The first step of an inner block computes the outer one (and the outer one before, when it is new); the others compute
    the inner block alone. Across the outer blocks it is exact on models whose blocks they are; within, approximate. Wants
    a rule with nested blocks; without one it is `Dual` with frozen blocks. The authors recompute an inner block's
    surroundings when its first slot is open; here, whenever it is new.
    """

    kind: ClassVar[str] = "nested"

    @property
    def steady(self) -> bool:
        return True

    def start(self, facts: TextFacts, store: KVStore) -> TokenKVState:
        return _NestedState(facts.block or 1)


class _FrontState(TokenKVState):
    """front: of each text, the slot from which on something has changed since it was computed.

    What changes lies in the active block, so the front is where that begins: no tensor has to be asked.
    """

    def __init__(self, grain: int) -> None:
        self.grain = grain
        self.front: dict[int, int] = {}

    def plan(self, canvas: Canvas, rows: Sequence[Row]) -> list[Rows]:
        spans = {text: self._stretch(text, row) for text, row in enumerate(rows) if row.open}
        return stretches(canvas, rows, spans)

    def _stretch(self, text: int, row: Row) -> tuple[int, int]:
        """Slots [from, to) of this text that the step computes; subclasses say which."""
        raise NotImplementedError(f"{type(self).__name__} has no _stretch().")

    def _advance(self, text: int, low: int) -> int:
        """Where the front was; it goes on to the model's block in which `low` lies."""
        was = self.front.get(text, 0)
        self.front[text] = low // self.grain * self.grain
        return min(was, self.front[text])

    def _closed(self, high: int, end: int) -> int:
        """The end of the model's block that `high` lies in: its last slots are seen by those before."""
        return min(-(-high // self.grain) * self.grain, end)


class _BlockCausalState(_FrontState):
    def _stretch(self, text: int, row: Row) -> tuple[int, int]:
        return self._advance(text, row.low), self._closed(row.high, row.end)


class _FreezeState(_FrontState):
    def _stretch(self, text: int, row: Row) -> tuple[int, int]:
        return self._advance(text, row.low), row.end


class _NestedState(_FrontState):
    def _stretch(self, text: int, row: Row) -> tuple[int, int]:
        if row.since > 0:
            return row.low, row.high
        return self._advance(text, row.outer_low), self._closed(row.outer_high, row.end)
