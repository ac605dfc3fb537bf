"""What every commit rule and every score must do, whichever paper it is from. Like `contract.py`, for texts.

Shapes: B texts, L slots, V tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from _pytest.mark import ParameterSet
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import hasten.samplers.commit_history
import hasten.samplers.commit_images
import hasten.samplers.commit_sure
import hasten.samplers.commit_wide
import hasten.samplers.scores_history  # noqa: F401  imports every rule and score
from hasten.caching.kv import Recompute
from hasten.canvas import Canvas
from hasten.errors import RecipeError
from hasten.noise import gumbel, uniform
from hasten.part import Part
from hasten.pipelines.text.drafts import refuse
from hasten.samplers.commit import CommitRule, Quota, Threshold, Unmask
from hasten.samplers.commit_told import Oracle
from hasten.samplers.filter import FilterNet, Form
from hasten.samplers.scores import Confidence, Draw, Logits, Score, Scores, best, measure
from hasten.samplers.text_blocks import Fixed, InBlocks
from hasten.samplers.verify import FreeDave
from tests.contract import PartContract
from tests.text_models import FIRST, facts

WORDS = 13
"""Tokens of the scripted model."""


def filter_file(form: Form, above: float = 0.5, seed: int = 0) -> str:
    """A filter with random weights."""
    torch.manual_seed(seed)
    path = Path(tempfile.mkdtemp()) / f"{form}.safetensors"
    net = FilterNet(form, 8, 6)
    save_file(net.state_dict(), path, {"filter": form, "above": str(above)})
    return str(path)


NEEDED: dict[str, dict[str, Any]] = {
    "either": {"rules": (Threshold(above=0.7), Quota(steps=3))},
    "oracle": {"final": ((5, 6, 7, 8, 9, 10, 11), (7, 7, 5, 5, 3, 4, 12), (9, 8, 7, 6, 5, 4, 3))},
    # random, but so that it takes some of what it is offered and leaves some:
    "learned": {"weights": filter_file("slots", above=0.44, seed=3)},
    "learned-block": {"weights": filter_file("block")},
    # so that something is taken of the scripted model's sharp but restless distributions:
    "settled": {"drift": 4.0, "above": 0.2, "lasting": 1},
    "all-at-once": {"early": 1.0, "middle": 0.8},
}


def members(family: type[Part]) -> list[ParameterSet]:
    """One instance of every member of `family`."""
    return [pytest.param(member(**NEEDED.get(kind, {})), id=kind) for kind, member in sorted(family.members().items())]


class Walk:
    """An engine without a model: logits are noise that depends on the text's seed, the step and the slot alone."""

    def __init__(self, commit: Unmask, starts: Sequence[int], new: Sequence[int], seeds: Sequence[int]) -> None:
        self.canvas = Canvas.of([torch.full((start,), FIRST) for start in starts], new, facts())
        self.draw = Draw(torch.tensor(list(seeds)))
        self.rule, self.score = commit.rule.start(), commit.score.start()
        self.chosen: list[Tensor] = []
        self.offered: list[Tensor] = []

    def run(self, size: int = 4) -> Walk:
        """Write all, in blocks of `size`."""
        canvas = self.canvas
        canvas.enter(canvas.open.clone(), torch.stack([canvas.start, (canvas.start + size).minimum(canvas.end)], 1))
        while bool(canvas.masked.any()):
            self.step()
            full = ~canvas.eligible.any(1)
            low = canvas.span[:, 1]
            canvas.enter(full, torch.stack([low, (low + size).minimum(canvas.end)], 1))
        return self

    def step(self) -> None:
        """Evaluate, score, choose, write."""
        canvas, scores = self.canvas, Scores.blank(self.canvas)
        behind = canvas.place - canvas.start[:, None]
        values = 3 * gumbel(self.draw.seed[:, None], canvas.step[:, None] // 2, behind, WORDS)
        slots = torch.where(canvas.eligible, canvas.place, canvas.slots)
        logits = Logits(values, slots, torch.arange(len(canvas.ids)))
        known = measure(logits, self.score, self.draw, torch.tensor([0, 1]), canvas, scores)
        self.rule.observe(known, canvas)
        agree = uniform(self.draw.seed[:, None], canvas.step[:, None], behind, 1)[..., 0] < 0.5
        scores.guide = torch.where(agree, scores.token, -1)
        among, before = scores.among(canvas), canvas.ids.clone()
        taken = self.rule.select(scores, canvas)
        assert torch.equal(canvas.ids, before), "a rule writes nothing itself"
        self.offered.append(among)
        self.chosen.append(taken)
        wrote = taken & among | best(scores.rank, among, (~(taken & among).any(1)).long())
        canvas.write(wrote, scores.token, scores.confidence)
        self.score.note(wrote, scores, canvas)
        canvas.step, canvas.since = canvas.step + 1, canvas.since + 1


LENGTHS = st.lists(st.integers(1, 7), min_size=3, max_size=3)


def apart(commit: Callable[[Sequence[int]], Unmask], starts: list[int], new: list[int], seeds: list[int]) -> None:
    """A batch writes what each of its texts writes alone, in the same steps."""
    together = Walk(commit(range(3)), starts, new, seeds).run()
    for row in range(3):
        single = Walk(commit([row]), starts[row : row + 1], new[row : row + 1], seeds[row : row + 1]).run()
        width = single.canvas.slots
        assert torch.equal(single.canvas.ids[0], together.canvas.ids[row, :width])
        assert torch.equal(single.canvas.committed[0], together.canvas.committed[row, :width])
        for one, all_ in zip(single.chosen, together.chosen, strict=False):
            assert torch.equal(one[0], all_[row, :width])


def told(rule: CommitRule, rows: Sequence[int]) -> CommitRule:
    """The rule for some of the three texts: an oracle knows only theirs."""
    return Oracle(final=tuple(rule.final[row] for row in rows)) if isinstance(rule, Oracle) else rule


class CommitRuleContract(PartContract):
    family = CommitRule

    @settings(max_examples=5, deadline=None)
    @given(LENGTHS, LENGTHS, st.lists(st.integers(0, 1 << 40), min_size=3, max_size=3))
    def test_texts_do_not_know_of_each_other(
        self, part: CommitRule, starts: list[int], new: list[int], seeds: list[int]
    ) -> None:
        apart(lambda rows: Unmask(rule=told(part, rows)), starts, new, seeds)

    @settings(max_examples=5, deadline=None)
    @given(LENGTHS, LENGTHS)
    def test_what_it_takes_is_open(self, part: CommitRule, starts: list[int], new: list[int]) -> None:
        walk = Walk(Unmask(rule=part), starts, new, [1, 2, 3]).run()
        for taken, among in zip(walk.chosen, walk.offered, strict=True):
            assert not bool((taken & ~among).any())

    def test_it_takes_something_now_and_then(self, part: CommitRule) -> None:
        walk = Walk(Unmask(rule=part), [2, 3, 5], [7, 7, 7], [4, 5, 6]).run()
        assert any(bool(taken.any()) for taken in walk.chosen)

    def test_two_states_share_nothing(self, part: CommitRule) -> None:
        first = Walk(Unmask(rule=part), [2, 3, 5], [7, 6, 5], [4, 5, 6]).run()
        second = Walk(Unmask(rule=part), [2, 3, 5], [7, 6, 5], [4, 5, 6]).run()
        assert torch.equal(first.canvas.ids, second.canvas.ids)
        assert torch.equal(first.canvas.committed, second.canvas.committed)

    def test_one_without_memory_says_the_same_again(self, part: CommitRule) -> None:
        """What `remembers` says is so: drafts are verified with it, and refused with those that remember."""
        if part.remembers:
            with pytest.raises(RecipeError, match="stand for steps that were not taken"):
                refuse(FreeDave(), Unmask(rule=part), InBlocks(rule=Fixed()), Recompute(), None, facts())
            return
        walk = Walk(Unmask(rule=part), [2, 3, 5], [7, 6, 5], [4, 5, 6])
        while bool(walk.canvas.masked.any()):
            walk.rule = part.start()
            if not bool(walk.canvas.eligible.any()):
                walk.canvas.enter(walk.canvas.open.clone(), torch.stack([walk.canvas.start, walk.canvas.end], 1))
            walk.step()
        whole = Walk(Unmask(rule=part), [2, 3, 5], [7, 6, 5], [4, 5, 6]).run(size=99)
        assert torch.equal(walk.canvas.committed, whole.canvas.committed)


class ScoreContract(PartContract):
    family = Score

    @settings(max_examples=5, deadline=None)
    @given(LENGTHS, LENGTHS, st.lists(st.integers(0, 1 << 40), min_size=3, max_size=3))
    def test_texts_do_not_know_of_each_other(
        self, part: Score, starts: list[int], new: list[int], seeds: list[int]
    ) -> None:
        apart(lambda rows: Unmask(rule=Threshold(above=0.8), score=part), starts, new, seeds)

    def test_forbidden_tokens_stay_forbidden(self, part: Score) -> None:
        walk = Walk(Unmask(rule=Quota(), score=part), [2, 3, 5], [7, 6, 5], [4, 5, 6]).run()
        behind = walk.canvas.inside(walk.canvas.start, walk.canvas.end)
        assert int(walk.canvas.ids[behind].min()) > 1

    def test_first_evaluation_is_taken_as_it_is(self, part: Score) -> None:
        """With nothing to remember, the most probable token is the model's; credit only makes it surer."""
        walk = Walk(Unmask(rule=Quota(), score=part), [2, 3, 5], [7, 6, 5], [4, 5, 6])
        plain = Walk(Unmask(rule=Quota(), score=Confidence()), [2, 3, 5], [7, 6, 5], [4, 5, 6])
        for each in (walk, plain):
            span = torch.stack([each.canvas.start, each.canvas.end], 1)
            each.canvas.enter(each.canvas.open.clone(), span)
            each.step()
        wrote = walk.canvas.committed >= 0
        others = cast(Tensor, plain.canvas.committed >= 0)
        both = wrote & others
        assert torch.equal(walk.canvas.ids[both], plain.canvas.ids[both])

    def test_ranks_are_numbers(self, part: Score) -> None:
        """Where something is known, a rank is finite."""
        walk = Walk(Unmask(rule=Quota(), score=part), [2], [7], [4])
        walk.canvas.enter(walk.canvas.open.clone(), torch.stack([walk.canvas.start, walk.canvas.end], 1))
        scores = Scores.blank(walk.canvas)
        zero, place = torch.zeros(1, 1, dtype=torch.int64), walk.canvas.place
        slots = torch.where(walk.canvas.eligible, place, walk.canvas.slots)
        logits = Logits(300 * gumbel(zero, zero, place, 7), slots, zero[0])
        measure(logits, walk.score, walk.draw, torch.tensor([0]), walk.canvas, scores)
        assert bool(scores.rank[scores.seen].isfinite().all())
