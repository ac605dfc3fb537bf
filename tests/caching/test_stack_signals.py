"""Signals seen from inside: they measure the paper's formula, start unknown, hold little, and mix nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor

from hasten.caching.spans import Piece
from hasten.caching.stack_signals import (
    BlockInput,
    Evidence,
    LeadChange,
    Magnitude,
    StackSignal,
    ratio_at,
    rescaled,
)
from hasten.caching.tokens import MovedTokens, Tokens
from hasten.part import Part
from hasten.step import Step
from tests.contract import PartContract, parts, seeded, steps

PIECE = Piece(0, 0, 4)


def seen(stream: Tensor, *others: Tensor) -> Evidence:
    return Evidence([stream], [stream], stream, list(others))


def number(value: Tensor | float | None) -> float | None:
    return None if value is None else float(value)


SIZES = [one for one in parts(StackSignal) if not one.values[0].signed]  # type: ignore[union-attr]
"""Signals that have a size; the others have a sign."""


class TestSignals(PartContract):
    family = StackSignal

    @pytest.fixture(params=parts(StackSignal))
    def part(self, request: pytest.FixtureRequest) -> Part:
        return request.param  # type: ignore[no-any-return]

    def run(self, part: StackSignal, streams: Callable[[int], Tensor], num: int = 8) -> list[float | None]:
        """What is measured at each step when every step is computed."""
        state, found = part.start(), []
        for step in steps(20)[:num]:
            found.append(number(state.measure(step, seen(streams(step.index), seeded(1, 1, 6)))))
            state.computed(step, seen(streams(step.index), seeded(1, 1, 6)))
            state.learned(step, PIECE, streams(step.index))
        return found

    def test_the_first_step_is_unknown(self, part: StackSignal) -> None:
        assert part.start().measure(steps(20)[0], seen(seeded(0, 1, 4, 8))) is None

    def test_what_stands_still_reads_nothing(self, part: StackSignal) -> None:
        found = self.run(part, lambda _: seeded(0, 1, 4, 8))
        assert found[0] is None and found[3:] == pytest.approx([0.0] * 5, abs=1e-6)

    @pytest.mark.parametrize("part", SIZES)
    def test_what_moves_reads_more(self, part: StackSignal) -> None:
        def growing(rate: float) -> Callable[[int], Tensor]:
            return lambda i: seeded(0, 1, 4, 8) * (1 + rate) ** i + seeded(2, 1, 4, 8) * rate * i

        slow, fast = self.run(part, growing(0.02))[2], self.run(part, growing(0.2))[2]
        assert slow is not None and fast is not None and 0 < slow < fast

    def test_another_shape_is_unknown_or_host_side(self, part: StackSignal) -> None:
        state = part.start()
        state.measure(steps(20)[0], seen(seeded(0, 1, 4, 8)))
        state.computed(steps(20)[0], seen(seeded(0, 1, 4, 8)))
        assert state.measure(steps(20)[1], seen(seeded(0, 1, 6, 8))) is None

    def test_what_is_held_is_bounded(self, part: StackSignal) -> None:
        state = part.start()
        for step in steps(20):
            state.measure(step, seen(seeded(step.index, 1, 4, 8), seeded(1, 1, 6)))
            state.computed(step, seen(seeded(step.index, 1, 4, 8), seeded(1, 1, 6)))
            state.learned(step, PIECE, seeded(step.index, 1, 4, 8))
        assert sum(tensor.numel() for tensor in state.tensors()) <= 4 * 4 * 8 + 6


def test_lead_change_compares_with_the_last_computed_step() -> None:
    state, run = LeadChange().start(), steps(20)
    state.computed(run[0], seen(torch.ones(4)))
    assert number(state.measure(run[1], seen(torch.full((4,), 1.1)))) == pytest.approx(0.1, rel=1e-5)
    assert number(state.measure(run[2], seen(torch.full((4,), 1.3)))) == pytest.approx(0.3, rel=1e-5)


def test_block_input_compares_with_the_step_before() -> None:
    state, run = BlockInput(of="modulation").start(), steps(20)
    stream, text, mask = seeded(0, 1, 4, 8), torch.full((1, 5), 7.0), torch.tensor([[0.0, -math.inf]])
    found = [
        number(state.measure(run[i], seen(stream, text, torch.full((1, 6), value), mask)))
        for i, value in enumerate((1.0, 1.1, 1.32))
    ]
    assert found[0] is None and found[1:] == pytest.approx([0.1, 0.2], rel=1e-4), "text and mask stand still"


def test_block_input_does_not_see_the_scale_of_the_stream() -> None:
    """A block normalises its input, and so does the signal."""
    state, run = BlockInput(of="stream").start(), steps(20)
    for step, scale in zip(run, (1.0, 5.0), strict=False):
        change = state.measure(step, seen(seeded(0, 1, 4, 64) * scale))
    assert number(change) == pytest.approx(0.0, abs=1e-4)


def test_polynomial_is_numpys_and_stays_in_its_domain() -> None:
    coefficients = (3.0, -2.0, 0.5, 0.1, 0.02)
    for x in (0.0, 0.05, 0.3):
        value = rescaled(torch.tensor(x), coefficients, None)
        assert float(value) == pytest.approx(float(numpy.polyval(coefficients, x)), rel=1e-5)
    assert rescaled(torch.tensor(9.0), coefficients, (0.0, 0.3)) == rescaled(torch.tensor(0.3), coefficients, None)
    assert float(rescaled(torch.tensor(0.1), (-5.0, 0.0), None)) == 0.0, "an expected change is never negative"
    assert math.isnan(float(rescaled(torch.tensor(math.nan), coefficients, (0.0, 0.3))))


def test_magnitude_adds_up_like_the_paper() -> None:
    """E_t = sum over skipped steps of |1 - product of ratios since the last computed step|."""
    ratios = (1.0, 0.9, 0.8, 0.95, 0.97)
    state, run = Magnitude(ratios=ratios).start(), [Step(i, 5, 1 - i / 5) for i in range(5)]
    assert state.measure(run[0], seen(seeded(0, 4))) is None
    state.computed(run[0], seen(seeded(0, 4)))
    found = [number(state.measure(step, seen(seeded(0, 4)))) for step in run[1:3]]
    assert found == pytest.approx([0.1, 1 - 0.72])
    state.measure(run[3], seen(seeded(0, 4)))
    state.computed(run[3], seen(seeded(0, 4)))
    assert number(state.measure(run[4], seen(seeded(0, 4)))) == pytest.approx(0.03)


def test_recorded_ratios_serve_runs_of_other_lengths() -> None:
    """Whatever the number of steps, the whole run covers the same change of magnitude."""
    ratios = (1.0, 0.9, 0.8, 0.95, 0.97, 0.7)
    whole = math.prod(ratios)
    for total in (6, 3, 11, 40):
        product = math.prod(ratio_at(ratios, Step(i, total, 0.5)) for i in range(total))
        assert product == pytest.approx(whole)
    assert [ratio_at(ratios, Step(i, 6, 0.5)) for i in range(6)] == pytest.approx(list(ratios))


def test_online_magnitude_spreads_a_gap_evenly() -> None:
    state, run = Magnitude().start(), steps(20)
    for index in (0, 4):
        state.computed(run[index], seen(seeded(0, 1, 4, 8)))
        state.learned(run[index], PIECE, seeded(0, 1, 4, 8) * 0.9**index)
    assert number(state.measure(run[6], seen(seeded(0, 4)))) == pytest.approx(1 - 0.9**2, rel=1e-4)


def test_calibration_that_is_missing_is_said() -> None:
    assert "hasten profile" in BlockInput().remark and "hasten profile" in Magnitude().remark
    assert not BlockInput(polynomial=(2.0, 0.0)).remark and not Magnitude(ratios=(1.0, 0.9)).remark


class TestTokens(PartContract):
    family = Tokens

    @pytest.fixture(params=parts(Tokens))
    def part(self, request: pytest.FixtureRequest) -> Part:
        return request.param  # type: ignore[no-any-return]

    @pytest.mark.parametrize("num", [1, 2, 7, 64])
    def test_picks_are_distinct_tokens(self, part: Tokens, num: int) -> None:
        state = part.start()
        for step in steps(10):
            count = part.count(step, num)
            assert 0 <= count <= num
            state.see(step, seeded(step.index, 2, num, 4), computed=step.index % 3 != 1)
            picked = state.pick(count)
            assert picked.dtype == torch.int64 and picked.tolist() == sorted(set(picked.tolist()))
            assert picked.numel() == count and all(0 <= index < num for index in picked.tolist())

    def test_another_number_of_tokens_is_picked_from(self, part: Tokens) -> None:
        state = part.start()
        for step in steps(12):
            num = 16 if step.index < 6 else 4
            state.see(step, seeded(step.index, 2, num, 4), computed=True)
            assert max(state.pick(2).tolist()) < num

    def test_what_is_held_is_bounded(self, part: Tokens) -> None:
        state = part.start()
        for step in steps(12):
            state.see(step, seeded(step.index, 2, 6, 4), computed=True)
        assert 1 <= len(state.tensors()) <= 4


def test_width_follows_the_step() -> None:
    tokens = MovedTokens(early=1.0, late=0.25)
    assert [tokens.count(Step(i, 4, 0.5), 16) for i in range(4)] == [16, 12, 8, 4]
