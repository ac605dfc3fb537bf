"""Scores with memory equal their dense forms, and forget what they should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.canvas import Canvas
from hasten.samplers.scores import Draw, Logits, Score, Scores, measure
from hasten.samplers.scores_history import MOST, Averaged, Credit
from tests.text_models import open_canvas

VOCAB, ALPHA, BETA, GAMMA = 17, 0.7, 0.8, 0.2


class Evaluations:
    """Evaluations of two ragged texts whose block is all that is generated, with scripted logits."""

    def __init__(self, score: Score) -> None:
        self.canvas, self.state = open_canvas([2, 3], [5, 4]), score.start()

    def measure(self, values: Tensor, rows: list[int] | None = None) -> Scores:
        """values [B, L, V]; rows: the texts of this call."""
        canvas, scores = self.canvas, Scores.blank(self.canvas)
        members = torch.tensor([0, 1] if rows is None else rows)
        slots = torch.where(canvas.eligible, canvas.place, canvas.slots)[members]
        none = torch.zeros(0, dtype=torch.int64)
        measure(Logits(values[members], slots, members), self.state, Draw(torch.arange(2)), none, canvas, scores)
        return scores

    def write(self, chosen: Tensor, scores: Scores) -> None:
        self.canvas.write(chosen, scores.token, scores.confidence)
        self.state.note(chosen, scores, self.canvas)


def noise(step: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(2, 7, VOCAB, generator=torch.Generator().manual_seed(step))


def dense_credit(values: Tensor, credit: Tensor, open_: Tensor) -> tuple[Tensor, Tensor]:
    """One evaluation of CreditDecoding with the whole matrix C [B, L, V], in float64."""
    p = values.double().softmax(-1)
    gain = torch.zeros_like(p).scatter(-1, p.argmax(-1, keepdim=True), p.max(-1, keepdim=True).values ** GAMMA)
    credit = torch.where(open_[..., None], BETA * credit + gain, 0.0)
    return values.double() + ALPHA * (1 + credit).log(), credit


class TestCredit:
    def test_it_is_the_dense_matrix(self) -> None:
        it = Evaluations(Credit(alpha=ALPHA, beta=BETA, gamma=GAMMA))
        credit, changed = torch.zeros(2, 7, VOCAB, dtype=torch.float64), False
        for step in range(9):
            open_ = it.canvas.eligible.clone()
            values = noise(0, 0.6) + noise(1 + step, 0.3)  # a few tokens of each slot take turns: credit is shared out
            fused, credit = dense_credit(values, credit, open_)
            scores, p = it.measure(values), fused.softmax(-1)
            torch.testing.assert_close(scores.confidence[open_].double(), p.max(-1).values[open_], rtol=0, atol=1e-6)
            assert torch.equal(scores.token[open_], p.argmax(-1)[open_])
            changed |= bool((p.argmax(-1) != values.argmax(-1))[open_].any())
            if step in (3, 6):
                chosen = open_ & (it.canvas.place == step)
                it.write(chosen, scores)
                credit = torch.where(chosen[..., None], 0.0, credit)
        assert changed, "credit never decided anything"

    def test_memory_grows_with_evaluations_and_then_stops(self) -> None:
        it = Evaluations(Credit())
        for step in range(MOST + 5):
            it.measure(noise(step))
            assert it.state.token.shape == (2, 8, min(step + 1, MOST))  # type: ignore[attr-defined]

    def test_forgetting_the_least_credited_shows_nowhere(self) -> None:
        """More different tokens than are remembered: still the dense result to 1e-6, with the paper's beta."""
        vocab, it = 2 * MOST, Evaluations(Credit(alpha=ALPHA, beta=BETA, gamma=GAMMA))
        credit = torch.zeros(2, 7, vocab, dtype=torch.float64)
        for step in range(MOST + 30):
            values = torch.zeros(2, 7, vocab)
            values[..., step] = 2.0
            fused, credit = dense_credit(values, credit, it.canvas.eligible)
            scores = it.measure(values)
        p = fused.softmax(-1).max(-1).values[it.canvas.eligible]
        torch.testing.assert_close(scores.confidence[it.canvas.eligible].double(), p, rtol=0, atol=1e-6)

    def test_a_slot_that_is_written_starts_again(self) -> None:
        it, fresh = Evaluations(Credit()), Evaluations(Credit())
        for step in range(3):
            scores = it.measure(noise(step))
        slot = it.canvas.eligible & (it.canvas.place == 4)
        it.write(slot, scores)
        it.canvas.erase(slot, 1)
        torch.testing.assert_close(it.measure(noise(7)).confidence[slot], fresh.measure(noise(7)).confidence[slot])

    def test_calls_with_some_of_the_texts(self) -> None:
        together, apart = Evaluations(Credit()), Evaluations(Credit())
        for step in range(5):
            both = together.measure(noise(step))
            for row in (1, 0):
                one = apart.measure(noise(step), [row])
                assert torch.equal(one.confidence[row], both.confidence[row])

    def test_without_credit_it_is_confidence(self) -> None:
        it, plain = Evaluations(Credit(alpha=0.0)), noise(3)
        for _ in range(3):
            scores = it.measure(plain)
        on = it.canvas.eligible
        torch.testing.assert_close(scores.confidence[on], plain.softmax(-1).max(-1).values[on])


class TestAveraged:
    @pytest.mark.parametrize("over", [2, 3])
    def test_it_is_the_mean(self, over: int) -> None:
        it, past = Evaluations(Averaged(over=over, keep=VOCAB)), list[Tensor]()
        for step in range(5):
            past = [*past, noise(step).double().softmax(-1)][-over:]
            mean = torch.stack(past).mean(0)
            scores, on = it.measure(noise(step)), it.canvas.eligible
            torch.testing.assert_close(scores.confidence[on].double(), mean.max(-1).values[on], rtol=0, atol=1e-6)
            torch.testing.assert_close(scores.rank[on].double(), (mean * mean.log()).sum(-1)[on], rtol=0, atol=1e-5)

    def test_few_tokens_are_nearly_it(self) -> None:
        exact, short = Evaluations(Averaged(keep=VOCAB)), Evaluations(Averaged(keep=4))
        for step in range(3):
            a, b = exact.measure(noise(step)), short.measure(noise(step))
        on = exact.canvas.eligible
        assert float((a.confidence - b.confidence)[on].abs().max()) < 0.05
        assert not torch.equal(a.confidence, b.confidence)

    def test_a_slot_that_is_written_starts_again(self) -> None:
        it = Evaluations(Averaged(keep=VOCAB))
        scores = it.measure(noise(0))
        slot = it.canvas.eligible & (it.canvas.place == 4)
        it.write(slot, scores)
        it.canvas.erase(slot, 1)
        again = it.measure(noise(1)).confidence
        torch.testing.assert_close(again[slot], noise(1).softmax(-1).max(-1).values[slot])
        other = it.canvas.eligible & ~slot
        assert not torch.allclose(again[other], noise(1).softmax(-1).max(-1).values[other])

    def test_outside_the_block_nothing_is_remembered(self) -> None:
        it = Evaluations(Averaged(keep=VOCAB))
        canvas: Canvas = it.canvas
        canvas.enter(canvas.open.clone(), torch.stack([canvas.start, canvas.start + 2], 1))
        slots = torch.where(canvas.masked, canvas.place, canvas.slots)  # the rest is looked at, but not open yet
        scores, none = Scores.blank(canvas), torch.zeros(0, dtype=torch.int64)
        draw, rows = Draw(torch.arange(2)), torch.arange(2)
        measure(Logits(noise(0), slots, rows), it.state, draw, none, canvas, scores)
        canvas.enter(canvas.open.clone(), torch.stack([canvas.start, canvas.end], 1))
        later = canvas.masked & (canvas.place >= canvas.start[:, None] + 2)
        got = it.measure(noise(1)).confidence[later]
        torch.testing.assert_close(got, noise(1).softmax(-1).max(-1).values[later])
