"""Selectors: budgets are kept, shares add up, roles and infinities are respected, and the closed loop settles."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from hasten.errors import RecipeError
from hasten.part import Part
from hasten.sparse_attn.blocks import ALWAYS, SELECT, SPARSE, Blocks, Order
from hasten.sparse_attn.selectors.selector import Selector
from hasten.sparse_attn.selectors.target import TargetRecall
from hasten.sparse_attn.selectors.top import Above, All, SelfTopP, TopK, TopP
from tests.contract import PartContract
from tests.sparse_attn.random_blocks import generator

NEEDED = {"top-k": {"share": 0.3}, "share-above": {"limit": 0.01}}


@pytest.fixture(params=sorted(Selector.members()))
def part(request: pytest.FixtureRequest) -> Part:
    return Selector.members()[request.param](**NEEDED.get(request.param, {}))


class TestContract(PartContract):
    """What every selector does."""

    family = Selector

    def test_each_row_keeps_something_and_nothing_ruled_out(self, part: Selector) -> None:
        scores, blocks = example(0)
        scores[:, :, 3] = -math.inf
        keep = part.start().keep(scores, blocks)
        assert keep.dtype == torch.bool and keep.shape == scores.shape
        assert keep.any(-1).all()
        assert not keep[:, :, 3].any()

    def test_plus_infinity_is_always_read_beside_what_is_chosen(self, part: Selector) -> None:
        scores, blocks = example(1)
        forced = scores.clone()
        forced[:, 1, 4] = math.inf
        without = scores.clone()
        without[:, 1, 4] = -math.inf
        keep = part.start().keep(forced, blocks)
        assert keep[:, 1, 4].all()
        expected = part.start().keep(without, blocks)
        expected[:, 1, 4] = True
        assert torch.equal(keep, expected)

    def test_rows_without_candidates_read_nothing(self, part: Selector) -> None:
        scores, blocks = example(2)
        scores[:, 2] = -math.inf
        keep = part.start().keep(scores, blocks)
        assert not keep[:, 2].any() and keep[:, 1].any()

    def test_the_same_scores_give_the_same_choice_also_where_they_tie(self, part: Selector) -> None:
        _, blocks = example(3)
        scores = torch.zeros(2, 4, 9)
        assert torch.equal(part.start().keep(scores, blocks), part.start().keep(scores.clone(), blocks))

    def test_blocks_of_other_roles_take_no_part_of_the_budget(self, part: Selector) -> None:
        scores, _ = example(4)
        roles = torch.tensor([SELECT] * 7 + [ALWAYS] * 2, dtype=torch.int8)
        _, blocks = example(4, roles)
        changed = scores.clone()
        changed[:, :, 7:] = 50.0
        keep, other = (part.start().keep(x, blocks)[:, :, :7] for x in (scores, changed))
        assert torch.equal(keep, other)

    def test_a_plane_does_not_depend_on_the_others(self, part: Selector) -> None:
        scores, blocks = example(5)
        both = part.start().keep(scores, blocks)
        assert torch.equal(both[1:], part.start().keep(scores[1:], blocks))


def example(seed: int, roles: Tensor | None = None) -> tuple[Tensor, Blocks]:
    """Scores [2, 4, 9] and blocks of 1 to 16 tokens."""
    scores = torch.randn(2, 4, 9, generator=generator(seed)) * 3
    return scores, blocks_of([16, 16, 3, 7, 5, 16, 1, 8, 16], roles)


def blocks_of(sizes: list[int], roles: Tensor | None = None) -> Blocks:
    bounds = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0).int()[None]
    roles = torch.full((len(sizes),), SELECT, dtype=torch.int8) if roles is None else roles
    q = Order(None, torch.tensor([[0, 16, 32, 40, 41]], dtype=torch.int32), torch.full((4,), SPARSE, dtype=torch.int8))
    return Blocks(q, Order(None, bounds, roles, None, sum(sizes)))


finite = st.floats(-20, 20, width=32)


@st.composite
def tables(draw: st.DrawFn) -> Tensor:
    """Scores [1, 3, C], with ties and blocks that are ruled out."""
    count = draw(st.integers(1, 12))
    value = st.one_of(finite, st.just(-math.inf), st.just(0.0))
    return torch.tensor(draw(st.lists(st.lists(value, min_size=count, max_size=count), min_size=3, max_size=3)))[None]


@given(tables(), st.floats(0.01, 1.0))
@settings(max_examples=100, deadline=None)
def test_top_k_reads_exactly_its_share_of_the_candidates(scores: Tensor, share: float) -> None:
    keep = TopK(share=share).start().keep(scores, blocks_of([4] * scores.shape[2]))
    for row, chosen in zip(scores[0], keep[0], strict=True):
        candidates = int(row.isfinite().sum())
        expected = max(1, math.ceil(share * candidates - 1e-4)) if candidates else 0
        assert int(chosen.sum()) == expected
        if 0 < expected < candidates:
            assert row[chosen].min() >= row[~chosen & row.isfinite()].max()


@given(tables(), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_top_k_reads_exactly_its_count(scores: Tensor, count: int) -> None:
    keep = TopK(count=count).start().keep(scores, blocks_of([4] * scores.shape[2]))
    assert torch.equal(keep.sum(-1), scores.isfinite().sum(-1).clamp(max=count))


@given(tables(), st.floats(0.01, 1.0), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_top_p_keeps_at_least_p_and_no_more_than_it_must(scores: Tensor, p: float, floor: float) -> None:
    keep = TopP(p=p, floor=floor).start().keep(scores, blocks_of([4] * scores.shape[2]))
    for row, chosen in zip(scores[0].double(), keep[0], strict=True):
        if not row.isfinite().any():
            continue
        mass = row.softmax(-1)
        least = max(1, math.ceil(floor * int(row.isfinite().sum()) - 1e-4))
        assert float(mass[chosen].sum()) >= p - 1e-5
        assert int(chosen.sum()) >= least
        if int(chosen.sum()) > least:
            assert float(mass[chosen].sum() - mass[chosen].min()) < p + 1e-5, "one block fewer would do"


def test_the_cap_limits_top_p() -> None:
    keep = TopP(p=1.0, cap=0.25).start().keep(torch.zeros(1, 4, 8), blocks_of([4] * 8))
    assert keep.sum(-1).tolist() == [[2, 2, 2, 2]]


def test_a_share_of_tokens_counts_tokens() -> None:
    scores = torch.tensor([[[5.0, 4.0, 3.0, 2.0, 1.0]]])
    blocks = blocks_of([60, 10, 10, 10, 10])
    by_blocks = TopK(share=0.6).start().keep(scores, blocks)
    by_tokens = TopK(share=0.6, by="tokens").start().keep(scores, blocks)
    assert by_blocks.tolist() == [[[True, True, True, False, False]]]
    assert by_tokens.tolist() == [[[True, False, False, False, False]]]


@given(tables(), st.floats(0.05, 1.0))
@settings(max_examples=60, deadline=None)
def test_a_share_of_tokens_comes_within_half_a_block(scores: Tensor, share: float) -> None:
    sizes = [1 + 5 * (number % 3) for number in range(scores.shape[2])]
    keep = TopK(share=share, by="tokens").start().keep(scores, blocks_of(sizes))
    tokens = torch.tensor(sizes)
    for row, chosen in zip(scores[0], keep[0], strict=True):
        total = int(tokens[row.isfinite()].sum())
        if total and int(chosen.sum()) > 1:
            assert abs(int(tokens[chosen].sum()) - share * total) <= 6


def test_above_counts_deviations_over_candidates_only() -> None:
    scores = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 10.0, -math.inf, math.inf]]])
    keep = Above(tau=1.0).start().keep(scores, blocks_of([4] * 7))
    assert keep.tolist() == [[[False, False, False, False, True, False, True]]]
    flat = Above(tau=1.0).start().keep(torch.zeros(1, 1, 7), blocks_of([4] * 7))
    assert flat.tolist() == [[[True] + [False] * 6]]


def test_above_reads_the_share_that_a_normal_has_there() -> None:
    scores = torch.randn(1, 64, 1000, generator=generator(0))
    share = float(Above(tau=1.0).start().keep(scores, Blocks(long(64), long(1000))).float().mean())
    assert abs(share - 0.1587) < 0.01


def long(count: int) -> Order:
    return Order(None, torch.arange(count + 1, dtype=torch.int32)[None] * 4, torch.zeros(count, dtype=torch.int8))


def test_one_budget_gives_spread_rows_more() -> None:
    sharp, flat = torch.tensor([20.0] + [0.0] * 7), torch.zeros(8)
    scores = torch.stack([sharp, flat])[None]
    q = Order(None, torch.tensor([[0, 16, 32]], dtype=torch.int32), torch.zeros(2, dtype=torch.int8))
    keep = SelfTopP(share=0.5).start().keep(scores, Blocks(q, long(8)))
    assert keep.sum(-1).tolist() == [[1, 7]]
    together = SelfTopP(share=0.5, together=True)
    both = together.start().keep(torch.stack([sharp.expand(2, -1), flat.expand(2, -1)]), Blocks(q, long(8)))
    assert both.sum((1, 2)).tolist() == [2, 14]


def test_one_budget_reads_its_share_of_pairs_of_tokens() -> None:
    scores, blocks = example(7)
    keep = SelfTopP(share=0.4).start().keep(scores, blocks)
    pairs = keep * blocks.q.sizes[:, :, None] * blocks.k.sizes[:, None, :]
    total = int(blocks.q.sizes.sum() * blocks.k.sizes.sum())
    assert (pairs.sum((1, 2)) - 0.4 * total).abs().max() <= 16 * 16


@pytest.mark.parametrize(
    "arguments",
    [
        (TopK, {}), (TopK, {"share": 0.5, "count": 3}), (TopK, {"count": 3, "by": "tokens"}),
        (TopP, {"floor": 0.5, "cap": 0.2}), (TargetRecall, {"target": 0.4}),
    ],
)  # fmt: skip
def test_budgets_that_contradict_themselves_are_refused(arguments: tuple[type[Selector], dict[str, float]]) -> None:
    member, given_ = arguments
    with pytest.raises((ValidationError, RecipeError)):
        member(**given_)


def test_all_reads_what_is_not_ruled_out() -> None:
    scores = torch.tensor([[[0.0, -math.inf, -50.0, math.inf]]])
    assert All().start().keep(scores, blocks_of([4] * 4)).tolist() == [[[True, False, True, True]]]
