"""Sparse attention together with everything else that is put onto a network: sessions, gates, adapters, offloading."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor

import hasten
from hasten.caching.deep import DeepReuse
from hasten.caching.modules import ModuleReuse
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every
from hasten.caching.stack import StackReuse
from hasten.errors import UsageError
from hasten.forecast import Hold
from hasten.recipe import Recipe
from tests.conformance.loop import Loop, Result, assert_same, solver, turn
from tests.conformance.small import every
from tests.conformance.test_adapters import STAGES, group_offload
from tests.hosts import UNET_CALL, WAN_CALL, small_unet, small_wan
from tests.pipelines.attention_recipes import FULL, PART
from tests.pipelines.seam_contract import state_of

pytestmark = pytest.mark.filterwarnings("ignore:hasten")
RULE = Every(interval=2)
REUSE = {
    "network": Recipe(name="network", reuse=NetworkReuse(rule=RULE, forecast=Hold())),
    "blocks": Recipe(name="blocks", reuse=StackReuse(lead=1, rule=RULE, forecast=Hold())),
    "modules": Recipe(name="modules", reuse=ModuleReuse(feed_forward=RULE)),
}


def generate(pipe: Any, call: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a seven", generator=generator, output_type="latent", return_dict=False, **call)[0]


VIDEO = {**WAN_CALL, "num_inference_steps": 4}


@pytest.mark.parametrize("name", REUSE)
def test_one_recipe_and_sessions_in_both_orders_agree(name: str) -> None:
    """What is proved lossless is proved on the keys that were read, whoever is inside whom."""
    pipe = small_wan(layers=2)
    plain, before = generate(pipe, VIDEO), state_of(pipe.transformer)
    with hasten.accelerate(pipe, REUSE[name] | PART) as session:
        expected = generate(pipe, VIDEO)
        assert not any("refused" in note or "failed" in note for note in session.trace.notes)
    assert not torch.equal(expected, plain)
    for first, second in itertools.permutations([REUSE[name], PART]):
        with hasten.accelerate(pipe, first) as inner, hasten.accelerate(pipe, second) as outer:
            found = generate(pipe, VIDEO)
        notes = [*inner.trace.notes, *outer.trace.notes]
        assert not any("refused" in note or "failed" in note for note in notes)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert any(event.action == "reuse" for session in (inner, outer) for event in session.trace.events)
    assert state_of(pipe.transformer) == before and torch.equal(generate(pipe, VIDEO), plain)


def test_two_of_its_kind_are_refused() -> None:
    pipe = small_wan(layers=2)
    before = state_of(pipe.transformer)
    with hasten.accelerate(pipe, PART), pytest.raises(UsageError, match="already makes"):
        hasten.accelerate(pipe, FULL)
    assert state_of(pipe.transformer) == before


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_sessions_close_in_any_order(order: tuple[int, ...]) -> None:
    pipe = small_wan(layers=2)
    plain, before = generate(pipe, VIDEO), state_of(pipe.transformer)
    sessions = [hasten.accelerate(pipe, each) for each in (REUSE["network"], PART, REUSE["blocks"])]
    for number in order:
        generate(pipe, VIDEO)
        sessions[number].close()
    assert state_of(pipe.transformer) == before and torch.equal(generate(pipe, VIDEO), plain)


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
    plain = generate(pipe, VIDEO)
    with hasten.accelerate(pipe, PART) as session:
        found = generate(pipe, VIDEO)
    assert torch.equal(found, plain) and bool(torch.isfinite(found).all())
    assert any("FBCHeadBlockHook" in note for note in session.trace.notes)
    pipe.transformer.disable_cache()
    with hasten.accelerate(pipe, PART) as session:
        generate(pipe, VIDEO)
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
