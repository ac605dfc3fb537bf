"""What two runs have in common is evaluated once, and nothing is ever answered wrongly."""

from __future__ import annotations

import math

import pytest
import torch

from hasten.pipelines.bench.candidates import ours
from hasten.pipelines.bench.shots import Sample, shoot
from hasten.pipelines.tune.few import start
from hasten.pipelines.tune.fitted import Fitting
from hasten.pipelines.tune.prefix import Prefix
from hasten.pipelines.tune.trials import Bench
from hasten.samplers.guidance import ListedGuidance
from tests.hosts import PIXART_CALL, UNET_CALL, WAN_CALL, small_pixart, small_unet, small_wan

LEVELS = [1.0, 0.8, 0.6, 0.4, 0.2]
SEVEN = Sample("a seven", 0)


def latents(pipe, call, few, prefix=None, keep=True):  # type: ignore[no-untyped-def]
    if prefix is None:
        return shoot(pipe, SEVEN, call, ours("x", few.recipe), decoded=False).latents
    with prefix.beside(pipe, 0, keep):
        return shoot(pipe, SEVEN, call, ours("x", few.recipe), decoded=False).latents


@pytest.mark.parametrize(
    ("make", "call", "name"), [(small_unet, UNET_CALL, "ddim"), (small_wan, WAN_CALL, "euler"), (small_pixart, PIXART_CALL, "ddim")],
    ids=["unet", "wan", "pixart"],
)  # fmt: skip
@pytest.mark.parametrize("guidance", [None, ListedGuidance(at=(0.0, 0.5), order=0)], ids=["both", "listed"])
def test_a_run_beside_a_kept_one_is_the_run_itself(make, call, name, guidance) -> None:  # type: ignore[no-untyped-def]
    pipe, few, prefix = make(), start(LEVELS, 4, name, guidance), Prefix()
    assert torch.equal(latents(pipe, call, few, prefix), latents(pipe, call, few)) and prefix.saved == 0
    for number in range(few.size):
        changed = few.moved([0.01 if k == number else 0.0 for k in range(few.size)])
        assert changed is not None
        assert torch.equal(latents(pipe, call, changed, prefix, keep=False), latents(pipe, call, changed))
    assert prefix.saved >= few.size, "each shares at least its first evaluation"
    assert "forward" not in vars(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)


def test_another_prompt_and_another_guidance_are_never_taken_for_the_same() -> None:
    """The latents are the same at the first step, and the text is not."""
    pipe, prefix = small_wan(), Prefix()
    few, thinned = start(LEVELS, 4, "euler"), start(LEVELS, 4, "euler", ListedGuidance(at=(0.0,), order=0))
    latents(pipe, WAN_CALL, few, prefix)
    assert torch.equal(latents(pipe, WAN_CALL, thinned, prefix, keep=False), latents(pipe, WAN_CALL, thinned))
    before = prefix.saved
    with prefix.beside(pipe, 0, keep=False):
        other = shoot(pipe, Sample("the cat", 0), WAN_CALL, ours("x", few.recipe), decoded=False).latents
    alone = shoot(pipe, Sample("the cat", 0), WAN_CALL, ours("x", few.recipe), decoded=False).latents
    assert other is not None and alone is not None and torch.equal(other, alone) and prefix.saved == before
    prefix.forget()
    latents(pipe, WAN_CALL, few, prefix)
    assert prefix.saved == before


def test_fitting_makes_two_thirds_of_the_evaluations() -> None:
    pipe, made = small_unet(), [0]
    bench = Bench(pipe, {**UNET_CALL, "num_inference_steps": 12}, [SEVEN])
    hook = pipe.unet.register_forward_hook(lambda *_: made.__setitem__(0, made[0] + 1))
    fitting = Fitting.on(bench, lambda: math.inf)
    assert fitting is not None
    fitting.fit(5, None)
    hook.remove()
    assert not fitting.prefix.known, "nothing is held when a fit is done"
    assert fitting.prefix.saved > made[0] * 0.3


def test_a_failing_run_restores_the_network() -> None:
    pipe, prefix = small_unet(), Prefix()
    with pytest.raises(ValueError, match="stop"), prefix.beside(pipe, 0, keep=True):
        raise ValueError("stop")
    assert "forward" not in vars(pipe.unet) and not prefix.known
