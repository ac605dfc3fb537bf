"""Peers run on the very same pipeline, leave no trace on it, and say why one cannot be had."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

from hasten.errors import RefusedError
from hasten.pipelines.bench import peers
from hasten.pipelines.bench.candidates import Candidate
from hasten.pipelines.bench.foreign import because, cache_dit, diffusers_cache
from hasten.pipelines.bench.shots import shoot
from hasten.pipelines.work import watch
from tests.hosts import FLUX_CALL, PIXART_CALL, small_flux, small_pixart, small_unet, small_wan
from tests.pipelines.bench_calls import CALL, FIRST_BLOCK, SAMPLES

PYRAMID = diffusers_cache(
    "PAB @ 2",
    lambda now: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=now,
    ),
)


def attributes(pipe: Any) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in pipe.transformer.named_modules()}


@pytest.mark.parametrize("candidate", [FIRST_BLOCK, PYRAMID], ids=lambda c: c.recipe)
@pytest.mark.parametrize("build", [small_wan, small_pixart])
def test_diffusers_caches_skip_something_and_leave_no_trace(build: Any, candidate: Candidate) -> None:
    pipe, call = build(), CALL if build is small_wan else {**PIXART_CALL, "num_inference_steps": 4}
    before, plain = attributes(pipe), shoot(pipe, SAMPLES[0], call)
    with_root = attributes(pipe)  # pipelines with cache_context put an empty registry on the root themselves
    with watch(pipe) as whole:
        shoot(pipe, SAMPLES[0], call)
    with watch(pipe) as work:
        cached = shoot(pipe, SAMPLES[0], call, candidate)
    assert work.flops < whole.flops
    assert not np.array_equal(cached.frames, plain.frames)
    assert cached.latents is not None
    after = attributes(pipe)
    assert {name: keys - {"forward"} for name, keys in after.items()} == with_root
    assert all(after[name] == before[name] for name in before if name), "nothing stays on any block"
    assert np.array_equal(shoot(pipe, SAMPLES[0], call).frames, plain.frames)


def test_cache_dit_leaves_no_trace_that_breaks_the_next_peer() -> None:
    pytest.importorskip("cache_dit")
    pipe, call = small_flux(), {**FLUX_CALL, "num_inference_steps": 3}
    plain, before = (
        shoot(pipe, SAMPLES[0], call),
        {name: dict(vars(m)) for name, m in pipe.transformer.named_modules()},
    )
    order = [name for name, _ in pipe.transformer.named_modules()]
    shoot(pipe, SAMPLES[0], call, cache_dit("DBCache @ 0.9", 0.9, 1))
    assert [name for name, _ in pipe.transformer.named_modules()] == order
    for name, module in pipe.transformer.named_modules():
        assert vars(module).keys() == before[name].keys(), name
        assert all(vars(module)[key] is value for key, value in before[name].items()), name
    assert np.array_equal(shoot(pipe, SAMPLES[0], call).frames, plain.frames)
    shoot(pipe, SAMPLES[0], call, FIRST_BLOCK)


def test_a_registration_that_breaks_off_leaves_no_trace() -> None:
    pipe = small_pixart()
    before = attributes(pipe)

    def half(_: Any) -> Any:
        from diffusers.hooks import apply_first_block_cache

        apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig())
        raise TypeError("and then it broke")

    with pytest.raises(TypeError, match="then it broke"), diffusers_cache("half", half).apply(pipe):
        pass
    assert attributes(pipe) == before


def test_a_unet_is_refused_with_the_reason() -> None:
    with (
        pytest.raises(RefusedError, match="StableDiffusionPipeline has no transformer"),
        FIRST_BLOCK.apply(small_unet()),
    ):
        pass


def test_magcache_is_calibrated_for_the_steps_it_will_run() -> None:
    ratios = peers.magnitude_ratios(small_wan(), CALL)
    assert len(ratios) == 4 and ratios[0] == 1.0 and all(0 < ratio < 10 for ratio in ratios)


def test_the_sweep_names_every_peer_once_and_says_why_one_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cache_dit", None)
    found = peers.sweep(small_wan(), CALL)
    labels = [candidate.recipe for candidate in found]
    assert len(set(labels)) == len(labels)
    assert {label.partition(" @ ")[0].split(",")[0] for label in labels} >= {
        "diffusers FirstBlockCache", "diffusers MagCache", "diffusers TaylorSeer", "diffusers TaylorSeer lite",
        "diffusers SeaCache", "diffusers PAB", "diffusers FasterCache", "cache-dit DBCache",
    }  # fmt: skip
    with pytest.raises(RefusedError, match="not available: .*cache_dit"), found[-1].apply(small_wan()):
        pass


def test_reasons_say_what_kind_they_are() -> None:
    assert because(RefusedError("no.")) == "refused: no."
    assert because(KeyError("x\ny")).startswith("crashed: KeyError: ")
    assert because(RuntimeError()) == "crashed: RuntimeError: no message"
