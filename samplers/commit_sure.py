"""Rules that ask how sure the present evaluation is of each slot.

Shapes: B texts, L slots. c: confidence of a slot, H: its entropy in nats, M: the open slots of the active block. Each
rule looks at one text's slots only, and all of it is array work: no loop over tokens, no wait for the device.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from hasten.canvas import DONE, Canvas
from hasten.samplers.commit import CommitRule, CommitState
from hasten.samplers.scores import Scores, ranked


class Factor(CommitRule):
    """The n surest slots for the largest n with (n + 1)(1 - c_n) < `factor`, at least one (Fast-dLLM, arXiv
    2505.22618).

    c_n is the n-th highest confidence. The left side only grows with n, so that "the largest n", "the slots up to the
    first that fails" and "all slots that pass" are one set: public copies that differ here have mistakes in their
    loops (one writes one slot more where all pass, or none).
    """

    kind: ClassVar[str] = "factor"
    factor: float = Field(1.0, gt=0)

    def start(self) -> CommitState:
        return _FactorState(self)


class _FactorState(CommitState):
    def __init__(self, rule: Factor) -> None:
        self.rule = rule

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        order, inside = ranked(scores.confidence, scores.among(canvas))
        n = canvas.place + 1
        passes = (n + 1) * (1 - scores.confidence.gather(1, order)) < self.rule.factor
        first = (passes | (n == 1)).long().cumprod(1).bool()
        return torch.zeros_like(inside).scatter(1, order, inside & first)


class EntropyBound(CommitRule):
    """The slots of least entropy while the sum of H less its largest is at most `bound` (EB-Sampler, arXiv
    2505.24857).

    sum of H_j over the chosen - max H_j bounds the error of writing them as if they were independent, so one is
    always allowed. `bound` is the paper's gamma, in nats; 0.1 is what transformers' DiffusionGemma has. Sums run over
    the text's own slots in float64 (one public copy takes its maximum over the batch).
    """

    kind: ClassVar[str] = "entropy-bound"
    bound: float = Field(0.1, ge=0)

    def start(self) -> CommitState:
        return _EntropyBoundState(self)


class _EntropyBoundState(CommitState):
    def __init__(self, rule: EntropyBound) -> None:
        self.rule = rule

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        order, inside = ranked(-scores.entropy, scores.among(canvas))
        entropy = torch.where(inside, scores.entropy.gather(1, order), 0.0).double()
        error = entropy.cumsum(1) - entropy.cummax(1).values
        return torch.zeros_like(inside).scatter(1, order, inside & (error <= self.rule.bound))


class Lead(CommitRule):
    """All slots whose best token is ahead of the next by at least `by`: p1 - p2 (the margin, as a threshold)."""

    kind: ClassVar[str] = "lead"
    by: float = Field(0.8, ge=0, le=1)

    def start(self) -> CommitState:
        return _LeadState(self)


class _LeadState(CommitState):
    def __init__(self, rule: Lead) -> None:
        self.rule = rule

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        return scores.among(canvas) & (scores.confidence - scores.second >= self.rule.by)


class Nearby(CommitRule):
    """Slots with c >= `above`; within `reach` slots of such a one, c >= `near` is enough (LocalLeap, arXiv
    2510.07081).

    The anchors are open slots that are sure now, not slots written earlier.
    """

    kind: ClassVar[str] = "nearby"
    above: float = Field(0.9, ge=0, le=1)
    near: float = Field(0.75, ge=0, le=1)
    reach: int = Field(4, ge=0)

    def start(self) -> CommitState:
        return _NearbyState(self)


class _NearbyState(CommitState):
    def __init__(self, rule: Nearby) -> None:
        self.rule = rule

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        among, reach = scores.among(canvas), self.rule.reach
        anchors = among & (scores.confidence >= self.rule.above)
        around = F.max_pool1d(anchors.float()[:, None], 2 * reach + 1, 1, reach)[:, 0] > 0
        return anchors | among & around & (scores.confidence >= self.rule.near)


class Runs(CommitRule):
    """All slots with c > `above`, and of each run of open slots the surest one if c > `low` (dInfer, hierarchical
    decoding, arXiv 2510.08666).

    Written slots divide the block into runs; one slot of each is far from those of the others, and so depends on them
    less. Not safe where far slots do depend on each other (permutations). dInfer takes one text at a time.
    """

    kind: ClassVar[str] = "runs"
    above: float = Field(0.9, ge=0, le=1)
    low: float = Field(0.4, ge=0, le=1)

    def start(self) -> CommitState:
        return _RunsState(self)


class _RunsState(CommitState):
    def __init__(self, rule: Runs) -> None:
        self.rule = rule

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        among = scores.among(canvas)
        surest = best_of_runs(scores.confidence, among)
        return among & (scores.confidence > self.rule.above) | surest & (scores.confidence > self.rule.low)


def best_of_runs(key: Tensor, among: Tensor) -> Tensor:
    """The slot with the highest `key` [B, L] of each run of neighbouring slots of `among`, bool [B, L]; ties: the
    earlier."""
    run = (among & ~F.pad(among, (1, 0))[:, :-1]).cumsum(1)  # 1, 2, ...; what is no slot of `among` goes to bin 0
    run = torch.where(among, run, 0)
    bins = torch.full((len(key), key.shape[1] + 1), -float("inf"), device=key.device, dtype=key.dtype)
    top = among & (key == bins.scatter_reduce(1, run, key, "amax").gather(1, run))
    place = torch.arange(key.shape[1], device=key.device).expand_as(run)
    first = torch.full_like(bins, key.shape[1], dtype=torch.int64)
    first = first.scatter_reduce(1, torch.where(top, run, 0), torch.where(top, place, key.shape[1]), "amin")
    return top & (place == first.gather(1, run))


class AboveMean(CommitRule):
    """All slots with c > tau - `slack`, tau the mean confidence at which the text's slots were written (Saber, arXiv
    2510.18165).

    slack 0 is the paper's rule. It comes to a halt where the model is sure: tau is near 1 then, nothing is above it,
    and one slot is written at a time; a small slack mends that. Before anything is written, only the surest slot is.
    Saber's other half, which takes slots back, is a reviser.
    """

    kind: ClassVar[str] = "above-mean"
    remembers: ClassVar[bool] = True
    slack: float = Field(0.02, ge=0)

    def start(self) -> CommitState:
        return _AboveMeanState(self)


class _AboveMeanState(CommitState):
    def __init__(self, rule: AboveMean) -> None:
        self.rule = rule

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        written = canvas.status == DONE
        number = written.sum(1)
        mean = torch.where(written, canvas.confidence, 0.0).sum(1) / number
        above = torch.where(number > 0, mean - self.rule.slack, float("inf"))
        return scores.among(canvas) & (scores.confidence > above[:, None])


class AllAtOnce(CommitRule):
    """All slots, as soon as the mean of log p1 - log p2 over them reaches a level (Prophet, arXiv 2508.19982).

    early, middle, late: the level while less than 33 %, less than 67 % and more of the text is written. The
    difference of log-probabilities is that of logits. Prophet counts progress in steps of a fixed number; here it is
    the part of the text that is written, which is the same where each step writes equally many. Before the level is
    reached nothing is taken: put a quota beside it (`Either`). With one block this is the paper's rule, which
    finishes the whole text; with several it finishes the block.
    """

    kind: ClassVar[str] = "all-at-once"
    early: float = Field(7.5, ge=0)
    middle: float = Field(5.0, ge=0)
    late: float = Field(2.5, ge=0)

    def start(self) -> CommitState:
        return _AllAtOnceState(self)


class _AllAtOnceState(CommitState):
    def __init__(self, rule: AllAtOnce) -> None:
        self.rule = rule

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        among = scores.among(canvas)
        gap = torch.where(among, scores.confidence.log() - scores.second.log(), 0.0)
        mean = gap.sum(1) / among.sum(1)  # NaN where nothing is open: never reaches a level
        done = 1 - canvas.masked.sum(1) / (canvas.end - canvas.start).clamp(min=1)
        level = torch.where(done < 0.33, self.rule.early, torch.where(done < 0.67, self.rule.middle, self.rule.late))
        return among & (mean >= level)[:, None]
