"""What may be spent, as people write it."""

from __future__ import annotations

import math

import pytest

from hasten import Budget
from hasten.errors import UsageError
from hasten.pipelines.tune.goal import Goal, seconds_of


@pytest.mark.parametrize(
    ("written", "measure", "limit"),
    [
        ("psnr>=30", "psnr", 30), ("PSNR >= 30 dB", "psnr", 30), ("psnr=42.5", "psnr", 42.5), ("latent_error<=0.05", "latent_error", 0.05),
        ("latent_error<=5%", "latent_error", 0.05), ("ssim>=98%", "ssim", 0.98), (" ssim >= .9 ", "ssim", 0.9),
        (Budget(psnr=35), "psnr", 35), (Budget(latent_error=0.1), "latent_error", 0.1),
    ],
)  # fmt: skip
def test_a_budget_is_read(written: str | Budget, measure: str, limit: float) -> None:
    goal = Goal.read(written)
    assert (goal.measure, goal.limit) == (measure, pytest.approx(limit))
    assert Goal.read(str(goal)) == goal, "what it is called is read back"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("psnr", "is none"), ("psnr>30", "is none"), ("psnr>=", "is none"), ("psnr>=1.2.3", "is none"), ("psnr>=.", "is none"),
        ("psnr<=30", "asks for bad results. Write psnr>=30"), ("latent_error>=0.1", "asks for bad results"),
        ("psnr>=30%", "none of psnr's"), ("ssim>=98", "lies in (0, 1], got 98"), ("psnr>=12", "lies in (12, 90]"),
        ("ssim>=0.9dB", "none of ssim's"), ("exact_match>=0.99", "text diffusion"), ("lpips<=0.1", "is none"),
    ],
)  # fmt: skip
def test_what_is_no_budget_is_refused_in_words(written: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Goal.read(written)
    assert said in str(caught.value)


def test_a_goal_is_met_on_its_good_side() -> None:
    psnr, error = Goal("psnr", 30), Goal("latent_error", 0.05)
    assert psnr.met(30) and psnr.met(math.inf) and not psnr.met(29.9) and not psnr.met(None) and not psnr.met(math.nan)
    assert error.met(0.05) and error.met(0) and not error.met(0.051) and not error.met(math.inf)
    assert (psnr.told(math.inf), psnr.told(-math.inf), error.told(math.inf)) == ("identical", "not to be measured", "not to be measured")


def test_a_stricter_goal_tolerates_less() -> None:
    for measure, limits in (("psnr", (20, 30, 40)), ("ssim", (0.8, 0.9, 0.99)), ("latent_error", (0.5, 0.1, 0.01))):
        tolerances = [Goal(measure, limit).tolerance for limit in limits]  # type: ignore[arg-type]
        assert tolerances == sorted(tolerances, reverse=True) and 0 < tolerances[-1] < tolerances[0] <= 1


@pytest.mark.parametrize(("text", "seconds"), [("10m", 600), ("90s", 90), ("1h30m", 5400), ("600", 600), ("1.5m", 90), ("2M", 120)])
def test_a_time_is_read(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "m", "10 minutes", "-5m", "nan", "1m1h"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is none. Write 10m"):
        seconds_of(text)
