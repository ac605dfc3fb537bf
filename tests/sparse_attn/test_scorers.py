"""Scorers against naive sums over pairs of tokens, and what every scorer owes to its caller."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from hasten.errors import UsageError
from hasten.part import Part
from hasten.sparse_attn.extent import FORBIDDEN, block_states
from hasten.sparse_attn.layouts.kmeans import KMeans
from hasten.sparse_attn.layouts.layout import Identity
from hasten.sparse_attn.layouts.tree import Tree
from hasten.sparse_attn.mask import causal
from hasten.sparse_attn.scorers.bands import AShape
from hasten.sparse_attn.scorers.both import Both
from hasten.sparse_attn.scorers.columns import LastQueries, diagonal_means
from hasten.sparse_attn.scorers.pooled import Antidiagonal, Centroid, MeanRows, Pooled, similarity
from hasten.sparse_attn.scorers.scorer import Scorer, View, products
from hasten.sparse_attn.scorers.spans import Near, Spans
from hasten.sparse_attn.scorers.static import Static
from hasten.sparse_attn.segments import Segment, Tokens, padding, plain, text
from hasten.sparse_attn.text.hierarchical import Hierarchical
from tests.contract import PartContract
from tests.sparse_attn.random_blocks import normal
from tests.sparse_attn.views import GRID, clustered, labels, tokens_of, true_mass, view_of

NEEDED: dict[str, dict[str, Any]] = {
    "neighbourhood": {"window": (3, 3, 3)},
    "spans": {"spans": (Near(window=20, sinks=4),)},
    "both": {"first": AShape(sink=4, window=20), "second": Pooled()},
}


WEIGHING = sorted(kind for kind, member in Scorer.members().items() if not issubclass(member, Static | Spans | Hierarchical | Both))
"""Scorers that say how much a block is worth; the others choose blocks by themselves."""


@pytest.fixture(params=sorted(Scorer.members()))
def part(request: pytest.FixtureRequest) -> Part:
    return Scorer.members()[request.param](**NEEDED.get(request.param, {}))


class TestContract(PartContract):
    """What every scorer does."""

    family = Scorer

    def test_scores_are_float32_of_all_pairs_and_never_nan(self, part: Scorer) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            view = view_of(0, tokens_of(text(9)), dtype=dtype)
            scores = started(part, view).scores(view)
            assert scores.dtype == torch.float32
            assert scores.shape[0] in (1, 8)
            assert scores.shape[1:] == (view.blocks.q.count, view.blocks.k.count)
            assert not scores.isnan().any()

    @pytest.mark.parametrize("part", WEIGHING, indirect=True)
    def test_what_may_be_read_does_not_score_minus_infinity_however_little_it_is(self, part: Scorer) -> None:
        view = view_of(9, plain(105, GRID), sharp=200.0)
        assert (started(part, view).scores(view) > -math.inf).all(), "density 1 has to be dense attention"

    def test_what_cannot_be_read_scores_minus_infinity(self, part: Scorer) -> None:
        valid = torch.tensor([3, 9])
        view = view_of(1, tokens_of(text(9, valid=valid), padding(5)), mask=causal(119, 119))
        scores = started(part, view).scores(view).expand(8, -1, -1)
        gone = (view.blocks.k.roles == 2)[None, None, :] | (view.blocks.k.sizes == 0).repeat_interleave(2, 0)[:, None]
        gone = gone | (block_states(view.blocks, causal(119, 119), view.groups) == FORBIDDEN)
        assert (scores.masked_select(gone) == -math.inf).all()
        assert (scores > -math.inf).any(-1)[:, :7].all(), "something is left of every row"

    def test_padding_that_holds_anything_changes_nothing(self, part: Scorer) -> None:
        view = view_of(2, tokens_of(padding(16)))
        poisoned = replace(view, q=view.q.clone(), k=view.k.clone(), v=view.k.clone())
        for x in (poisoned.q, poisoned.k, poisoned.v):
            x[:, :, -16:] = math.nan
        a, b = (started(part, x).scores(x) for x in (replace(view, v=view.k), poisoned))
        a, b = (x[..., : view.blocks.q.count - 1, :] for x in (a, b))
        assert torch.equal(a, b)

    def test_planes_are_independent(self, part: Scorer) -> None:
        view = view_of(3, plain(105, GRID))
        one = replace(view, q=view.q[1:], k=view.k[1:], v=None)
        both, alone = (started(part, x).scores(x) for x in (replace(view, v=None), one))
        if both.shape[0] > 1:
            assert torch.allclose(both[4:], alone, atol=1e-5)

    def test_grouped_queries_see_the_keys_of_their_group(self, part: Scorer) -> None:
        view = view_of(4, plain(105, GRID))
        repeated = replace(view, k=view.k.repeat_interleave(2, 1), v=None)
        a, b = (started(part, x).scores(x) for x in (replace(view, v=None), repeated))
        assert torch.allclose(a, b, atol=1e-5)


def started(part: Scorer, view: View) -> Any:
    """A state that has seen a dense step where it needs one."""
    state = part.start()
    if state.needs_lse:
        k = view.k.repeat_interleave(view.groups, 1)
        logits = view.q.float() @ k.float().mT * view.scale
        if view.mask is not None:
            places = torch.arange(logits.shape[-1])
            logits = logits.masked_fill(~view.mask.allowed(places[: logits.shape[-2]], places, len(places)), -math.inf)
        padded = (view.blocks.k.roles == 2)[view.blocks.k.labels()].repeat_interleave(
            view.q.shape[0] * view.q.shape[1] // view.blocks.k.bounds.shape[0], 0
        )
        logits = logits.masked_fill(padded.view(*view.q.shape[:2], 1, -1), -math.inf)
        state.observe(view, logits.logsumexp(-1))
    return state


# --- means ------------------------------------------------------------------------------------------


def test_pooled_is_the_product_of_means() -> None:
    view = view_of(5, plain(105, GRID))
    scores = Pooled().start().scores(view)
    for plane, i, j in ((0, 0, 0), (3, 2, 6), (7, 6, 1)):
        q_block, k_block = labels(view.blocks, plane, 2)
        q = view.q.flatten(0, 1)[plane][q_block == i].double().mean(0)
        k = view.k.flatten(0, 1)[plane // 2][k_block == j].double().mean(0)
        assert float(scores[plane, i, j]) == pytest.approx(float(q @ k * view.scale), abs=1e-5)


def test_similarity_is_the_mean_of_the_gram_matrix() -> None:
    view = view_of(6, plain(105, GRID))
    found = similarity(view.k, view.blocks.k)
    unit = torch.nn.functional.normalize(view.k.flatten(0, 1).double(), dim=-1)
    for block in range(7):
        own = unit[1, block * 16 : (block + 1) * 16]
        assert float(found[1, block]) == pytest.approx(float((own @ own.T).mean()), abs=1e-6)


def test_blocks_that_are_not_alike_are_always_read() -> None:
    view = view_of(7, plain(64), heads=(1, 1, 1))
    view.k[:, :, :] = normal(1, 24) + 0.05 * normal(2, 64, 24)
    view.q[:, :, :] = normal(3, 24) + 0.05 * normal(4, 64, 24)
    view.k[:, :, 16:32] = normal(5, 16, 24)
    view.q[:, :, 48:] = normal(6, 16, 24)
    scores = Pooled(similarity=0.6).start().scores(view)[0]
    forced = torch.zeros(4, 4, dtype=torch.bool)
    forced[:, 1] = forced[3] = True
    assert torch.equal(scores == math.inf, forced)


def test_centroids_weigh_blocks_by_their_tokens() -> None:
    view = view_of(8, plain(100))
    scores, pooled = Centroid().start().scores(view), Pooled().start().scores(view)
    sizes = torch.tensor([16.0] * 6 + [4.0])
    assert torch.allclose(scores - pooled, sizes.log().expand_as(scores), atol=1e-5)


def test_the_layouts_own_centroids_are_used() -> None:
    view = view_of(9, plain(64), heads=(1, 1, 1))
    own = torch.zeros(1, 4, 24)
    moved = replace(view, blocks=replace(view.blocks, k=replace(view.blocks.k, means=own)))
    assert torch.allclose(Centroid().start().scores(moved), torch.full((1, 4, 4), math.log(16)))


def test_variance_brings_centroid_scores_nearer_to_the_true_mass() -> None:
    view = clustered(10)
    truth = true_mass(view)
    errors = [
        float((Centroid(variance=variance).start().scores(view).softmax(-1) - truth).abs().sum())
        for variance in (False, True)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_mean_rows_is_the_mean_of_each_rows_shares() -> None:
    view = view_of(11, plain(105, GRID), sharp=3.0)
    k = view.k.flatten(0, 1).double()
    means = torch.stack([k[:, at : at + 16].mean(1) for at in range(0, 105, 16)], 1).repeat_interleave(2, 0)
    sizes = torch.tensor([16.0] * 6 + [9.0], dtype=torch.float64)
    shares = (view.q.flatten(0, 1).double() @ means.mT * view.scale + sizes.log()).softmax(-1)
    expected = torch.stack([shares[:, at : at + 16].mean(1) for at in range(0, 105, 16)], 1)
    scores = MeanRows(variance=False).start().scores(view)
    assert torch.allclose(scores.exp().double(), expected, atol=1e-6)


def test_mean_rows_sees_what_the_mean_query_does_not() -> None:
    q = torch.zeros(1, 1, 16, 8)
    q[..., :8, 0], q[..., 8:, 0] = 30.0, -30.0
    k = torch.zeros(1, 1, 64, 8)
    k[:, :, :16, 0], k[:, :, 16:32, 0], k[:, :, 32:] = 1.0, -1.0, 0.0
    blocks = Identity(block=16).start().blocks(q, k, plain(16), plain(64))
    view = View(q, k, blocks, plain(16), plain(64), 1.0)
    rows, pooled = (part.start().scores(view)[0, 0].softmax(-1) for part in (MeanRows(), Centroid()))
    assert torch.allclose(rows, torch.tensor([0.5, 0.5, 0.0, 0.0]), atol=1e-4)
    assert torch.allclose(pooled, torch.full((4,), 0.25), atol=1e-4)


# --- antidiagonals, columns -------------------------------------------------------------------------


def test_antidiagonals_are_sums_over_squares() -> None:
    view = view_of(12, plain(64), heads=(1, 2, 2), sharp=2.0)
    scores = Antidiagonal(stride=4).start().scores(view)
    q, k = view.q[0, 1].double(), view.k[0, 1].double()
    sums = torch.zeros(16, 16, dtype=torch.float64)
    for a in range(16):
        for b in range(16):
            sums[a, b] = sum(q[4 * a + 3 - i] @ k[4 * b + i] for i in range(4)) * view.scale / 4
    expected = sums.softmax(-1).view(4, 4, 4, 4).sum(-1).mean(1)
    assert torch.allclose(scores[1].exp().double(), expected, atol=1e-6)


def test_antidiagonals_know_blocks_smaller_than_their_stride() -> None:
    view = view_of(13, plain(67), heads=(1, 1, 1), layout=KMeans(q_size=12, k_size=9))
    scores = Antidiagonal(stride=16).start().scores(view)
    assert torch.equal(scores.isfinite()[0].any(0), view.blocks.k.sizes[0] > 0)


def test_antidiagonals_of_a_causal_mask_leave_the_future_out() -> None:
    view = view_of(14, plain(64), heads=(1, 1, 1), mask=causal(64, 64))
    changed = replace(view, k=view.k.clone())
    changed.k[:, :, 32:] = normal(99, 32, 24)
    a, b = (Antidiagonal(stride=4).start().scores(x)[0, :2] for x in (view, changed))
    assert torch.equal(a, b)


def test_last_queries_find_columns_and_diagonals() -> None:
    q, k = torch.zeros(1, 1, 96, 2 * 96), torch.zeros(1, 1, 96, 2 * 96)
    for place in range(96):
        q[0, 0, place, place] = 10.0
        k[0, 0, place, min(place + 40, 95)] = 1.0
    q[..., -1] = 10.0
    k[0, 0, 5, :] = 0.0
    k[0, 0, 5, -1] = 1.0
    blocks = Identity(block=8).start().blocks(q, k, plain(96), plain(96))
    view = View(q, k, blocks, plain(96), plain(96), 1.0, causal(96, 96))
    mass = LastQueries(queries=16, columns=1, diagonals=2).start().scores(view)[0].exp()
    read = mass > 1e-3
    assert read[:, 0].all(), "the column that every query reads"
    for row in range(6, 12):
        assert read[row, row - 5], "the diagonal 40 tokens back"
    assert read.sum() <= 12 + 12 + 7


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 9), (9, 4), (1, 7), (7, 1)])
def test_means_along_diagonals(rows: int, columns: int) -> None:
    shares = normal(0, 2, rows, columns)
    expected = [[x.diagonal(c - rows + 1).mean() for c in range(rows + columns - 1)] for x in shares]
    assert torch.allclose(diagonal_means(shares), torch.tensor(expected), atol=1e-6)


def test_last_queries_are_those_before_text_and_padding() -> None:
    tokens = Tokens((Segment("tokens", 64), text(8), padding(8)))
    view = view_of(15, tokens, heads=(1, 1, 1))
    changed = replace(view, q=view.q.clone())
    changed.q[:, :, 64:] = 100.0
    a, b = (LastQueries(queries=8).start().scores(x) for x in (view, changed))
    assert torch.equal(a, b)


def test_diagonals_of_permuted_tokens_are_refused() -> None:
    view = view_of(16, plain(64), layout=Tree(block=16))
    with pytest.raises(UsageError, match="identity"):
        LastQueries().start().scores(view)


def test_products_share_the_keys_of_a_group() -> None:
    q, k = normal(1, 6, 3, 4), normal(2, 2, 5, 4)
    assert torch.allclose(products(q, k, 0.5), q @ k.repeat_interleave(3, 0).mT * 0.5, atol=1e-6)


def test_every_static_scorer_is_independent_of_values() -> None:
    for kind, member in Scorer.members().items():
        if issubclass(member, Static):
            part = member(**NEEDED.get(kind, {}))
            a, b = (part.start().scores(view_of(seed, plain(105, GRID))) for seed in (1, 2))
            assert torch.equal(a, b) and a.shape[0] == 1
            assert set(a.unique().tolist()) <= {0.0, -math.inf}


