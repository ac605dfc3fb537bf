"""What the oracle predicts is what happens when the network's outputs do not depend on its input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.caching.network import NetworkReuse
from hasten.errors import RefusedError
from hasten.forecast import Forecast, Hold, LeaveOneOut, Polynomial
from hasten.pipelines.bench.oracle import Recording, as_rule, distance, record, response, search
from hasten.recipe import Recipe
from tests.contract import seeded
from tests.hosts import WAN_CALL, small_pixart, small_wan


def deaf_wan() -> Any:
    """A Wan that cannot see its latents: its output depends on the time and the prompt only."""
    pipe = small_wan()
    with torch.no_grad():
        pipe.transformer.patch_embedding.weight.zero_()
        pipe.transformer.patch_embedding.bias.zero_()
    return pipe


def generate(pipe: Any) -> Tensor:
    call = {**WAN_CALL, "num_inference_steps": 12, "output_type": "latent", "return_dict": False}
    return pipe("a seven", generator=torch.Generator().manual_seed(0), **call)[0]


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("forecast", [Hold(), Polynomial(order=1), Polynomial(order=2)], ids=["hold", "one", "two"])
def test_predicted_distance_is_the_real_one(forecast: Forecast, correct: int) -> None:
    pipe, computed = deaf_wan(), {0, 1, 4, 7, 11}
    with record(pipe.scheduler) as recordings:
        plain = generate(pipe)
    policy = NetworkReuse(rule=as_rule(computed, 12), forecast=forecast, correct=correct)
    with hasten.accelerate(pipe, Recipe(reuse=policy)) as run:
        found = generate(pipe)
    assert {e.step for e in run.trace.events if e.action == "compute"} == computed
    noise = seeded_noise(pipe)
    real = float((found - plain).norm() / (plain - noise).norm())
    assert distance(policy, recordings[0], computed) == pytest.approx(real, rel=1e-2)


def seeded_noise(pipe: Any) -> Tensor:
    """The latents before the first step."""
    seen: list[Tensor] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True)
    generate(pipe)
    handle.remove()
    return seen[0]


def recording(num: int = 12) -> Recording:
    times = [1 - i / num for i in range(num)]
    values = torch.stack([seeded(0, 6).double() + t * seeded(1, 6) + t**2 * seeded(2, 6) for t in times])
    return Recording(times, [-1 / num] * num, values @ values.T)


def test_computing_everything_is_exact_and_weights_are_kept() -> None:
    policy, made = NetworkReuse(rule=as_rule({0}, 12)), recording()
    assert distance(policy, made, set(range(12))) == 0.0
    total = response(policy, made.times, made.weights, {0, 5})
    assert float(total.sum()) == pytest.approx(sum(made.weights), rel=1e-6)
    assert {i for i, c in enumerate(total.tolist()) if c} == {0, 5}


def test_search_is_no_worse_than_an_even_spread() -> None:
    policy, made = NetworkReuse(rule=as_rule({0}, 12)), recording()
    best = search(policy, [made], 4)
    assert len(best) == 4 and 0 in best
    assert distance(policy, made, best) <= distance(policy, made, {0, 4, 7, 11})
    assert search(policy, [made], 4) == best


@pytest.mark.parametrize("total", [2, 5, 50, 200])
def test_schedule_survives_as_a_rule(total: int) -> None:
    computed = {0, *range(1, total, 3)}
    assert as_rule(computed, total).computed(total) == computed


@pytest.mark.parametrize("num", [1, 2])
def test_search_for_very_few_steps(num: int) -> None:
    assert len(search(NetworkReuse(rule=as_rule({0}, 12)), [recording()], num)) == num


@pytest.mark.parametrize("changes", [{"forecast": LeaveOneOut()}, {"of": "residual"}])
def test_policies_that_are_not_linear_are_refused(changes: dict[str, Any]) -> None:
    made = recording()
    with pytest.raises(RefusedError):
        response(NetworkReuse(rule=as_rule({0}, 12), **changes), made.times, made.weights, {0, 5})


def test_solver_that_is_not_first_order_is_refused_and_released() -> None:
    pipe = small_pixart()
    with pytest.raises(RefusedError, match="DPMSolver"), record(pipe.scheduler):
        pipe("a", height=32, width=32, num_inference_steps=3, use_resolution_binning=False, clean_caption=False)
    assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))
