"""Loops with real solvers: nothing skipped is nothing changed, and what is skipped is in the report."""

from __future__ import annotations

import pytest
import torch

from hasten.pipelines.recipes import recipe as find
from tests.conformance.loop import ALTERNATE_BLOCKS, Loop, accelerated, assert_same, plain

WATCHED = {
    "network": find("easycache").replace({"reuse.rule.limit": 0.0}),
    "blocks": find("first-block-cache").replace({"reuse.rule.limit": 0.0}),
}


@pytest.mark.parametrize("which", WATCHED)
def test_never_skipping_is_bit_identical(name: str, which: str) -> None:
    found, expected = accelerated(name, WATCHED[which], Loop()), plain(name, Loop())
    assert found.stood_in == 0
    assert_same(found, expected, tolerance=0)


@pytest.mark.parametrize("recipe", ["balanced", "easycache", "first-block-cache"])
def test_presets_run_and_say_what_they_did(name: str, recipe: str) -> None:
    loop = Loop(steps=10)
    found = accelerated(name, find(recipe), loop)
    assert found.latents is not None and torch.isfinite(found.latents).all()
    assert found.session is not None
    report = found.session.report()
    assert report.computed_fraction < 1 or "skipped nothing" in str(report), (
        "a method that did nothing says so"
    )
    if found.stood_in == 0:
        assert_same(found, plain(name, loop), tolerance=0)


def test_first_block_sees_the_latents(name: str) -> None:
    """The signal of block caching must move when the latents move; a text block in front would never."""
    found = accelerated(name, WATCHED["blocks"], Loop(branches=lambda step: (1,)))
    assert found.session is not None
    signals = [event.signal for event in found.session.trace.events if event.signal is not None]
    assert signals and all(signal > 0 for signal in signals), signals


def test_heun(name: str) -> None:
    """Two evaluations per step: still latents are lossless, and a real loop stays finite with every other one skipped."""
    still = Loop(still=True, heun=True, steps=3)
    found = accelerated(name, ALTERNATE_BLOCKS, still)
    assert {step for step, _ in found.outputs} == set(range(5))
    assert found.actions(1) & {"reuse"} and found.actions(3) & {"reuse"}
    assert_same(found, plain(name, still))
    moving = accelerated(name, ALTERNATE_BLOCKS, Loop(heun=True, steps=3))
    assert moving.latents is not None and torch.isfinite(moving.latents).all()
