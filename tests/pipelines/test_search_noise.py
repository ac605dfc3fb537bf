"""Searches on unmodified pipelines: candidates can be had again, the best is kept, and what was spent is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hasten
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.noise_search import rows_of, search_noise
from hasten.pipelines.solver import segment
from hasten.pipelines.verifiers import digits, sharpness, verifier_of
from hasten.recipe import Recipe
from hasten.samplers.noise_search import NearbyNoises, Paths, RandomNoises
from hasten.samplers.solver import Solver
from tests.gaussian import error
from tests.hosts import FLUX_CALL, PIXART_CALL, WAN_CALL, small_flux, small_pixart, small_wan

PIPES = {"wan": (small_wan, WAN_CALL), "pixart": (small_pixart, PIXART_CALL), "flux": (small_flux, FLUX_CALL)}


def brightness(frames: Any, prompt: str) -> float:
    assert frames.ndim == 4 and frames.dtype == np.float64 and prompt == "a seven"
    return float(frames.mean())


@pytest.mark.parametrize("which", PIPES)
def test_a_random_search_is_the_best_of_its_seeds(which: str) -> None:
    build, call = PIPES[which]
    pipe = build()
    found = search_noise(pipe, "a seven", brightness, how=RandomNoises(count=3), seed=4, batch=2, **call)
    alone = [
        rows_of(pipe("a seven", generator=torch.Generator().manual_seed(seed), output_type="np", **call))[0] for seed in (4, 5, 6)
    ]
    scores = [brightness(frames, "a seven") for frames in alone]
    assert [c.score for c in found.candidates] == pytest.approx(scores, abs=1e-5)
    assert [c.seed for c in found.candidates] == [4, 5, 6] and found.nfe == 3 * call["num_inference_steps"]
    best = int(np.argmax(scores))
    assert found.best == found.candidates[best] and np.allclose(found.frames, alone[best], atol=1e-5)


@pytest.mark.parametrize("which", PIPES)
def test_zero_order_starts_at_the_seed_and_never_gets_worse(which: str) -> None:
    build, call = PIPES[which]
    pipe = build()
    policy = NearbyNoises(neighbours=2, rounds=2, radius=0.3)
    found = search_noise(pipe, "a seven", brightness, how=policy, seed=4, **call)
    first = rows_of(pipe("a seven", generator=torch.Generator().manual_seed(4), output_type="np", **call))[0]
    assert found.candidates[0].score == pytest.approx(brightness(first, "a seven"), abs=1e-6)
    assert found.best.score == max(c.score for c in found.candidates) >= found.candidates[0].score
    assert len(found.candidates) == 5 and found.nfe == policy.evaluations(call["num_inference_steps"])
    assert all(c.parent is not None for c in found.candidates[1:])


def test_a_small_radius_stays_near() -> None:
    pipe = small_pixart()
    scores = {}
    for radius in (0.01, 1.0):
        policy = NearbyNoises(neighbours=3, rounds=1, radius=radius)
        found = search_noise(pipe, "a seven", brightness, how=policy, **PIXART_CALL)
        scores[radius] = max(abs(c.score - found.candidates[0].score) for c in found.candidates)
    assert scores[0.01] < 0.1 * scores[1.0]


@pytest.mark.parametrize("which", PIPES)
def test_paths_are_branched_looked_at_and_finished(which: str) -> None:
    build, call = PIPES[which]
    pipe = build()
    plain = pipe("a seven", generator=torch.Generator().manual_seed(0), output_type="latent", **call)[0]
    policy = Paths(paths=2, branches=2, begin=0.3, back=1, ahead=2)
    runs = [search_noise(pipe, "a seven", brightness, how=policy, batch=3, **call) for _ in range(2)]
    found = runs[0]
    assert found.nfe == policy.evaluations(6)
    looked = [c for c in found.candidates if c.level < 1]
    ended = [c for c in found.candidates if c.level == 1]
    assert len(looked) == 4 * len(policy.looks(6)) and len(ended) == 2 and found.best in ended
    assert np.array_equal(found.frames, runs[1].frames), "the same search again is the same"
    again = pipe("a seven", generator=torch.Generator().manual_seed(0), output_type="latent", **call)[0]
    assert torch.equal(again, plain), "the pipeline is as it was"


def test_what_goes_on_is_what_scored_best() -> None:
    seen: list[float] = []

    def watching(frames: Any, prompt: str) -> float:
        seen.append(float(frames.mean()))
        return seen[-1]

    found = search_noise(small_pixart(), "a seven", watching, how=Paths(paths=1, branches=4, ahead=2), **PIXART_CALL)
    last = [c for c in found.candidates if c.level < 1][-4:]
    assert found.best.parent == max(last, key=lambda c: c.score).number


@pytest.mark.parametrize("flow", [True, False])
def test_segments_are_the_whole_walk(flow: bool) -> None:
    """Walking from level to level in parts ends at the exact end, too, and every part is what it says."""
    host = (small_wan() if flow else small_pixart()).scheduler
    parts = [segment(host, 12, *ends) for ends in ((0, 5), (5, 12))]
    for made, n in zip(parts, (5, 7), strict=True):
        made.set_timesteps(30)
        assert len(made.timesteps) == n
    assert float(parts[0].sigmas[-1]) == pytest.approx(float(parts[1].sigmas[0])) and parts[1].sigmas[-1] == 0
    look = segment(host, 12, 5, 12, straight=True)
    look.set_timesteps(30)
    assert look.sigmas.tolist() == [float(parts[1].sigmas[0]), 0.0]
    assert error(parts[1]) < 0.5 * error(look)


def test_a_session_acts_on_the_search() -> None:
    pipe = small_wan()
    with hasten.accelerate(pipe, Recipe(name="half", sampler=Solver(name="unipc", steps=0.5))):
        found = search_noise(pipe, "a seven", brightness, how=RandomNoises(count=2), **WAN_CALL)
    assert found.nfe == 6


def test_mistakes_are_said() -> None:
    pipe = small_pixart()
    with pytest.raises(UsageError, match="no search 'rando'.*random"):
        search_noise(pipe, "a seven", brightness, how="rando", **PIXART_CALL)
    with pytest.raises(UsageError, match="no verifier 'digit'.*'digits'"):
        search_noise(pipe, "a seven", "digit", **PIXART_CALL)
    with pytest.raises(UsageError, match="at least 6 evaluations, got a budget of 5"):
        search_noise(pipe, "a seven", brightness, budget=5, **PIXART_CALL)
    with pytest.raises(UsageError, match="48 evaluations, above the budget of 40"):
        search_noise(pipe, "a seven", brightness, how=RandomNoises(count=8), budget=40, **PIXART_CALL)
    with pytest.raises(UsageError, match="gave nan for seed 0"):
        search_noise(pipe, "a seven", lambda frames, prompt: float("nan"), budget=6, **PIXART_CALL)
    with pytest.raises(UsageError, match="num_inference_steps, at least 1, got 0"):
        search_noise(pipe, "a seven", brightness, num_inference_steps=0)

    class Bare(type(pipe)):  # type: ignore[misc]
        def __call__(self, prompt: Any, num_inference_steps: int = 6, generator: Any = None, output_type: str = "np") -> Any:
            return super().__call__(prompt, generator=generator, output_type=output_type, **PIXART_CALL)

    pipe.__class__ = Bare
    with pytest.raises(RefusedError, match="takes no latents"):
        search_noise(pipe, "a seven", brightness, how=NearbyNoises())


def test_verifiers_see_what_they_say() -> None:
    g = np.random.default_rng(0)
    flat, rough = np.full((1, 16, 16, 3), 0.5), g.random((1, 16, 16, 3))
    assert sharpness(flat, "") < sharpness(rough, "") and digits(flat, "a seven") < 0
    clip = np.repeat(rough, 5, axis=0)
    assert digits(clip, "a seven") >= max(digits(clip, f"a seven moving {way}") for way in ("left", "right"))
    assert min(digits(clip, f"a seven moving left, {speed}") for speed in ("slowly", "quickly")) < digits(clip, "a seven moving left")
    assert verifier_of(sharpness) is sharpness
    with pytest.raises(UsageError, match="names no digit"):
        digits(flat, "a cat")
