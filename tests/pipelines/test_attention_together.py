"""Sparse attention together with everything else that is put onto a network: sessions, gates, adapters, offloading."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanPipeline

import hasten
from hasten.caching.deep import DeepReuse
from hasten.caching.modules import ModuleReuse
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every
from hasten.caching.stack import StackReuse
from hasten.errors import UsageError
from hasten.forecast import Hold
from hasten.limits import Limits
from hasten.recipe import Recipe
from tests.conformance.loop import Loop, Result, assert_same, solver, turn
from tests.conformance.small import every
from tests.conformance.test_adapters import STAGES, group_offload
from tests.hosts import UNET_CALL, small_unet, small_wan
from tests.pipelines.attention_recipes import FULL, PART
from tests.pipelines.attention_runs import generate, off
from tests.pipelines.seam_contract import state_of

pytestmark = pytest.mark.filterwarnings("ignore:hasten")
RULE = Every(interval=2)
REUSE = {
    "network": Recipe(name="network", reuse=NetworkReuse(rule=RULE, forecast=Hold())),
    "blocks": Recipe(name="blocks", reuse=StackReuse(lead=1, rule=RULE, forecast=Hold())),
    "modules": Recipe(name="modules", reuse=ModuleReuse(feed_forward=RULE)),
}


@pytest.fixture(scope="module")
def wan() -> WanPipeline:
    return small_wan(layers=2)


@pytest.mark.parametrize(
    "reuse",
    [
        NetworkReuse(rule=Every(interval=2), forecast=Hold()),
        StackReuse(lead=1, rule=Every(interval=2), forecast=Hold()),
    ],
    ids=["network", "blocks"],
)
def test_with_reuse(wan: WanPipeline, reuse: Any) -> None:
    """Reuse acts as it does alone, and what it computes is sparse."""
    with hasten.accelerate(wan, Recipe(name="alone", reuse=reuse)) as alone:
        expected = generate(wan)
    with hasten.accelerate(wan, Recipe(name="both", reuse=reuse, attention=FULL.attention)) as both:
        found = generate(wan)
    assert off(found, expected) < 1e-4
    assert [(e.step, e.site, e.action) for e in both.trace.events] == [(e.step, e.site, e.action) for e in alone.trace.events]
    assert not any("refused" in note for note in both.trace.notes)
    calls = sorted((call.step, call.layer, call.branch) for call in both.trace.attention)
    left = {(1, 0), (3, 0)} if isinstance(reuse, StackReuse) else set()
    expected_calls = {(0, 0), (0, 1), (2, 0), (2, 1)} | left
    assert calls == sorted((*place, branch) for place in expected_calls for branch in (0, 1)), "proofs are not counted"


def test_blocks_are_proved_on_sparse_attention(wan: WanPipeline) -> None:
    """What is proved to be lossless is compared with an evaluation that reads the same keys."""
    reuse = StackReuse(lead=1, rule=Every(interval=2), forecast=Hold())
    with hasten.accelerate(wan, Recipe(name="both", reuse=reuse, attention=PART.attention)) as session:
        generate(wan)
        one = generate(wan, num_inference_steps=1)
    assert not any("refused" in note for note in session.trace.notes)
    assert any(event.action == "reuse" for event in session.trace.events)
    with hasten.accelerate(wan, Recipe(name="first", reuse=reuse, attention=PART.attention)):
        first = generate(wan, num_inference_steps=1)
    with hasten.accelerate(wan, PART):
        alone = generate(wan, num_inference_steps=1)
    assert off(one, alone) < 1e-5 and off(first, alone) < 1e-5, "what was shown NaN to learn the blocks has selected nothing"


def test_with_guidance_left_out(wan: WanPipeline) -> None:
    recipe = hasten.recipe("guidance-interval") | PART
    with hasten.accelerate(wan, recipe) as session:
        assert bool(torch.isfinite(generate(wan)).all())
    assert any(event.action == "skip" for event in session.trace.events) and session.trace.attention


def test_a_cap_on_bytes_ends_it_for_the_run(wan: WanPipeline) -> None:
    with hasten.accelerate(wan, PART, limits=Limits(max_cache_bytes=10)) as session:
        generate(wan)
    assert len(session.trace.attention) == 2 and "above the cap" in " ".join(session.trace.notes)


@pytest.mark.parametrize("name", REUSE)
def test_one_recipe_and_sessions_in_both_orders_agree(name: str) -> None:
    """What is proved lossless is proved on the keys that were read, whoever is inside whom."""
    pipe = small_wan(layers=2)
    plain, before = generate(pipe), state_of(pipe.transformer)
    with hasten.accelerate(pipe, REUSE[name] | PART) as session:
        expected = generate(pipe)
        assert not any("refused" in note or "failed" in note for note in session.trace.notes)
    assert not torch.equal(expected, plain)
    for first, second in itertools.permutations([REUSE[name], PART]):
        with hasten.accelerate(pipe, first) as inner, hasten.accelerate(pipe, second) as outer:
            found = generate(pipe)
        notes = [*inner.trace.notes, *outer.trace.notes]
        assert not any("refused" in note or "failed" in note for note in notes)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert any(event.action == "reuse" for session in (inner, outer) for event in session.trace.events)
    assert state_of(pipe.transformer) == before and torch.equal(generate(pipe), plain)


def test_two_of_its_kind_are_refused() -> None:
    pipe = small_wan(layers=2)
    before = state_of(pipe.transformer)
    with hasten.accelerate(pipe, PART), pytest.raises(UsageError, match="already makes"):
        hasten.accelerate(pipe, FULL)
    assert state_of(pipe.transformer) == before


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_sessions_close_in_any_order(order: tuple[int, ...]) -> None:
    pipe = small_wan(layers=2)
    plain, before = generate(pipe), state_of(pipe.transformer)
    sessions = [hasten.accelerate(pipe, each) for each in (REUSE["network"], PART, REUSE["blocks"])]
    for number in order:
        generate(pipe)
        sessions[number].close()
    assert state_of(pipe.transformer) == before and torch.equal(generate(pipe), plain)


def test_unet_with_deep_features_kept() -> None:
    pipe = small_unet()
    plain, before = generate(pipe, UNET_CALL), state_of(pipe.unet)
    deep = Recipe(name="deep", reuse=DeepReuse(branch=0, rule=RULE))
    with hasten.accelerate(pipe, deep) as alone:
        expected = generate(pipe, UNET_CALL)
    with hasten.accelerate(pipe, Recipe(reuse=deep.reuse, attention=FULL.attention)) as both:
        found = generate(pipe, UNET_CALL)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert [(e.step, e.action) for e in both.trace.events] == [(e.step, e.action) for e in alone.trace.events]
    assert any(call.sparse for call in both.trace.attention)
    assert state_of(pipe.unet) == before and torch.equal(generate(pipe, UNET_CALL), plain)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_lora_loaded_swapped_and_unloaded(name: str) -> None:
    small, loop = every()[name], Loop(still=True, steps=2)
    bare, model, scheduler = small.made(), small.made(), solver(every()[name])
    expected: list[Result] = []
    for change in STAGES:
        change(bare)
        expected.append(turn(small, bare, loop, solver(small)))
    with hasten.accelerate(model, FULL, scheduler=scheduler) as session:
        for change, want in zip(STAGES, expected, strict=True):
            change(model)
            assert_same(turn(small, model, loop, scheduler), want, 2e-5)
    assert all(any(call.sparse for call in session.trace.attended(run)) for run in range(len(STAGES)))
    assert_same(turn(small, model, loop, scheduler), expected[-1], tolerance=0)


def test_offloaded_weights() -> None:
    small, loop = every()["WanTransformer3DModel"], Loop(steps=2)
    model, scheduler = small.made(), solver(every()["WanTransformer3DModel"])
    expected = turn(small, model, loop, solver(small))
    group_offload(model)
    with hasten.accelerate(model, FULL, scheduler=scheduler) as session:
        assert_same(turn(small, model, loop, scheduler), expected, 2e-5)
    assert any(call.sparse for call in session.trace.attention)
    assert_same(turn(small, model, loop, scheduler), expected, tolerance=0)


def test_diffusers_own_caches_are_not_shown_marked_latents() -> None:
    """They would keep the NaN and answer with it."""
    pipe = small_wan(layers=2)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    plain = generate(pipe)
    with hasten.accelerate(pipe, PART) as session:
        found = generate(pipe)
    assert torch.equal(found, plain) and bool(torch.isfinite(found).all())
    assert any("FBCHeadBlockHook" in note for note in session.trace.notes)
    pipe.transformer.disable_cache()
    with hasten.accelerate(pipe, PART) as session:
        generate(pipe)
    assert session.trace.attention


def test_projections_fused_inside_a_session() -> None:
    small, loop = every()["WanTransformer3DModel"], Loop(still=True, steps=2)
    model, scheduler = small.made(), solver(every()["WanTransformer3DModel"])
    expected = turn(small, model, loop, solver(small))
    with hasten.accelerate(model, FULL, scheduler=scheduler) as session:
        turn(small, model, loop, scheduler)
        model.fuse_qkv_projections()
        assert_same(turn(small, model, loop, scheduler), expected, 2e-5)
        model.unfuse_qkv_projections()
        assert_same(turn(small, model, loop, scheduler), expected, 2e-5)
    assert all(any(call.sparse for call in session.trace.attended(run)) for run in range(3))
