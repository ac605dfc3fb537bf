from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from hasten.recipe import Guidance
from hasten.samplers.guidance import AdaptiveGuidance, AffineGuidance, GuidanceInterval, HeldGuidance
from tests.contract import GuidanceContract, parts, seeded, steps


class TestEveryGuidance(GuidanceContract):
    @pytest.fixture(params=parts(Guidance))
    def part(self, request: pytest.FixtureRequest) -> Guidance:
        return request.param


def evaluated(part: Guidance, cond: list[Tensor], uncond: list[Tensor]) -> list[int]:
    answers = GuidanceContract().run(part, cond, uncond)
    return [i for i, answer in enumerate(answers) if answer is None]


def test_affine_is_exact_on_an_affine_combination() -> None:
    """u - c = 0.4 (c - c') + 0.7 (u' - c') at every step: after two known steps it is found and continued."""
    cond = [seeded(i, 3, 50) for i in range(8)]
    uncond = [seeded(100, 3, 50)]
    for before, now in zip(cond, cond[1:], strict=False):  # noqa: RUF007
        uncond.append(now + 0.4 * (now - before) + 0.7 * (uncond[-1] - before))
    state = AffineGuidance(every=4, before=0.0).start()
    run = steps(8)
    for i in (0, 1):
        assert state.needs(run[i])
        state.observe(run[i], cond[i], uncond[i])
    assert not state.needs(run[2])
    torch.testing.assert_close(state.estimate(run[2], cond[2]), uncond[2], rtol=1e-3, atol=1e-3)


def test_affine_starts_anew_at_another_size() -> None:
    state, run = AffineGuidance(every=4, before=0.0).start(), steps(8)
    for i, size in enumerate((50, 60)):
        assert state.needs(run[i])
        state.observe(run[i], seeded(i, size), seeded(9 + i, size))
    assert state.needs(run[2]), "nothing was fitted across sizes"


def test_held_needs_a_difference_before_it_holds_one() -> None:
    state, run = HeldGuidance(after=0.0, every=0).start(), steps(4)
    assert state.needs(run[0])
    state.observe(run[0], seeded(0, 5), seeded(1, 5))
    assert not state.needs(run[1])
    torch.testing.assert_close(state.estimate(run[1], seeded(2, 5)), seeded(2, 5) - seeded(0, 5) + seeded(1, 5))


def test_affine_with_parallel_regressors_stays_finite() -> None:
    state, c = AffineGuidance(before=0.0).start(), seeded(0, 20)
    for step in steps(4)[:2]:
        state.observe(step, c, 2 * c)
    torch.testing.assert_close(state.estimate(steps(4)[2], c), 2 * c, rtol=1e-3, atol=1e-3)


def test_adaptive_stops_for_good_once_both_agree() -> None:
    cond = [seeded(0, 40)] * 20
    apart = [1.0 if i < 8 or i == 12 else 0.0 for i in range(20)]
    uncond = [c + a * seeded(1, 40) for c, a in zip(cond, apart, strict=True)]
    assert evaluated(AdaptiveGuidance(agreement=0.999, after=0.2), cond, uncond) == list(range(9))


def test_adaptive_never_stops_before_its_share_nor_on_nan() -> None:
    cond = [seeded(0, 40)] * 20
    assert evaluated(AdaptiveGuidance(agreement=0.9, after=0.5), cond, cond) == list(range(10))
    broken = [torch.full((40,), float("nan"))] * 20
    assert evaluated(AdaptiveGuidance(agreement=0.9, after=0.0), cond, broken) == list(range(20))


def test_held_continues_the_difference() -> None:
    state = HeldGuidance(after=0.0, every=0).start()
    run, c, u = steps(5), seeded(0, 9), seeded(1, 9)
    state.observe(run[0], c, u)
    assert not any(state.needs(step) for step in run[1:])
    torch.testing.assert_close(state.estimate(run[3], seeded(2, 9)), seeded(2, 9) - (c - u))


def test_held_of_order_one_is_exact_on_a_line() -> None:
    state, run, c, slope = HeldGuidance(after=0.0, every=0, order=1).start(), steps(6), seeded(0, 9), seeded(1, 9)
    for step in run[:2]:
        state.observe(step, c, c - slope * step.time)
    torch.testing.assert_close(state.estimate(run[4], c), c - slope * run[4].time)


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", [HeldGuidance, AffineGuidance])
def test_refreshed_at_the_named_interval(kind: type[Guidance], every: int) -> None:
    cond, uncond = [seeded(i, 9) for i in range(24)], [seeded(i + 50, 9) for i in range(24)]
    named = {"after": 0.0} if kind is HeldGuidance else {"before": 0.0}
    known = evaluated(kind(every=every, **named), cond, uncond)
    late = [i for i in known if i > 3]
    assert [b - a for a, b in zip(late, late[1:], strict=False)] == [every] * (len(late) - 1)  # noqa: RUF007


def test_interval_guides_inside_only() -> None:
    cond = [seeded(0, 4)] * 20
    inside = [s.index for s in steps(20) if 0.3 <= s.time <= 0.7]
    assert evaluated(GuidanceInterval(low=0.3, high=0.7), cond, cond) == [0, *inside]
    with pytest.raises(ValidationError, match="must not exceed"):
        GuidanceInterval(low=0.7, high=0.3)
