"""The whole-network recipes on real pipelines: they skip, they stay near, and they say what they did."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every, Listed
from hasten.caching.rules_phases import Phases
from hasten.drift import Drift
from hasten.level import Level
from hasten.pipelines.recipes import catalogue, network
from hasten.recipe import Recipe, from_yaml
from hasten.step import Step
from tests.contract import seeded, steps
from tests.hosts import (
    FLUX_CALL,
    PIXART_CALL,
    UNET_CALL,
    WAN_CALL,
    small_flux,
    small_pixart,
    small_unet,
    small_wan,
)

HOSTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "wan": (small_wan, WAN_CALL),
    "pixart": (small_pixart, PIXART_CALL),
    "flux": (small_flux, {**FLUX_CALL, "true_cfg_scale": 3.0, "negative_prompt": "blurry"}),
    "unet": (small_unet, UNET_CALL),
}
RECIPES = {entry.name: entry.recipe for entry in catalogue() if entry.name.replace("-", "_") in vars(network)}


def generate(pipe: Any, call: dict[str, Any]) -> Tensor:
    found = pipe("a seven", generator=torch.Generator().manual_seed(0), output_type="latent", return_dict=False, **call)
    return found[0] if isinstance(found[0], Tensor) else found[0][0]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", RECIPES)
def test_it_skips_on_every_host_and_leaves_no_trace(name: str, host: str) -> None:
    make, call = HOSTS[host]
    pipe, call = make(), {**call, "num_inference_steps": 16}
    plain = generate(pipe, call)
    recipe = RECIPES[name]
    with hasten.accelerate(pipe, recipe) as run:
        found = generate(pipe, call)
    assert 0.2 < run.report().computed_fraction < 0.95
    assert bool(torch.isfinite(found).all())
    assert torch.equal(generate(pipe, call), plain), "closing restores the host"


@pytest.mark.parametrize("name", RECIPES)
def test_it_survives_yaml(name: str) -> None:
    assert from_yaml(RECIPES[name].to_yaml()) == RECIPES[name]


def test_seacache_keeps_both_ends_and_never_skips_three_in_a_row() -> None:
    pipe, call = small_wan(), {**WAN_CALL, "num_inference_steps": 24}
    with hasten.accelerate(pipe, network.seacache(limit=100.0)) as run:
        generate(pipe, call)
    computed = sorted({event.step for event in run.trace.events if event.action == "compute"})
    assert computed[0] == 0 and computed[-1] == 23
    gaps = {b - a for a, b in itertools.pairwise(computed)}
    assert gaps <= {1, 2, 3} and 3 in gaps


def test_seacache_computes_less_with_a_larger_limit() -> None:
    pipe, call = small_wan(), {**WAN_CALL, "num_inference_steps": 16}
    plain, shares, off = generate(pipe, call), [], 0.0
    for limit in (0.1, 0.3, 5.0):
        with hasten.accelerate(pipe, network.seacache(limit=limit)) as run:
            off = max(off, float((generate(pipe, call) - plain).norm() / plain.norm()))
        shares.append(run.report().computed_fraction)
    assert shares[0] > shares[1] > shares[2] and off < 0.1


@pytest.mark.parametrize(("second", "stable"), [(1.0, True), (-0.35, False)])
def test_sada_skips_a_path_that_straightens_and_then_keeps_its_pattern(second: float, stable: bool) -> None:
    """Velocity angle + second * angle^2 along one direction: its slope 1 + 2 second * angle shrinks or grows."""
    policy = network.sada(switch=0.5, interval=5, warmup=0.2, max_skips=3).reuse
    assert isinstance(policy, NetworkReuse)
    state, x, skipped = policy.start(), seeded(1, 1, 16), []
    for i in range(30):
        angle, after = 1.3 - i / 30, 1.3 - (i + 1) / 30
        level = Level(math.cos(angle), math.sin(angle), (math.cos(angle), -math.sin(angle)))
        step = Step(i, 30, angle * 2 / math.pi, 0, None, level)
        v = seeded(0, 1, 16) * (angle + second * angle**2)
        answer = state.answer(step, x) if state.decide(step, x) else None
        skipped.append(answer is not None)
        x = x + (after - angle) * (state.observe(step, x, [v])[0] if answer is None else answer[0])
    assert not any(skipped[:6])
    assert skipped[6:15] == ([True, True, True, False] * 3)[:9] if stable else not any(skipped[6:15])
    assert skipped[15:] == [i not in Every(interval=5).computed(30) for i in range(15, 30)]


def test_phases_change_hands_at_the_switch() -> None:
    rule = Phases(early=Drift(limit=0.0, accumulate=False), late=Every(interval=4), switch=0.5)
    state = rule.start()
    skipped = [state.skip(step, 0.5) for step in steps(20)]
    assert not any(skipped[:10])
    assert skipped[10:] == [i not in Every(interval=4).computed(20) for i in range(10, 20)] and skipped[10]
    always = Phases(early=Listed(at=(0.0,)), late=Every(interval=1), switch=1.0).start()
    assert [always.skip(step, 0.5) for step in steps(4)] == [False, True, True, True]
    assert Phases(early=Drift(limit=0.3)).threshold_value == 0.3


def test_a_solver_that_says_nothing_about_the_data_is_told_to_the_user() -> None:
    pipe = small_wan()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    recipe = Recipe(name="trial", reuse=network.sada().reuse)
    with hasten.accelerate(pipe, recipe) as run:
        run.clock.on_run.insert(0, lambda: run.clock.levels.__setitem__(slice(None), [None] * len(run.clock.levels)))
        with pytest.warns(UserWarning, match="clean data|about the data"):
            generate(pipe, WAN_CALL)
    assert run.report().computed_fraction == 1.0
