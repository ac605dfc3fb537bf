"""Several sessions on one host: they compose or are refused with the reason, and close in any order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import AmusedScheduler
from torch import Tensor

import hasten
from hasten.caching.deep import DeepReuse
from hasten.caching.modules import ModuleReuse
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every
from hasten.pipelines.recipes import recipe
from hasten.pipelines.session import Session
from hasten.recipe import Recipe
from tests.hosts import UNET_CALL, small_unet, small_wan
from tests.pipelines.seam_contract import state_of
from tests.pipelines.test_context_seam import MASK, conditions, masked, recap, uvit
from tests.pipelines.test_shared import generate as generate_video

RULE = Every(interval=2)
DEEP = Recipe(name="deep", reuse=DeepReuse(branch=0, rule=RULE))
MODULES = Recipe(name="modules", reuse=ModuleReuse(self_attention=Every(interval=3)))
NETWORK = Recipe(name="network", reuse=NetworkReuse(rule=Every(interval=4)))
GUIDANCE = recipe("guidance-interval")
pytestmark = pytest.mark.filterwarnings("ignore:hasten")


def generate(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a seven", generator=generator, output_type="latent", return_dict=False, **UNET_CALL)[0]


def stood_in(session: Session) -> set[tuple[str, int]]:
    return {(e.site, e.step) for e in session.trace.events if e.action in ("reuse", "skip") or e.share < 1}


PAIRS = list(itertools.permutations([DEEP, GUIDANCE, MODULES, NETWORK], 2))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name}+{pair[1].name}")
def test_two_methods_in_sessions_of_their_own(pair: tuple[Recipe, Recipe]) -> None:
    """Each skips something; afterwards nothing is left of them."""
    pipe = small_unet()
    plain, before = generate(pipe), state_of(pipe.unet)
    with hasten.accelerate(pipe, pair[0]) as inner, hasten.accelerate(pipe, pair[1]) as outer:
        found = generate(pipe)
        assert torch.equal(generate(pipe), found), "the second run must be like the first"
    assert bool(torch.isfinite(found).all()) and not torch.equal(found, plain)
    assert stood_in(outer) and (stood_in(inner) or pair[1] is NETWORK), "what answers for all of it may leave nothing to skip"
    assert not any("refused" in note for note in (*inner.trace.notes, *outer.trace.notes))
    assert state_of(pipe.unet) == before and torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
@pytest.mark.parametrize("opened", [(DEEP, GUIDANCE, MODULES), (MODULES, DEEP, NETWORK)], ids=["guidance", "network"])
def test_sessions_close_in_any_order(opened: tuple[Recipe, ...], order: tuple[int, ...]) -> None:
    """What is still open works on; the last one to close leaves the very objects that were there."""
    pipe = small_unet()
    before, scheduler = state_of(pipe.unet), set(vars(pipe.scheduler))
    sessions = [hasten.accelerate(pipe, each) for each in opened]
    for number in order:
        generate(pipe)
        runs = [len(session.trace.runs) for session in sessions]
        sessions[number].close()
    assert all(runs[number] == 1 + order.index(number) for number in range(3)), "a closed session sees no run"
    assert state_of(pipe.unet) == before and set(vars(pipe.scheduler)) - {"num_inference_steps"} == scheduler - {
        "num_inference_steps"
    }


def test_two_sessions_that_cut_one_unet() -> None:
    pipe = small_unet()
    before = state_of(pipe.unet)
    other = Recipe(reuse=DeepReuse(branch=0, rule=Every(interval=3)))
    with hasten.accelerate(pipe, DEEP) as first, hasten.accelerate(pipe, other) as second:
        found = generate(pipe)
    assert any("another open session leaves out its deep part" in note for note in second.trace.notes)
    assert stood_in(first) and bool(torch.isfinite(found).all()) and state_of(pipe.unet) == before


def test_two_sessions_that_leave_out_tokens() -> None:
    model = uvit()
    before, call = state_of(model), {"input_ids": masked(0.5), **conditions()}
    with torch.no_grad():
        plain = model(**call)
        one, two = AmusedScheduler(mask_token_id=MASK), AmusedScheduler(mask_token_id=MASK)
        first = hasten.accelerate(model, recap(), scheduler=one)
        second = hasten.accelerate(model, recap(), scheduler=two)
        assert any("another open session gates its layers" in note for note in second.trace.notes)
        assert torch.equal(model(**call), plain)
        first.close()
        assert torch.equal(model(**call), plain)
        second.close()
        third = hasten.accelerate(model, recap(), scheduler=one)
        assert not third.trace.notes, "what was open is closed"
        third.close()
    assert state_of(model) == before


def test_a_closed_session_does_not_follow_a_new_scheduler() -> None:
    """The outer gate still calls the inner one, which is closed by then."""
    pipe = small_wan()
    inner, outer = hasten.accelerate(pipe, NETWORK), hasten.accelerate(pipe, "plain")
    inner.close()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    generate_video(pipe)
    outer.close()
    assert not inner.trace.runs and not {"step", "set_timesteps"} & set(vars(pipe.scheduler))


def test_evaluations_of_ones_own_are_not_seen_by_a_session_inside() -> None:
    """The look at the structure and the proof are no calls of the host's."""
    pipe = small_wan()
    with hasten.accelerate(pipe, "plain") as inner, hasten.accelerate(pipe, "first-block-cache"):
        generate_video(pipe)
    first = [event for event in inner.trace.events if event.step == 0]
    assert len(first) == 2, "two branches, each called once by the host"
