"""What every method of one kind must do. A test file subclasses a contract and gives it a fixture; the fixture
runs over `Part.members()`, so a method that is added later is tested without being named anywhere."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from _pytest.mark import ParameterSet
from pydantic import ValidationError
from torch import Tensor

import hasten.pipelines.recipes  # noqa: F401  imports every part that a recipe may name
from hasten.drift import AccountState, Rule
from hasten.errors import RecipeError
from hasten.forecast import Forecast
from hasten.part import Part, parse
from hasten.recipe import Guidance
from hasten.step import Step

NEEDED: dict[str, dict[str, Any]] = {"listed": {"at": (0.0, 0.4, 1.0)}, "routed": {"path": "routers.safetensors"}}
"""Arguments of the parts that cannot be made without any."""


def parts(family: type[Part]) -> list[ParameterSet]:
    """One instance of every member of `family`."""
    found = family.members().items()
    return [pytest.param(member(**NEEDED.get(kind, {})), id=kind) for kind, member in sorted(found)]


def steps(total: int, *, branch: int = 0) -> list[Step]:
    """A run of `total` Euler steps over falling, irregular times."""
    times = [(1 - i / total) ** 1.3 for i in range(total + 1)]
    return [Step(i, total, times[i], branch, times[i + 1] - times[i]) for i in range(total)]


def seeded(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class PartContract:
    """Frozen, printable, comparable, serialisable; unknown keys are refused."""

    family: type[Part]

    def test_part_survives_its_own_serialised_form(self, part: Part) -> None:
        data = part.model_dump()
        assert data["kind"] == part.kind
        assert parse(self.family, data, "test") == part

    def test_part_is_frozen_and_hashable(self, part: Part) -> None:
        assert hash(part) == hash(part.model_copy())
        for name in type(part).model_fields:
            with pytest.raises(ValidationError):
                setattr(part, name, getattr(part, name))

    def test_unknown_key_is_refused(self, part: Part) -> None:
        with pytest.raises(RecipeError, match="no_such_key"):
            parse(self.family, {**part.model_dump(), "no_such_key": 1}, "test")

    def test_what_can_be_changed_says_how(self, part: Part) -> None:
        assert (type(part).__doc__ or "").strip()
        assert "start" in dir(part)


class ForecastContract(PartContract):
    family = Forecast

    def test_first_value_stands_in_for_itself(self, part: Forecast) -> None:
        state = part.start()
        assert not state.ready
        state.store(0.9, seeded(0, 3, 4))
        assert state.ready
        assert torch.equal(state.estimate(0.5), seeded(0, 3, 4))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_shape_and_dtype_are_kept(self, part: Forecast, dtype: torch.dtype) -> None:
        state = part.start()
        for number, time in enumerate((1.0, 0.9, 0.65, 0.4, 0.3)):
            state.store(time, seeded(number, 2, 5, dtype=dtype))
            guess = state.estimate(time - 0.05)
            assert guess.shape == (2, 5) and guess.dtype == dtype
            assert bool(torch.isfinite(guess).all())

    def test_value_at_a_known_time_is_the_known_value(self, part: Forecast) -> None:
        state = part.start()
        for number, time in enumerate((1.0, 0.9, 0.65, 0.4)):
            state.store(time, seeded(number, 6))
            torch.testing.assert_close(state.estimate(time), seeded(number, 6))

    def test_constant_stays_constant(self, part: Forecast) -> None:
        state = part.start()
        for time in (1.0, 0.9, 0.65, 0.4, 0.35):
            state.store(time, seeded(7, 6))
        torch.testing.assert_close(state.estimate(0.1), seeded(7, 6))

    def test_estimate_does_not_alias_what_is_kept(self, part: Forecast) -> None:
        state = part.start()
        for number, time in enumerate((1.0, 0.9, 0.65)):
            state.store(time, seeded(number, 6))
            before = [tensor.clone() for tensor in state.tensors()]
            expected = state.estimate(0.5).clone()
            state.estimate(0.5).add_(1000.0)
            assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))
            assert torch.equal(state.estimate(0.5), expected)

    def test_two_states_share_nothing(self, part: Forecast) -> None:
        one, two = part.start(), part.start()
        one.store(1.0, seeded(0, 4))
        assert not two.ready
        two.store(1.0, seeded(1, 4))
        assert torch.equal(one.estimate(1.0), seeded(0, 4))

    def test_one_time_twice_keeps_the_newer_value(self, part: Forecast) -> None:
        """Heun-type solvers evaluate a time twice."""
        state = part.start()
        for number, time in enumerate((1.0, 0.8, 0.8, 0.5, 0.5)):
            state.store(time, seeded(number, 6))
        guess = state.estimate(0.5)
        torch.testing.assert_close(guess, seeded(4, 6))
        assert bool(torch.isfinite(state.estimate(0.3)).all())

    def test_what_is_held_is_bounded_and_counted(self, part: Forecast) -> None:
        state = part.start()
        for number in range(30):
            state.store(1.0 - number / 40, seeded(number, 100))
        held = state.tensors()
        assert 1 <= len(held) <= 6
        assert all(tensor.numel() == 100 for tensor in held)


def decide(rule: Rule, changes: list[float | None]) -> list[bool]:
    """What a rule decides on a run; one that needs errors is told the change as the error of each computed step."""
    state, decisions = rule.start(), []
    for step, change in zip(steps(len(changes)), changes, strict=True):
        decisions.append(state.skip(step, change))
        if rule.needs_errors and not decisions[-1]:
            cast(AccountState, state).learn(step, change if step.index else None)
    return decisions


class RuleContract(PartContract):
    family = Rule

    @pytest.mark.parametrize("total", [*range(1, 31), 50, 100])
    def test_first_step_is_computed(self, part: Rule, total: int) -> None:
        assert not part.start().skip(steps(total)[0], None)

    @pytest.mark.parametrize("change", [None, math.nan, math.inf])
    def test_unknown_change_means_compute(self, part: Rule, change: float | None) -> None:
        unknown, still = part.start(), part.start()
        decisions = [unknown.skip(step, change) for step in steps(40)]
        if part.needs_signal:
            assert not any(decisions)
        else:
            assert decisions == [still.skip(step, 0.0) for step in steps(40)], "it decides without a signal"

    def test_it_skips_something_when_nothing_moves(self, part: Rule) -> None:
        decisions = decide(part, [0.0] * 50)
        assert any(decisions), "a rule that never skips is no rule"

    def test_two_runs_decide_alike(self, part: Rule) -> None:
        changes = [None, *(0.01 * (i % 4) for i in range(39))]

        assert decide(part, changes) == decide(part, changes)

    def test_it_recovers_after_an_unknown_change(self, part: Rule) -> None:
        decisions = decide(part, [None if i == 20 else 0.0 for i in range(60)])
        assert any(decisions[21:])


class GuidanceContract(PartContract):
    family = Guidance

    def run(self, part: Guidance, cond: list[Tensor], uncond: list[Tensor]) -> list[Tensor | None]:
        """Per step what stood in for u, or None where it was evaluated. The first step always is."""
        state, answers = part.start(), []  # type: ignore[attr-defined]
        for step, c, u in zip(steps(len(cond)), cond, uncond, strict=True):
            if step.index == 0 or state.needs(step):
                state.observe(step, c, u)
                answers.append(None)
            else:
                answers.append(state.estimate(step, c))
        return answers

    def test_it_leaves_something_out_when_branches_agree(self, part: Guidance) -> None:
        same = [seeded(0, 2, 8) + 0.1 * i for i in range(30)]
        answers = self.run(part, same, [c.clone() for c in same])
        assert any(answer is not None for answer in answers)
        for c, answer in zip(same, answers, strict=True):
            if answer is not None:
                torch.testing.assert_close(answer, c, msg="equal branches must stay equal")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_answers_have_the_shape_and_dtype_of_c(self, part: Guidance, dtype: torch.dtype) -> None:
        cond = [seeded(i, 2, 8, dtype=dtype) for i in range(30)]
        before = [c.clone() for c in cond]
        answers = self.run(part, cond, [c + seeded(99, 2, 8, dtype=dtype) for c in cond])
        for answer in answers:
            assert answer is None or (answer.shape == (2, 8) and answer.dtype == dtype)
            assert answer is None or bool(torch.isfinite(answer).all())
        assert all(torch.equal(a, b) for a, b in zip(before, cond, strict=True)), "c was changed in place"

    def test_asking_twice_in_a_step_gives_one_answer(self, part: Guidance) -> None:
        state = part.start()  # type: ignore[attr-defined]
        for step in steps(30):
            first = state.needs(step)
            assert state.needs(step) == first
            if first or step.index == 0:
                state.observe(step, seeded(step.index, 4), seeded(step.index + 50, 4))

    def test_what_is_held_is_counted(self, part: Guidance) -> None:
        state = part.start()  # type: ignore[attr-defined]
        for step in steps(6):
            state.observe(step, seeded(step.index, 64), seeded(step.index + 50, 64))
        assert sum(t.numel() for t in state.tensors()) <= 3 * 64
