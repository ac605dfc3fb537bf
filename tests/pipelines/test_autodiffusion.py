"""Searches on real pipelines: what is recorded is the path, what is found is what runs, and it is written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler

import hasten
from hasten.caching.spans_listed import Timetable
from hasten.caching.stack import StackReuse
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.autodiffusion import Bench, search_blocks, search_times, write
from hasten.pipelines.bench.shots import Sample
from hasten.pipelines.path import record_path
from hasten.pipelines.recipes import recipe as find
from hasten.pipelines.solver import scheduler_for
from hasten.recipe import Recipe
from hasten.samplers.sequence import Evolution
from hasten.samplers.solver import Solver
from tests.gaussian import predict
from tests.hosts import WAN_CALL, small_pixart, small_wan

HOSTS = {"flow": FlowMatchEulerDiscreteScheduler(), "vp": DDIMScheduler(clip_sample=False, timestep_spacing="trailing")}
SAMPLES = [Sample("a seven moving left", 0), Sample("a two", 1)]


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("name", ["dpm++", "euler"])
def test_what_is_recorded_is_the_path(kind: str, name: str) -> None:
    made = scheduler_for(HOSTS[kind], Solver(name=name, spacing="trailing"))
    made.set_timesteps(5)
    x = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    x = x * float(getattr(made, "init_noise_sigma", 1.0))
    kept = []
    with record_path(made) as runs:
        for t in made.timesteps:
            seen = made.scale_model_input(x, t) if hasattr(made, "scale_model_input") else x
            kept.append(seen[1])
            x = made.step(predict(made, seen, float(t)), t, x, return_dict=False)[0]
    assert len(runs) == 2 and runs[1].steps == 5 and runs[1].size == 9
    assert runs[1].shares == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    rows = torch.stack([*(k.flatten() for k in kept), x[1].flatten()]).double()
    assert torch.allclose(runs[1].gram[:6, :6], rows @ rows.T, rtol=1e-4, atol=1e-4)
    # The last thing that any of them does is to go to the data that the network sees.
    assert runs[1].gram[-1, -1] == pytest.approx(float(runs[1].gram[5, 5]), rel=1e-3)
    before = made.step
    assert "stepped" not in repr(before), "taken off again"


def test_two_calls_at_a_level_are_refused() -> None:
    made = HeunDiscreteScheduler()
    made.set_timesteps(3)
    x = torch.zeros(1, 1, 2, 2)
    with record_path(made), pytest.raises(RefusedError, match="evaluates twice"):
        made.step(x, made.timesteps[0], x)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(small_wan(), {k: v for k, v in WAN_CALL.items() if k != "num_inference_steps"}, SAMPLES, fine=12)


def test_searched_times_are_nearer_than_their_start(bench: Bench) -> None:
    found = search_times(bench, 3, evolution=Evolution(trials=6))
    assert isinstance(found.recipe.sampler, Solver)
    times = found.recipe.sampler.times
    assert times is not None and len(times) == 3 and times[0] == 1
    assert found.found.cost <= found.start and len(found.found.tried) == 6
    assert bench.error(found.recipe, 50) == pytest.approx(found.found.cost), "whatever number of steps is asked for"
    with pytest.raises(UsageError, match="between 1 and 12"):
        search_times(bench, 13)


def test_searched_blocks_are_left_out(bench: Bench, tmp_path: Path) -> None:
    base = Recipe(name="five", sampler=Solver(name="dpm++", spacing="trailing"))
    found = search_blocks(bench, base, 5, 4, 0.25, evolution=Evolution(trials=5))
    reuse = found.recipe.reuse
    assert isinstance(reuse, StackReuse) and isinstance(reuse.span, Timetable)
    assert sum(map(len, reuse.span.out)) == 5 and reuse.span.out[0] == () and found.found.cost <= found.start
    write(found.recipe, tmp_path / "mine.yaml")
    assert find(tmp_path / "mine.yaml") == found.recipe
    with hasten.accelerate(bench.pipe, tmp_path / "mine.yaml") as run:
        bench.pipe("a seven", **{**WAN_CALL, "num_inference_steps": 5}, output_type="latent")
    assert run.report().computed_fraction == pytest.approx(0.75, abs=0.01)
    for share in (0.0, 0.9):
        with pytest.raises(UsageError, match="1 to 16, as the first step"):
            search_blocks(bench, base, 5, 4, share)


def test_a_step_with_all_blocks_is_learned_anew() -> None:
    """Blocks that are left out twice, with a full step between: what stands in is what they added last."""
    pipe = small_pixart()
    call: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 5, "use_resolution_binning": False}
    from hasten.caching.rules import Listed
    from hasten.forecast import Hold

    table = Timetable(out=((), (1, 2), (), (2,), (0, 3)))
    reuse = StackReuse(lead=0, span=table, rule=Listed(at=(0.0,)), forecast=Hold())
    with hasten.accelerate(pipe, Recipe(name="blocks", reuse=reuse)) as run:
        pipe("a two", **call, output_type="latent")
        out = {}
        for event in run.trace.of_run(0):
            if event.action == "reuse" and event.blocks is not None:
                out.setdefault(event.step, set()).update(range(*event.blocks))
    assert out == {1: {1, 2}, 3: {2}, 4: {0, 3}}


@pytest.mark.parametrize("out", [(), ((),), ((1, 0),), ((-1,),), ((2, 2),)])
def test_timetables_that_cannot_be_say_so(out: Any) -> None:
    with pytest.raises(ValueError, match="ascending numbers from 0"):
        Timetable(out=out)


def test_a_timetable_is_spread_over_another_number_of_steps() -> None:
    table = Timetable(out=((), (1,), (2, 5)))
    assert table.at(0.0, 4) == () and table.at(0.5, 4) == ((1, 2),) and table.at(1.0, 4) == ((2, 3),)
    assert table.at(1.0, 6) == ((2, 3), (5, 6))
