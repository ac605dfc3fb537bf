"""Cache, guidance and attention spend of one account on real loops; where there is one branch, it is reuse alone to the bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.pipelines.recipes import recipe
from hasten.pipelines.tiny_models import call_defaults
from hasten.recipe import Recipe
from hasten.samplers.guidance_ledger import LedgerGuidance
from hasten.sparse_attn.layouts.layout import Identity
from hasten.sparse_attn.pattern import Pattern
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.scorers.pooled import Centroid
from hasten.sparse_attn.selectors.target import TargetRecall
from hasten.sparse_attn.stand_ins.compensate import Compensate
from tests.hosts import (
    FLUX_CALL,
    UNET_CALL,
    WAN_CALL,
    small_flux,
    small_unet,
    small_wan,
)
from tests.pipelines.attention_recipes import PART, SMALL, STOOD_FOR
from tests.pipelines.test_guidance_seam import loop

pytestmark = pytest.mark.filterwarnings("ignore:hasten")

ALONE = recipe("auto:latent_error=0.9").model_copy(update={"guidance": None})
BOTH = ALONE.model_copy(update={"guidance": LedgerGuidance(tolerance=0.9, after=0.1)})
GUIDED = [(small_wan, WAN_CALL), (small_unet, UNET_CALL), (partial(hasten.load, "tiny-image"), call_defaults("tiny-image"))]
"""The last is trained: of random weights that predict a variance, too, d is never affordable."""


def generate(pipe: Any, call: dict[str, Any], which: Recipe, steps: int = 14) -> tuple[Tensor, hasten.Session]:
    arguments = {**call, "num_inference_steps": steps, "output_type": "latent", "return_dict": False}
    with hasten.accelerate(pipe, which) as run:
        return pipe("a seven", generator=torch.Generator().manual_seed(0), **arguments)[0], run


@pytest.mark.parametrize("host", GUIDED, ids=["sequential", "batched", "variance"])
def test_evaluations_are_left_out_and_the_report_says_what_each_level_spent(host: tuple[Callable[[], Any], dict[str, Any]]) -> None:
    pipe = host[0]()
    _, alone = generate(pipe, host[1], ALONE)
    found, run = generate(pipe, host[1], BOTH)
    of, report = run.trace.runs[0], run.report()
    assert report.nfe < alone.report().nfe and bool(torch.isfinite(found).all())
    assert set(of.error_by_level) == {"reuse", "guidance"} and of.estimated_error is not None
    assert sum(error**2 for error in of.error_by_level.values()) == pytest.approx(of.estimated_error**2)
    assert of.error_by_level["guidance"] > 0 and "of that     reuse" in str(report) and "guidance 0." in str(report)
    assert not alone.trace.runs[0].error_by_level and "of that" not in str(alone.report())


def test_on_a_host_with_one_branch_it_is_reuse_alone_to_the_bit() -> None:
    pipe = small_flux()
    one, alone = generate(pipe, FLUX_CALL, ALONE)
    two, run = generate(pipe, FLUX_CALL, BOTH)
    assert torch.equal(one, two) and run.report().estimated_error == alone.report().estimated_error
    assert [event.action for event in run.trace.events] == [event.action for event in alone.trace.events]
    assert run.trace.notes == alone.trace.notes and not any("guidance" in told for told in run.report().warnings)
    assert "one branch per step" in str(run.report())


def test_a_guidance_that_was_not_affordable_is_told_and_no_alarm() -> None:
    strict = ALONE.model_copy(update={"guidance": LedgerGuidance(tolerance=0.9, after=1.0)})
    _, run = generate(small_wan(), WAN_CALL, strict)
    assert "never affordable" in str(run.report()) and not any("guidance" in told for told in run.report().warnings)


def test_one_synchronisation_a_step_for_all_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, reads, steps, tolist = small_wan(), [0], [], Tensor.tolist

    def counted(self: Tensor) -> Any:
        reads[0] += 1
        return tolist(self)

    with hasten.accelerate(pipe, BOTH | STOOD_FOR) as run:
        run.clock.on_tick.append(lambda _: steps.append(reads[0]))
        monkeypatch.setattr(Tensor, "tolist", counted)
        pipe("a seven", generator=torch.Generator().manual_seed(0), output_type="latent", **{**WAN_CALL, "num_inference_steps": 14})
    per_step = [after - before for before, after in zip(steps, steps[1:], strict=False)]  # noqa: RUF007
    assert max(per_step) <= 1 and sum(per_step) >= 3, per_step


def test_attention_is_charged_by_what_it_leaves_out() -> None:
    pipe = small_wan(layers=2)
    _, run = generate(pipe, WAN_CALL, ALONE | STOOD_FOR)
    spent = run.trace.runs[0].error_by_level
    mass = [1 - call.recall for call in run.trace.attention if call.recall is not None]
    assert set(spent) == {"reuse", "attention"} and min(mass) / 4 < spent["attention"] < 2 * max(mass)
    assert "charged by what it says it leaves out" in str(run.report())


def following(tolerance: float, lowest: float | None = 0.55) -> Recipe:
    """Clusters of four tokens whose recall follows the account of a ledger of `tolerance`."""
    select = TargetRecall(target=0.9, lowest=lowest, first=0.5, samples=16)
    pattern = Pattern(layout=Identity(block=4), score=Centroid(), select=select)
    sparse = Recipe(name="following", attention=SparseAttention(patterns=(pattern,), compensate=Compensate(), **SMALL))
    return sparse | recipe(f"auto:latent_error={tolerance}").model_copy(update={"guidance": None})


def test_attention_draws_on_the_account() -> None:
    """It reads more of the mass where the tolerance is tight, less where it is wide, and stays within it by its own estimate."""
    pipe, read, spent = small_wan(layers=2), {}, {}
    call = {**WAN_CALL, "height": 64, "width": 64}
    for tolerance in (0.02, 0.2, 0.9):
        _, run = generate(pipe, call, following(tolerance), steps=24)
        calls = [each.recall for each in run.trace.attention if each.step > 12 and each.recall is not None]
        read[tolerance], spent[tolerance] = sum(calls) / len(calls), run.trace.runs[0].error_by_level["attention"]
        assert "it reads as much as the account can afford" in str(run.report())
    assert read[0.02] > read[0.2] + 0.02 > read[0.9] + 0.04, read
    assert spent[0.9] < 0.9 and spent[0.2] < 0.25, spent


def test_attention_that_does_not_follow_reads_its_target_whatever_is_left() -> None:
    pipe, call = small_wan(layers=2), {**WAN_CALL, "height": 64, "width": 64}
    tight, wide = (generate(pipe, call, following(tolerance, None), steps=14)[1] for tolerance in (0.0001, 0.0002))
    recalls = [[each.recall for each in run.trace.attention] for run in (tight, wide)]
    assert recalls[0] == recalls[1] and "it reads what its recipe says, whatever is left" in str(tight.report())


def test_without_an_account_there_is_nothing_to_follow_and_that_is_said() -> None:
    alone = following(0.1).model_copy(update={"reuse": None})
    _, run = generate(small_wan(layers=2), WAN_CALL, alone)
    assert "no part of this recipe keeps an account" in str(run.report())


def test_attention_of_which_nobody_knows_is_told() -> None:
    _, run = generate(small_wan(layers=2), WAN_CALL, ALONE | PART)
    assert run.trace.runs[0].error_by_level["attention"] == 0 and "not charged: what it leaves out is not known" in str(run.report())


@pytest.mark.parametrize("reuse", [None, "auto:latent_error=0.9", "listed"])
def test_the_account_is_the_same_whichever_branch_comes_first(reuse: str | None) -> None:
    """u answered before c is known is put right in the conditional call, and the cache learns what it was put right to."""
    pipe, part = small_wan(), None if reuse is None else recipe(reuse).reuse
    guided, found, spent = Recipe(reuse=part, guidance=LedgerGuidance(tolerance=0.9, after=0.1)), [], []
    for uncond_first in (False, True):
        with hasten.accelerate(pipe.transformer, guided, scheduler=pipe.scheduler) as run:
            found.append(loop(pipe, uncond_first=uncond_first, scale=lambda _: 4.0, steps=20))
        spent.append(run.trace.runs[0].error_by_level)
        assert "skip" in {event.action for event in run.trace.events} and not run.trace.notes
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert spent[0] == pytest.approx(spent[1], rel=1e-3) and spent[0]["guidance"] > 0


def test_runs_of_a_session_start_with_a_full_account() -> None:
    pipe = small_wan()
    call = {**WAN_CALL, "num_inference_steps": 14, "output_type": "latent", "return_dict": False}
    with hasten.accelerate(pipe, BOTH) as run:
        found = [pipe("a seven", generator=torch.Generator().manual_seed(0), **call)[0] for _ in range(2)]
    assert torch.equal(*found) and run.trace.runs[0].error_by_level == run.trace.runs[1].error_by_level
