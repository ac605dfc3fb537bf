"""From a pipeline and prompts to a recipe, on the smallest hosts."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hasten
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.bench.candidates import Candidate, ours
from hasten.pipelines.bench.foreign import unavailable
from hasten.pipelines.bench.shots import Sample
from hasten.pipelines.tune import run as module
from hasten.pipelines.tune.goal import Goal
from hasten.pipelines.tune.result import Tuned
from hasten.pipelines.tune.run import tune
from hasten.pipelines.tune.space import first_guesses
from hasten.pipelines.tune.study import Study
from hasten.pipelines.tune.trials import Bench
from hasten.pipelines.tune.verify import against, in_turn
from hasten.session import Attachment
from tests.hosts import FLUX_CALL, PIXART_CALL, UNET_CALL, small_flux, small_pixart, small_unet

PROMPTS = ["a seven", "a one", "the cat", "a red dog"]


@pytest.fixture
def few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of seven trials, however slow the machine is."""
    search = Study.search

    def limited(self: Study, bench: Any, space: Any, seconds: float, told: Any = lambda _: None, goals: Any = ()) -> None:
        class Enough(Exception):
            pass

        count = 0

        def tell(trial: Any) -> None:
            nonlocal count
            told(trial)
            count += 1
            if count == 7:
                raise Enough

        try:
            search(self, bench, space, math.inf, tell, goals)
        except Enough:
            return

    def plans_first(space: Any, tolerance: float) -> list[dict[str, Any]]:
        return sorted(first_guesses(space, tolerance), key=lambda guess: guess["family"] != "plan")

    monkeypatch.setattr("hasten.pipelines.tune.study.first_guesses", plans_first)
    monkeypatch.setattr(Study, "search", limited)
    monkeypatch.setattr(module.Tuning, "_affordable", lambda self: 2)
    monkeypatch.setattr(module.Tuning, "_over", lambda self: False)


def tuned(pipe: Any, call: dict[str, Any], folder: Path, budget: str = "psnr>=25", **more: Any) -> tuple[Tuned, list[str]]:
    said: list[str] = []
    found = tune(pipe, PROMPTS, budget, seconds=600, study=folder / "study", call=call, say=said.append, **more)
    return found, said


def test_end_to_end(tmp_path: Path, few_trials: None) -> None:
    """Batched guidance, a first-order solver: schedules are judged, a recipe is found, written, and right where it was found."""
    pipe = small_unet()
    plain = pipe("a seven", generator=torch.Generator().manual_seed(0), output_type="np", **UNET_CALL).images
    found, said = tuned(pipe, UNET_CALL, tmp_path, out=tmp_path / "r.yaml", model="small")
    assert found.recipe is not None and found.best is not None and found.best.holds(found.goal), said
    stamp = found.recipe.tuned
    assert stamp is not None and stamp.kept == 1 and stamp.prompts == 1 and stamp.steps == 6 and stamp.budget == "psnr >= 25 dB"
    assert hasten.recipe(tmp_path / "r.yaml") == found.recipe
    assert any(line.startswith("1. plan: computed ") for line in said) and f"The recipe is in {tmp_path / 'r.yaml'}." in said
    with hasten.accelerate(pipe, found.recipe) as run:
        pipe("a seven", **UNET_CALL)
    assert not any("elsewhere" in note for note in run.trace.notes)
    again = pipe("a seven", generator=torch.Generator().manual_seed(0), output_type="np", **UNET_CALL).images
    assert (plain == again).all(), "the pipeline is as it was"
    told = found.sentences()
    assert re.search(r"x on 1 held-out prompts, of which 100% keep psnr >= 25 dB", told[0]) and "noise floor" in told[1]
    assert any("1 held-out prompt shows little" in sentence for sentence in found.why)
    assert module.UNFITTED in found.why and module.UNFITTED in said, "six steps of this scheduler begin at 0.83"
    rows = found.rows()
    assert {row["where"] for row in rows} == {"tuning", "held out"} and all(row["n"] for row in rows)
    if len(found.recipe.axes) == 2:
        assert found.interactions and found.interactions[0].told() in told


def test_another_solver_and_impossible_budgets(tmp_path: Path, few_trials: None) -> None:
    found, _ = tuned(small_pixart(), PIXART_CALL, tmp_path, "psnr>=90")
    assert found.recipe is None and found.best is None and "noise floor" not in " ".join(found.sentences())
    assert any("DPMSolverMultistepScheduler is not first-order" in sentence for sentence in found.why)
    assert re.search(r"None of the \d+ compositions .* keeps psnr >= 90 dB .*Allow more time, or a lower budget", found.why[-1])


def test_one_branch(tmp_path: Path, few_trials: None) -> None:
    found, said = tuned(small_flux(layers=1, single_layers=1), FLUX_CALL, tmp_path, "latent_error<=0.5")
    assert any("one branch per step, so guidance was not searched" in sentence for sentence in found.why)
    assert found.trials and not any("both" in line for line in said)
    assert module.UNFITTED not in [*found.why, *said]


def test_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = small_unet()
    with pytest.raises(UsageError, match=r"0 s are too short: the plain runs alone take about .* Allow \d+ s or more"):
        tune(pipe, PROMPTS, "psnr>=25", seconds=1e-3, study=tmp_path / "a", call=UNET_CALL)
    monkeypatch.setattr(module.Tuning, "_affordable", lambda self: 2)
    found = tune(pipe, PROMPTS, "psnr>=25", seconds=1e-3, study=tmp_path / "b", call=UNET_CALL)
    assert found.recipe is None and "over before any composition had run" in found.why[-1]


def test_measures_that_a_host_cannot_have_are_refused(tmp_path: Path) -> None:
    bench = Bench(small_unet(), UNET_CALL, [Sample("a seven", 0)])
    bench.plain[0].latents = None
    bench.plain[0].frames = bench.plain[0].frames[:, :8]

    def refused(goal: Goal) -> str:
        of = SimpleNamespace(pipe=bench.pipe, job=SimpleNamespace(goal=goal))
        with pytest.raises(UsageError) as caught:
            module.Tuning._measurable(of, bench)  # type: ignore[arg-type]
        return str(caught.value)

    assert "does not hand out its latents" in refused(Goal("latent_error", 0.1)) and "11 x 11" in refused(Goal("ssim", 0.9))
    measured = bench.measure("plain", ours("plain", "plain"))
    assert not measured.whole, "frames of another size are a reason, not an end"


def test_broken_results_are_told(tmp_path: Path) -> None:
    """NaN where the plain run is fine, and NaN everywhere."""
    pipe = small_unet()
    bench = Bench(pipe, UNET_CALL, [Sample("a seven", 0)])

    @contextlib.contextmanager
    def nan(host: Any) -> Iterator[None]:
        broken = Attachment()
        broken.replace(host.vae, "decode", lambda z, **kwargs: (torch.full((1, 3, 32, 32), math.nan),))
        try:
            yield
        finally:
            broken.restore()

    measured = bench.measure("broken", Candidate("broken", nan))
    assert not measured.whole and "NaN" in measured.why and measured.kept(Goal("psnr", 20)) == 0
    assert bench.measure("plain", ours("plain", "plain")).outcomes[0].psnr is None, "identical"
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(math.nan)
    with pytest.raises(RefusedError, match="plain run of 'a seven' gives NaN"):
        Bench(pipe, UNET_CALL, [Sample("a seven", 0)])


def test_every_family_of_peers_has_its_turn() -> None:
    names = ["diffusers A @ 1", "diffusers A @ 2", "diffusers A @ 3", "cache-dit B @ 1", "cache-dit B @ 2", "diffusers C"]
    turns = [peer.recipe for peer in in_turn([unavailable(name, "peer:x", "no") for name in names])]
    assert turns == ["diffusers A @ 1", "cache-dit B @ 1", "diffusers C", "diffusers A @ 2", "cache-dit B @ 2", "diffusers A @ 3"]


def test_peers_are_measured_while_there_is_time(tmp_path: Path) -> None:
    bench, goal = Bench(small_unet(), UNET_CALL, [Sample("a seven", 0)]), Goal("psnr", 20)
    peers = [unavailable("cache-dit X", "peer:cache-dit", "not available: no module"), ours("diffusers Y", "plain"), ours("diffusers Z", "plain")]
    asked = iter((False, False, True))
    found, left = against(bench, peers, goal, lambda: next(asked))
    assert [peer.name for peer in found] == ["cache-dit X", "diffusers Y"] and left == 1
    assert found[0].why == "not available: no module"
    table = Tuned(goal, [], [], peers=found)
    assert [row["control"] for row in table.rows()] == ["peer:cache-dit", "peer:diffusers"] and table.rows()[0]["speedup"] is None
