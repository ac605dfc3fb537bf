"""Rules that compare evaluations: scripted histories, and the divergence against its dense form."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.canvas import Canvas
from hasten.samplers.commit import CommitState
from hasten.samplers.commit_history import Settled, Steady, divergence
from hasten.samplers.scores import Confidence, Draw, Logits, Scores, measure
from tests.text_models import open_canvas, picked, scripted

VOCAB = 9


class TestSteady:
    def steps(self, rule: Steady, tokens: Sequence[Sequence[int]], ranks: Sequence[Sequence[float]]) -> list[list[int]]:
        """What is taken of one text at each step, nothing being written."""
        canvas, state, out = open_canvas([2], [len(ranks[0])]), rule.start(), []
        for token, rank in zip(tokens, ranks, strict=True):
            out.append(picked(canvas, state.select(scripted(canvas, [rank], token=[token]), canvas))[0])
        return out

    def test_twice_among_the_surest_with_one_token(self) -> None:
        tokens = [[3, 4, 5, 6], [3, 9, 5, 6], [3, 9, 5, 7]]
        ranks = [[0.9, 0.8, 0.2, 0.1], [0.9, 0.8, 0.2, 0.1], [0.1, 0.8, 0.9, 0.2]]
        assert self.steps(Steady(top=2), tokens, ranks) == [[], [0], [1]]

    def test_three_times(self) -> None:
        tokens, ranks = [[3, 4]] * 4, [[0.9, 0.1], [0.1, 0.9], [0.1, 0.9], [0.1, 0.9]]
        assert self.steps(Steady(top=1, lasting=3), tokens, ranks) == [[], [], [], [1]]

    def test_a_slot_of_the_last_block_is_not_one_of_this(self) -> None:
        canvas, state = open_canvas([1], [4], [(1, 3)]), Steady().start()
        state.select(scripted(canvas, [[0.9, 0.9]]), canvas)
        canvas.write(canvas.eligible, canvas.ids, canvas.confidence)
        canvas.enter(canvas.open.clone(), torch.tensor([[3, 5]]))
        assert picked(canvas, state.select(scripted(canvas, [[0.9, 0.9]]), canvas)) == [[]]


def observe(state: CommitState, canvas: Canvas, values: Tensor) -> Scores:
    """One evaluation of all open slots: logits [B, L, V]."""
    scores, rows = Scores.blank(canvas), torch.arange(len(canvas.ids))
    slots = torch.where(canvas.eligible, canvas.place, canvas.slots)
    none = torch.zeros(0, dtype=torch.int64)
    state.observe(measure(Logits(values, slots, rows), Confidence().start(), Draw(rows), none, canvas, scores), canvas)
    return scores


def noise(step: int) -> Tensor:
    return 2 * torch.randn(2, 7, VOCAB, generator=torch.Generator().manual_seed(step))


class TestSettled:
    def test_against_dense_distributions(self) -> None:
        """The rule with everything in memory: KL of all V tokens at each of the last n steps."""
        rule = Settled(above=0.3, drift=0.02, lasting=2, keep=VOCAB)
        canvas, state = open_canvas([2, 4], [5, 3]), rule.start()
        settled, before = torch.zeros(2, 7, dtype=torch.int64), None
        found = 0
        for step in range(12):
            values = noise(step // 4) + 0.05 * noise(100 + step)
            known = values.double().log_softmax(-1)
            if before is not None:
                little = (known.exp() * (known - before)).sum(-1) < 0.02
                settled = torch.where(little, settled + 1, 0)
            before = known
            scores = observe(state, canvas, values)
            expected = canvas.eligible & (settled >= 2) & (scores.confidence >= 0.3)
            assert torch.equal(state.select(scores, canvas), expected)
            found += int(expected.sum())
        assert found > 0

    def test_once_is_not_twice(self) -> None:
        canvas, values = open_canvas([2, 2], [4, 4]), noise(0)[:, :6]
        state = Settled(above=0.0, lasting=2).start()
        each = [bool(state.select(observe(state, canvas, values), canvas).any()) for _ in range(4)]
        assert each == [False, False, True, True]

    def test_what_was_erased_starts_again(self) -> None:
        canvas, values = open_canvas([2, 2], [4, 4]), noise(0)[:, :6]
        state = Settled(above=0.0, lasting=1).start()
        for _ in range(2):
            scores = observe(state, canvas, values)
            state.select(scores, canvas)
        slot = canvas.eligible & (canvas.place == 3)
        canvas.write(slot, scores.token, scores.confidence)
        state.select(observe(state, canvas, values), canvas)
        canvas.erase(slot, 1)
        taken = state.select(observe(state, canvas, values), canvas)
        assert not bool(taken[slot].any()) and bool(taken[canvas.eligible & ~slot].all())

    def test_confidence_counts_too(self) -> None:
        canvas, values = open_canvas([2, 2], [4, 4]), torch.zeros(2, 6, VOCAB)
        state = Settled(above=0.5, lasting=1).start()
        for _ in range(3):
            assert not bool(state.select(observe(state, canvas, values), canvas).any())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, VOCAB))
def test_divergence_is_a_lower_bound_and_exact_with_all_tokens(seed: int, keep: int) -> None:
    g = torch.Generator().manual_seed(seed)
    p, q = ((1.5 * torch.randn(3, VOCAB, generator=g)).log_softmax(-1) for _ in range(2))
    top = q.topk(keep, dim=-1)
    dense = (p.double().exp() * (p - q).double()).sum(-1)
    got = divergence(p, top.indices, top.values).double()
    assert bool((got <= dense + 1e-3).all()) and bool((got >= -1e-5).all())
    if keep == VOCAB:
        torch.testing.assert_close(got, dense, rtol=1e-4, atol=1e-5)


def test_forbidden_tokens_do_not_disturb_it() -> None:
    p = torch.tensor([[1.0, 0.0, -float("inf")]]).log_softmax(-1)
    top = p.topk(3, dim=-1)
    assert float(divergence(p, top.indices, top.values)) == pytest.approx(0.0, abs=1e-6)
