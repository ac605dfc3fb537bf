"""Which part of a text is worked on: that blocks cover a text, what delimiters and windows do, by hand.

Shapes: B texts, L slots.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.canvas import Canvas
from hasten.errors import UsageError
from hasten.samplers.scores import Scores
from hasten.samplers.text_blocks import AtDelimiter, BlockRule, Fixed, SubBlocks, Whole, Window
from tests.contract import PartContract
from tests.text_models import FIRST, facts, scripted

STOP = 9
NEEDED = {"at-delimiter": {"ids": (STOP,)}}
LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 25)), min_size=1, max_size=4)
MODEL_BLOCKS = st.sampled_from([None, 1, 3, 4, 8])


def canvas_of(lengths: list[tuple[int, int]]) -> Canvas:
    return Canvas.of([torch.full((prompt,), FIRST) for prompt, _ in lengths], [new for _, new in lengths], facts())


def fill(canvas: Canvas, chosen: Tensor) -> None:
    """Write the slots `chosen`, as one step does."""
    canvas.write(chosen, torch.full_like(canvas.ids, 5), torch.ones_like(canvas.confidence))
    canvas.step, canvas.since = canvas.step + 1, canvas.since + 1


def blocks_of(rule: BlockRule, canvas: Canvas, block: int | None) -> list[list[tuple[int, int, int, int]]]:
    """Each text's blocks [low, high) in the order in which they are worked on, with the outer ones."""
    state, found = rule.start(facts(block)), [[] for _ in range(len(canvas.ids))]  # type: ignore[var-annotated]
    while bool(canvas.masked.any()):
        span = state.next(canvas)
        begins = ~canvas.eligible.any(1) & canvas.masked.any(1)
        canvas.enter(begins, span, state.outer(canvas, span))
        state.settle(canvas, Scores.blank(canvas))
        for text in begins.nonzero()[:, 0].tolist():
            found[text].append((*canvas.span[text].tolist(), *canvas.outer[text].tolist()))
        fill(canvas, canvas.eligible)
    return found


@pytest.mark.parametrize(
    "part", [pytest.param(made(**NEEDED.get(kind, {})), id=kind) for kind, made in sorted(BlockRule.members().items())]
)
class TestEveryBlockRule(PartContract):
    family = BlockRule

    @settings(max_examples=40, deadline=None)
    @given(LENGTHS, MODEL_BLOCKS)
    def test_blocks_cover_the_text_in_order(
        self, part: BlockRule, lengths: list[tuple[int, int]], block: int | None
    ) -> None:
        """Once, but for blocks that move: these begin with what has just been written."""
        for (start, new), found in zip(lengths, blocks_of(part, canvas_of(lengths), block), strict=True):
            low = start
            for first, last, outer_low, outer_high in found:
                assert first <= low < last <= start + new and (part.moves or first == low)
                assert start <= outer_low <= first and last <= outer_high <= start + new
                low = last
            assert low == start + new

    @settings(max_examples=20, deadline=None)
    @given(LENGTHS, MODEL_BLOCKS)
    def test_a_text_does_not_know_the_others(
        self, part: BlockRule, lengths: list[tuple[int, int]], block: int | None
    ) -> None:
        if part.moves and len(lengths) > 1:
            lengths = [lengths[0]] * len(lengths)  # these go by steps, which the texts here share
        together = blocks_of(part, canvas_of(lengths), block)
        assert together == [blocks_of(part, canvas_of([length]), block)[0] for length in lengths]


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.sampled_from([Fixed(), SubBlocks(inner=3), AtDelimiter(ids=(STOP,))]))
def test_no_block_reaches_beyond_the_models(lengths: list[tuple[int, int]], block: int, rule: BlockRule) -> None:
    for found in blocks_of(rule, canvas_of(lengths), block):
        assert all((high - 1) // block == low // block for low, high, _, _ in found)


def test_sub_blocks_lie_in_their_blocks() -> None:
    free = blocks_of(SubBlocks(size=8, inner=3), canvas_of([(2, 13)]), None)[0]
    assert free == [(2, 5, 2, 10), (5, 8, 2, 10), (8, 10, 2, 10), (10, 13, 10, 15), (13, 15, 10, 15)]
    aligned = blocks_of(SubBlocks(size=99, inner=3), canvas_of([(4, 11)]), 8)[0]
    assert aligned == [(4, 6, 4, 8), (6, 8, 4, 8), (8, 11, 8, 15), (11, 14, 8, 15), (14, 15, 8, 15)]


def test_fixed_blocks_by_hand() -> None:
    assert [span[:2] for span in blocks_of(Fixed(size=4), canvas_of([(3, 9)]), None)[0]] == [(3, 7), (7, 11), (11, 12)]
    aligned = blocks_of(Fixed(size=4, aligned=True), canvas_of([(3, 9)]), None)[0]
    assert [span[:2] for span in aligned] == [(3, 4), (4, 8), (8, 12)]
    assert [span[:2] for span in blocks_of(Whole(), canvas_of([(3, 9)]), None)[0]] == [(3, 12)]
    assert blocks_of(Fixed(size=3, aligned=False), canvas_of([(3, 5)]), 4)[0] == [(3, 6, 3, 8), (6, 8, 4, 8)]


class TestWindow:
    @settings(max_examples=40, deadline=None)
    @given(LENGTHS, st.integers(1, 7), st.integers(0, 1 << 30))
    def test_the_leftmost_open_slots_may_be_written(self, lengths: list[tuple[int, int]], size: int, seed: int) -> None:
        canvas, g = canvas_of(lengths), torch.Generator().manual_seed(seed)
        state = Window(size=size).start(facts())
        canvas.enter(canvas.open.clone(), state.next(canvas))
        while bool(canvas.masked.any()):
            leftmost = canvas.masked & (canvas.masked.cumsum(1) <= size)
            assert torch.equal(canvas.eligible, leftmost)
            chosen = canvas.eligible & (torch.rand(canvas.ids.shape, generator=g) < 0.5)
            chosen |= canvas.eligible & (canvas.eligible.cumsum(1) == 1) & ~chosen.any(1)[:, None]
            fill(canvas, chosen)
            span = state.slide(canvas)
            assert span is not None
            inside = canvas.inside(*span.unbind(1))
            assert not bool((chosen & ~inside & canvas.masked.any(1)[:, None]).any()), "what was written is computed again"
            canvas.move(canvas.masked.any(1), span)
            canvas.open = canvas.masked.any(1)

    def test_it_goes_on_without_beginning_anew(self) -> None:
        canvas, state = canvas_of([(2, 9)]), Window(size=3).start(facts())
        canvas.enter(canvas.open.clone(), state.next(canvas))
        assert canvas.span.tolist() == [[2, 5]]
        fill(canvas, canvas.eligible & (canvas.place == 3))
        assert state.slide(canvas) is not None and canvas.since.tolist() == [1]
        assert state.next(canvas).tolist() == [[2, 6]]


class TestAtDelimiter:
    """Blocks of 6 slots by default; a quarter of 24 slots is looked at."""

    RULE = AtDelimiter(ids=(STOP, 8), size=6, above=0.3)

    def settled(self, confidence: list[float], token: list[int], rule: AtDelimiter | None = None, since: int = 0) -> Canvas:
        canvas = canvas_of([(2, 24)])
        state = (rule or self.RULE).start(facts())
        canvas.enter(canvas.open.clone(), torch.tensor([[2, 26]]))
        scores = scripted(canvas, [confidence], token=[token])
        canvas.enter(canvas.open.clone(), torch.tensor([[2, 8]]))
        canvas.since = canvas.since + since
        state.settle(canvas, scores)
        return canvas

    def test_the_surest_delimiter_ends_the_block(self) -> None:
        canvas = self.settled([0.9, 0.4, 0.9, 0.5, 0.9], [5, STOP, 5, 8, 5])
        assert canvas.span.tolist() == [[2, 6]] and canvas.begun.tolist() == [4]

    def test_it_has_to_be_sure_enough(self) -> None:
        assert self.settled([0.9, 0.29, 0.9], [5, STOP, 5]).span.tolist() == [[2, 8]]
        assert self.settled([0.9, 0.3, 0.9], [5, STOP, 5]).span.tolist() == [[2, 4]]

    def test_only_the_share_is_looked_at_and_it_may_lie_behind_the_default_block(self) -> None:
        far = [5] * 5 + [STOP]
        assert self.settled([0.5] * 6, far).span.tolist() == [[2, 8]]
        assert self.settled([0.5] * 7, [5] * 6 + [STOP]).span.tolist() == [[2, 8]], "the seventh is not in a quarter of 24"
        wide = AtDelimiter(ids=(STOP,), size=6, share=0.5)
        assert self.settled([0.5] * 10, [5] * 9 + [STOP], wide).span.tolist() == [[2, 12]]

    def test_a_block_that_is_under_way_stays(self) -> None:
        assert self.settled([0.9, 0.9], [5, STOP], since=1).span.tolist() == [[2, 8]]

    def test_what_was_not_evaluated_says_nothing(self) -> None:
        canvas, state = canvas_of([(2, 24)]), self.RULE.start(facts())
        canvas.enter(canvas.open.clone(), torch.tensor([[2, 8]]))
        scores = scripted(canvas, [[0.9] * 6], token=[[STOP] * 6])
        scores.seen[:] = False
        state.settle(canvas, scores)
        assert canvas.span.tolist() == [[2, 8]]

    def test_words_become_ids(self) -> None:
        words = {"\n": [198], ",": [11], "...": [4, 5]}
        assert AtDelimiter(words=("\n", ",", "...")).told(lambda word: words[word]).ids == (198, 11)
        with pytest.raises(UsageError, match="single token"):
            AtDelimiter(words=("...",)).told(lambda word: words[word])
        with pytest.raises(UsageError, match="ids"):
            AtDelimiter().start(facts())
