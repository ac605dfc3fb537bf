"""What is measured of logits: probabilities, order, draws; and that noise belongs to a text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.canvas import DONE, Canvas
from hasten.samplers.scores import (
    Arbitrary,
    Certainty,
    Confidence,
    Draw,
    Logits,
    Margin,
    Score,
    Scores,
    Softened,
    best,
    measure,
    ranked,
)
from tests.contract_text import ScoreContract, members
from tests.text_models import open_canvas

NONE = torch.zeros(0, dtype=torch.int64)


class TestContract(ScoreContract):
    @pytest.fixture(scope="class", params=members(Score))
    def part(self, request: pytest.FixtureRequest) -> Score:
        part: Score = request.param
        return part


def measured(
    canvas: Canvas, values: Tensor, score: Score | None = None, draw: Draw | None = None, forbidden: Tensor = NONE
) -> Scores:
    """Scores of logits [B, L, V] of all open slots."""
    scores = Scores.blank(canvas)
    slots = torch.where(canvas.eligible, canvas.place, canvas.slots)
    rows = len(canvas.ids)
    draw = draw or Draw(torch.arange(rows))
    measure(Logits(values, slots, torch.arange(rows)), (score or Confidence()).start(), draw, forbidden, canvas, scores)
    return scores


@pytest.fixture
def canvas() -> Canvas:
    return open_canvas([2, 4], [5, 2])


def logits(canvas: Canvas, seed: int = 0, vocab: int = 11) -> Tensor:
    return 2 * torch.randn(*canvas.ids.shape, vocab, generator=torch.Generator().manual_seed(seed))


def test_against_softmax(canvas: Canvas) -> None:
    values = logits(canvas)
    scores, p = measured(canvas, values), values.double().softmax(-1)
    on, top = canvas.eligible, p.topk(2)
    assert torch.equal(scores.seen, on)
    assert torch.equal(scores.token[on], top.indices[..., 0][on])
    torch.testing.assert_close(scores.confidence[on].double(), top.values[..., 0][on], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores.second[on].double(), top.values[..., 1][on], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores.entropy[on].double(), -(p * p.log()).sum(-1)[on], rtol=1e-5, atol=1e-6)


def test_elsewhere_nothing_is_known(canvas: Canvas) -> None:
    scores = measured(canvas, logits(canvas))
    assert bool((scores.rank[~canvas.eligible] == -float("inf")).all())
    assert bool((scores.guide == -1).all())


def test_forbidden_tokens_have_no_mass(canvas: Canvas) -> None:
    values = logits(canvas)
    values[..., [0, 3]] += 20
    forbidden = torch.tensor([0, 3])
    scores = measured(canvas, values, forbidden=forbidden)
    p = values.index_fill(-1, forbidden, -float("inf")).softmax(-1)
    torch.testing.assert_close(scores.confidence[canvas.eligible], p.max(-1).values[canvas.eligible])


def test_log_probabilities_come_back(canvas: Canvas) -> None:
    values, state = logits(canvas), Confidence().start()
    slots = torch.where(canvas.eligible, canvas.place, canvas.slots)
    given_ = Logits(values, slots, torch.arange(2))
    known = measure(given_, state, Draw(torch.arange(2)), torch.tensor([1]), canvas, Scores.blank(canvas))
    torch.testing.assert_close(known.values.exp().sum(-1), torch.ones(canvas.ids.shape))
    assert bool((known.values[..., 1] == -float("inf")).all())


def test_what_stands_there_has_its_probability(canvas: Canvas) -> None:
    canvas.status[0, 3], canvas.ids[0, 3] = DONE, 7
    values, slots = logits(canvas), canvas.place.expand(2, -1)
    scores = Scores.blank(canvas)
    measure(Logits(values, slots, torch.arange(2)), Confidence().start(), Draw(torch.arange(2)), NONE, canvas, scores)
    torch.testing.assert_close(scores.present[0, 3], values.softmax(-1)[0, 3, 7])
    assert bool(scores.present[canvas.masked].isnan().all())


def test_low_precision_logits_are_read_in_float32(canvas: Canvas) -> None:
    values = logits(canvas).bfloat16()
    assert torch.equal(measured(canvas, values).confidence, measured(canvas, values.float()).confidence)


@pytest.mark.parametrize(("score", "of"), [(Confidence(), "c"), (Margin(), "m"), (Certainty(), "h")])
def test_orders(canvas: Canvas, score: Score, of: str) -> None:
    s = measured(canvas, logits(canvas), score)
    expected = {"c": s.confidence, "m": s.confidence - s.second, "h": -s.entropy}[of]
    assert torch.equal(s.rank[s.seen], expected[s.seen])


def test_an_arbitrary_order_stays(canvas: Canvas) -> None:
    draw = Draw(torch.tensor([5, 5]))
    first = measured(canvas, logits(canvas, 1), Arbitrary(), draw).rank
    canvas.step = canvas.step + 3
    assert torch.equal(first, measured(canvas, logits(canvas, 2), Arbitrary(), draw).rank)
    assert torch.equal(first[0, 2:4], first[1, 4:6]), "the same seed at the same distance from the prompt"
    assert not torch.equal(first, measured(canvas, logits(canvas), Arbitrary(), Draw(torch.tensor([5, 6]))).rank)


def test_softened_order_is_drawn_from_the_softmax() -> None:
    """alg_temp: the first slot is drawn from softmax(score / temperature)."""
    many, temperature = 4000, 0.2
    canvas = open_canvas([1] * many, [3] * many)
    values = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [1.0, 0, 0], [1.5, 0, 0]]).expand(many, 4, 3)
    s = measured(canvas, values, Softened(temperature=temperature), Draw(torch.arange(many)))
    law = (s.confidence[0, 1:] / temperature).softmax(-1)
    share = torch.bincount(s.rank.argmax(1), minlength=4)[1:] / many
    assert bool(((share - law).abs() < 4 * (law * (1 - law) / many).sqrt()).all())
    canvas.step = canvas.step + 1
    again = measured(canvas, values, Softened(temperature=temperature), Draw(torch.arange(many)))
    assert not torch.equal(s.rank.argmax(1), again.rank.argmax(1)), "new noise at each step"


def test_noise_of_the_order_is_not_that_of_the_tokens() -> None:
    """Were it the same, a slot would be early because its token is the first of the vocabulary."""
    many = 600
    canvas = open_canvas([1] * many, [2] * many)
    values, draw = torch.zeros(many, 3, 2), Draw(torch.arange(many), temperature=1.0)
    s = measured(canvas, values, Softened(temperature=1.0), draw)
    first, zero = s.rank[:, 1] > s.rank[:, 2], s.token[:, 1] == 0
    together = torch.corrcoef(torch.stack([first.float(), zero.float()]))[0, 1]
    assert abs(float(together)) < 4 / many**0.5


class TestDraws:
    def test_the_law(self) -> None:
        many = 4000
        canvas = open_canvas([1] * many, [1] * many)
        values = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(many, 2, 4)
        token = measured(canvas, values, draw=Draw(torch.arange(many), temperature=0.7)).token[:, 1]
        law = (values[0, 0] / 0.7).softmax(-1)
        share = torch.bincount(token, minlength=4) / many
        assert bool(((share - law).abs() < 4 * (law * (1 - law) / many).sqrt()).all())

    @pytest.mark.parametrize(
        ("draw", "allowed"),
        [({"top_k": 2}, {1, 2}), ({"top_p": 0.6}, {2}), ({"top_p": 0.7}, {1, 2}), ({"top_k": 1}, {2})],
    )
    def test_what_is_left_out(self, draw: dict[str, float], allowed: set[int]) -> None:
        many = 300
        canvas = open_canvas([1] * many, [1] * many)
        values = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(many, 2, 4)  # 0.64 for token 2, 0.24 for 1
        given_ = Draw(torch.arange(many), temperature=1.0, **draw)  # type: ignore[arg-type]
        assert set(measured(canvas, values, draw=given_).token[:, 1].tolist()) == allowed

    def test_confidence_is_that_of_the_drawn_token(self, canvas: Canvas) -> None:
        values = logits(canvas)
        s = measured(canvas, values, draw=Draw(torch.arange(2), temperature=5.0))
        p = values.softmax(-1).gather(-1, s.token[..., None])[..., 0]
        torch.testing.assert_close(s.confidence[s.seen], p[s.seen])

    def test_cold_is_the_most_probable(self, canvas: Canvas) -> None:
        values = logits(canvas)
        cold = measured(canvas, values, draw=Draw(torch.arange(2), temperature=1e-4)).token
        assert torch.equal(cold[canvas.eligible], values.argmax(-1)[canvas.eligible])


KEYS = st.lists(
    st.lists(st.sampled_from([-float("inf"), 0.0, 0.5, 0.5, 1.0]), min_size=6, max_size=6), min_size=1, max_size=3
)


@settings(max_examples=50, deadline=None)
@given(KEYS, st.integers(0, 63), st.integers(0, 7))
def test_best_against_a_sort(keys: list[list[float]], bits: int, count: int) -> None:
    rank = torch.tensor(keys)
    among = torch.tensor([[bool(bits >> i & 1) for i in range(6)]]).expand(len(keys), -1)
    got = best(rank, among, torch.full((len(keys),), count))
    for row, key in enumerate(keys):
        order = sorted((i for i in range(6) if among[row, i]), key=lambda i: (-key[i], i))
        assert got[row].nonzero()[:, 0].tolist() == sorted(order[:count])


def test_ranked_puts_the_rest_behind() -> None:
    order, inside = ranked(torch.tensor([[0.1, -float("inf"), 0.9, 0.5]]), torch.tensor([[True, True, False, True]]))
    assert order.tolist() == [[3, 0, 1, 2]] and inside.tolist() == [[True, True, True, False]]
