"""Skipping on identical input loses nothing, on any class, with guidance and with everything that can be injected."""

from __future__ import annotations

import pytest

import hasten
from hasten.recipe import Recipe
from tests.conformance.loop import (
    ALTERNATE_BLOCKS,
    NAMES,
    ONCE,
    ONCE_BLOCKS,
    STEPS,
    Loop,
    Result,
    accelerated,
    assert_same,
    plain,
    solver,
    turn,
)
from tests.conformance.models.a_h_flux import FLUX_WITH_ADAPTER
from tests.conformance.small import every

INJECTED = [(name, kind) for name in NAMES for kind in every()[name].injections]


def assert_all_skipped(found: Result) -> None:
    """Only the first step was computed; block by block, or the whole network and the report says why."""
    assert found.session is not None
    events = [event for event in found.session.trace.events if event.step > 0]
    for step in range(1, STEPS):
        assert "reuse" in found.actions(step), found.session.trace.notes
    in_blocks = any(event.action == "reuse" and event.blocks is not None for event in events)
    assert in_blocks != bool(found.refusal), "blocks are skipped, or the report says why not"


def test_blocks(name: str) -> None:
    found = accelerated(name, ONCE_BLOCKS, Loop(still=True))
    assert_all_skipped(found)
    assert_same(found, plain(name, Loop(still=True)))


def test_whole_network(name: str) -> None:
    found = accelerated(name, ONCE, Loop(still=True))
    assert found.stood_in == 2 * (STEPS - 1)
    assert_same(found, plain(name, Loop(still=True)))


@pytest.mark.parametrize("recipe", [ONCE, ONCE_BLOCKS], ids=["network", "blocks"])
@pytest.mark.parametrize(("name", "kind"), INJECTED)
def test_with_injections(name: str, kind: str, recipe: Recipe) -> None:
    loop = Loop(still=True, injection=every()[name].injections[kind])
    found = accelerated(name, recipe, loop)
    assert_all_skipped(found) if recipe is ONCE_BLOCKS else None
    assert_same(found, plain(name, loop))


@pytest.mark.parametrize(("name", "kind"), INJECTED)
def test_injections_that_begin_later(name: str, kind: str) -> None:
    """A ControlNet may be switched on in the middle: what was learned without it must not be used wrongly."""
    injection = every()[name].injections[kind]

    class Later(Loop):
        def conditions(self, small, step, seed):  # type: ignore[no-untyped-def]
            return {
                **super().conditions(small, step, seed),
                **(injection(100 + seed, 0) if step >= 2 else {}),
            }

    found, expected = (
        accelerated(name, ALTERNATE_BLOCKS, Later(still=True, steps=6)),
        plain(name, Later(still=True, steps=6)),
    )
    computed = [key for key in expected.outputs if key[0] in (0, 2, 4)]
    skipped = [(5, 1), (5, 2)]
    for key in [*computed, *skipped]:
        assert_same(
            Result({key: found.outputs[key]}, session=found.session), Result({key: expected.outputs[key]})
        )


def test_adapter_for_image_prompts() -> None:
    """IP-Adapter: the joint blocks also attend to an image."""
    model = FLUX_WITH_ADAPTER.made()
    loop, scheduler = Loop(still=True), solver(FLUX_WITH_ADAPTER)
    expected = turn(FLUX_WITH_ADAPTER, model, loop, scheduler)
    with hasten.accelerate(model, ONCE_BLOCKS, scheduler=scheduler) as session:
        found = turn(FLUX_WITH_ADAPTER, model, loop, scheduler)
    found.session = session
    assert_all_skipped(found)
    assert not found.refusal
    assert_same(found, expected)
