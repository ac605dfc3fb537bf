"""`auto` on real pipelines: a named tolerance, no threshold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hasten
from hasten import metrics
from hasten.errors import RecipeError
from hasten.ledger import Ledger
from hasten.pipelines.recipes import recipe
from hasten.pipelines.tiny_models import call_defaults


@pytest.fixture(scope="module")
def video() -> Any:
    pipe = hasten.load("tiny-video")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, budget: Any = None) -> tuple[np.ndarray[Any, Any], Any]:
    call = {**call_defaults(pipe), "num_inference_steps": 24, "output_type": "latent"}

    def once() -> Any:
        return pipe("a nine moving up, quickly", generator=torch.Generator().manual_seed(7), **call).frames

    if budget is None:
        return once(), None
    with hasten.accelerate(pipe, budget) as run:
        return once(), run.report()


def test_a_named_tolerance_is_met_and_spent(video: Any) -> None:
    plain, _ = latents(video)
    computed = []
    for tolerance in (0.03, 0.1, 0.3):
        result, report = latents(video, hasten.Budget(latent_error=tolerance))
        error = metrics.latent_error(torch.as_tensor(result), torch.as_tensor(plain))
        assert error <= tolerance, f"{error} of {tolerance}"
        assert error / 4 < report.estimated_error[0] < 4 * error, "the estimate is of the right size"
        assert "estimated to be off by about" in str(report)
        computed.append(report.computed_fraction)
    assert computed[0] > computed[1] > computed[2] and computed[2] < 0.4 and computed[0] < 1


def test_budget_by_psnr_means_the_same_as_its_latent_error(video: Any) -> None:
    by_psnr, one = latents(video, hasten.Budget(psnr=32))
    by_error, two = latents(video, "auto:latent_error=0.1")
    assert one.nfe == two.nfe
    assert np.array_equal(np.asarray(by_psnr), np.asarray(by_error))


def test_names_with_arguments() -> None:
    rule = recipe("auto:psnr=32").reuse.rule  # type: ignore[union-attr]
    assert isinstance(rule, Ledger) and rule.tolerance == pytest.approx(0.1)
    joined = recipe("easycache:limit=0.2,warmup=0.3+linear-ag:every=3")
    assert joined.reuse.rule.limit == 0.2 and joined.guidance.every == 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("auto:pnsr=30", "psnr"),
        ("auto:psnr", "no argument"),
        ("auto:psnr=30,quality=0.5", "one of psnr"),
        ("auto:psnr=3", "psnr"),
        ("easycache:limit=much", "limit"),
        ("auto:psnr=[", "cannot read"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        recipe(text)
