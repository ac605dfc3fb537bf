"""How noise levels are chosen: against diffusers' own spacings where it has them, and on odd inputs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import RecipeError, UsageError
from hasten.samplers.levels import Spacing, between, shares, shifted
from hasten.samplers.solver import Solver

NOISE: tuple[Spacing, ...] = ("karras", "exponential", "beta")


@pytest.mark.parametrize("spacing", NOISE)
@pytest.mark.parametrize("n", [2, 7, 20])
def test_diffusers_spaces_alike(spacing: Spacing, n: int) -> None:
    if spacing == "beta":
        pytest.importorskip("scipy")
    option: dict[str, Any] = {f"use_{spacing}_sigmas": True}
    flow, on_sigma = FlowMatchEulerDiscreteScheduler(**option), EulerDiscreteScheduler(**option)
    for scheduler, tolerance in ((flow, 1e-4), (on_sigma, 1e-2)):
        scheduler.set_timesteps(n)
        theirs = scheduler.sigmas[:-1].tolist()
        ours = between(spacing, n, theirs[0], theirs[-1])
        assert ours == pytest.approx(theirs, rel=tolerance, abs=2e-4)


@given(
    spacing=st.sampled_from(NOISE), n=st.integers(2, 90), top=st.floats(0.5, 200), share=st.floats(1e-4, 0.4)
)
def test_levels_fall_from_top_to_bottom(spacing: Spacing, n: int, top: float, share: float) -> None:
    levels = between(spacing, n, top, top * share)
    assert len(levels) == n and all(a > b for a, b in pairwise(levels))
    assert levels[0] == pytest.approx(top) and levels[-1] == pytest.approx(top * share)


@given(n=st.integers(1, 90), shift=st.floats(0.1, 10))
def test_even_shares(n: int, shift: float) -> None:
    trailing, linspace = shares("trailing", n, 0.001), shares("linspace", n, 0.001)
    assert trailing[0] == linspace[0] == 1
    assert trailing[-1] == pytest.approx(1 / n) and linspace[-1] == pytest.approx(0.001 if n > 1 else 1)
    moved = [shifted(u, shift) for u in trailing]
    assert moved[0] == pytest.approx(1) and all(a > b for a, b in pairwise(moved))
    assert [shifted(u, 1 / shift) for u in moved] == pytest.approx(trailing), "shifting back undoes it"


def test_time_and_noise_are_not_mixed_up() -> None:
    with pytest.raises(UsageError, match=r"spaces noise levels.*trailing, linspace"):
        shares("karras", 4, 0.001)
    with pytest.raises(UsageError, match="does not space noise levels"):
        between("trailing", 4, 1.0, 0.1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "euler", "order": 2}, "order is for dpm\\+\\+ and unipc"),
        ({"name": "pndm", "spacing": "karras"}, "neither spacing nor times"),
        ({"name": "pndm", "times": (1.0, 0.5)}, "neither spacing nor times"),
        ({"times": (1.0, 0.5), "steps": 0.5, "shift": 2.0}, "leave out steps, shift"),
        ({"times": (0.9, 0.5)}, "fall from 1"),
        ({"times": (1.0, 0.5, 0.5)}, "fall from 1"),
        ({"times": (1.0, 0.0)}, "above 0"),
        ({"times": ()}, "above 0"),
    ],
)
def test_wrong_combinations_say_so(fields: dict[str, Any], words: str) -> None:
    with pytest.raises((RecipeError, ValueError), match=words):
        Solver(**fields)
