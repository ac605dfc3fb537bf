"""Rules that ask how sure an evaluation is: exact cases, also where public copies of a rule disagree."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.canvas import DONE
from hasten.samplers.commit import CommitRule
from hasten.samplers.commit_sure import (
    AboveMean,
    AllAtOnce,
    EntropyBound,
    Factor,
    Lead,
    Nearby,
    Runs,
    best_of_runs,
)
from tests.text_models import open_canvas, picked, scripted


def taken(rule: CommitRule, confidence: Sequence[float], **given_: Sequence[float]) -> list[int]:
    """What `rule` takes of one text, beside another of other length that is unsure of everything."""
    canvas = open_canvas([3, 1], [len(confidence), 9])
    more = {name: [list(values), [1e-3] * 9] for name, values in given_.items()}
    chosen = rule.start().select(scripted(canvas, [list(confidence), [1e-3] * 9], **more), canvas)
    return picked(canvas, chosen)[0]


CONFIDENCES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=9)


class TestFactor:
    @pytest.mark.parametrize(
        ("confidence", "expected"),
        [
            ([0.6, 0.5, 0.4], [0]),  # 3 (1 - 0.5) = 1.5: one slot, though 2 (1 - 0.6) = 0.8 passes
            ([0.4, 0.45, 0.3], [1]),  # none passes: the first is taken in any case, and only it
            ([0.99, 0.98, 0.97], [0, 1, 2]),  # all pass: three, not a fourth or one fewer
            ([0.7, 0.99, 0.2, 0.98], [1, 3]),  # 4 (1 - 0.7) = 1.2 fails
            ([1.0, 1.0, 0.5], [0, 1]),  # 0 < f always; 4 (0.5) fails
        ],
    )
    def test_exact(self, confidence: list[float], expected: list[int]) -> None:
        assert taken(Factor(factor=1.0), confidence) == expected

    @settings(max_examples=40, deadline=None)
    @given(CONFIDENCES, st.sampled_from([0.2, 0.5, 1.0, 2.0]))
    def test_the_largest_n(self, confidence: list[float], factor: float) -> None:
        values = torch.tensor(confidence).sort(descending=True).values
        passing = [n for n, c in enumerate(values, 1) if (n + 1) * (1 - c) < factor]
        assert len(taken(Factor(factor=factor), confidence)) == max([1, *passing])


class TestEntropyBound:
    def test_exact(self) -> None:
        entropy = [0.3, 0.02, 0.05, 0.06]  # sums before each: 0, 0.02, 0.07, 0.13
        assert taken(EntropyBound(bound=0.1), [0.5] * 4, entropy=entropy) == [1, 2, 3]
        assert taken(EntropyBound(bound=0.06), [0.5] * 4, entropy=entropy) == [1, 2]
        assert taken(EntropyBound(bound=0.14), [0.5] * 4, entropy=entropy) == [0, 1, 2, 3]

    def test_the_first_is_free(self) -> None:
        assert taken(EntropyBound(bound=0.0), [0.5] * 3, entropy=[2.0, 1.0, 3.0]) == [1]

    def test_maximum_is_over_the_text_not_over_the_batch(self) -> None:
        """Entropies of another text must not shrink this one's sum."""
        canvas = open_canvas([2, 2], [3, 3])
        scores = scripted(canvas, [[0.5] * 3, [0.5] * 3], entropy=[[3.0, 3.0, 3.0], [0.1, 0.1, 0.1]])
        chosen = EntropyBound(bound=0.15).start().select(scores, canvas)
        assert chosen.sum(1).tolist() == [1, 2]


class TestLead:
    def test_exact(self) -> None:
        assert taken(Lead(by=0.25), [0.75, 0.5, 0.5], second=[0.25, 0.25, 0.375]) == [0, 1]


class TestNearby:
    def test_neighbours_need_less(self) -> None:
        confidence = [0.8, 0.1, 0.95, 0.8, 0.7, 0.8, 0.8]
        assert taken(Nearby(above=0.9, near=0.75, reach=2), confidence) == [0, 2, 3]
        assert taken(Nearby(above=0.9, near=0.75, reach=3), confidence) == [0, 2, 3, 5]
        assert taken(Nearby(above=0.9, near=0.75, reach=0), confidence) == [2]

    def test_without_an_anchor_nothing(self) -> None:
        assert taken(Nearby(), [0.8, 0.85]) == []

    def test_written_slots_are_no_anchors(self) -> None:
        canvas = open_canvas([2], [3])
        canvas.status[0, 2], canvas.confidence[0, 2] = DONE, 0.99
        scores = scripted(canvas, [[0.8, 0.8]])
        assert picked(canvas, Nearby().start().select(scores, canvas)) == [[]]


class TestRuns:
    def test_one_of_each_run(self) -> None:
        canvas = open_canvas([2], [8])
        canvas.status[0, [4, 5, 8]] = DONE  # runs: slots 2 3, 6 7, 9
        scores = scripted(canvas, [[0.5, 0.6, 0.45, 0.3, 0.41]])
        assert picked(canvas, Runs(above=0.9, low=0.4).start().select(scores, canvas)) == [[1, 2, 4]]

    def test_sure_ones_besides(self) -> None:
        assert taken(Runs(above=0.9, low=0.4), [0.95, 0.92, 0.5]) == [0, 1]

    def test_bounds_are_strict(self) -> None:
        assert taken(Runs(above=0.75, low=0.5), [0.5, 0.25]) == []

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.1, 0.4, 0.4001, 0.9])), min_size=1, max_size=12))
    def test_runs_against_a_loop(self, slots: list[tuple[bool, float]]) -> None:
        expected, run = [False] * len(slots), list[int]()
        for place in range(len(slots) + 1):
            if place < len(slots) and slots[place][0]:
                run.append(place)
            elif run:
                expected[max(run, key=lambda i: (slots[i][1], -i))] = True
                run = []
        among, key = torch.tensor([[s for s, _ in slots]]), torch.tensor([[k for _, k in slots]])
        assert best_of_runs(key, among)[0].tolist() == expected


class TestAboveMean:
    @pytest.mark.parametrize(("slack", "expected"), [(0.0, [1]), (0.25, [1, 2])])
    def test_mean_of_what_is_written(self, slack: float, expected: list[int]) -> None:
        canvas = open_canvas([2], [5])
        canvas.status[0, [2, 3]] = DONE
        canvas.confidence[0, [2, 3]] = torch.tensor([1.0, 0.5])  # mean 0.75
        scores = scripted(canvas, [[0.25, 0.875, 0.75]])
        assert picked(canvas, AboveMean(slack=slack).start().select(scores, canvas)) == [expected]

    def test_the_paper_s_rule_halts_where_the_model_is_sure(self) -> None:
        canvas = open_canvas([2], [4])
        canvas.status[0, 2], canvas.confidence[0, 2] = DONE, 1.0
        scores = scripted(canvas, [[1.0, 1.0, 1.0]])
        assert picked(canvas, AboveMean(slack=0.0).start().select(scores, canvas)) == [[]]
        assert picked(canvas, AboveMean(slack=0.01).start().select(scores, canvas)) == [[0, 1, 2]]

    def test_nothing_before_anything_is_written(self) -> None:
        assert taken(AboveMean(), [0.99, 0.98]) == []


class TestAllAtOnce:
    @pytest.mark.parametrize(
        ("written", "gap", "all_"),
        [(0, 7.4, False), (0, 7.6, True), (4, 5.1, True), (4, 4.9, False), (8, 2.6, True), (8, 2.4, False)],
    )
    def test_levels(self, written: int, gap: float, all_: bool) -> None:
        canvas = open_canvas([2], [10])
        canvas.status[0, 2 : 2 + written] = DONE
        left = 10 - written
        scores = scripted(canvas, [[0.9] * left], second=[[0.9 * math.exp(-gap)] * left])
        chosen = AllAtOnce().start().select(scores, canvas)
        assert picked(canvas, chosen) == [list(range(left)) if all_ else []]

    def test_it_is_the_mean(self) -> None:
        second = [0.5 * math.exp(-14.0), 0.5 * math.exp(-2.0)]
        assert taken(AllAtOnce(), [0.5, 0.5], second=second) == [0, 1]

    def test_certainty_without_bound(self) -> None:
        assert taken(AllAtOnce(), [1.0, 1.0], second=[0.0, 0.0]) == [0, 1]
