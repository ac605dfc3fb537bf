"""The cache benchmark at tiny sizes: rows as designed, reasons instead of gaps, the same with any number of jobs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import TaylorSeerCacheConfig

from hasten.errors import RecipeError, RefusedError, UsageError
from hasten.pipelines.bench import bars
from hasten.pipelines.bench.cache import Bench, all_presets, bench_cache, controls, preset
from hasten.pipelines.bench.candidates import Candidate
from hasten.pipelines.bench.foreign import diffusers_cache, unavailable
from hasten.pipelines.bench.shots import Sample
from hasten.pipelines.recipes import names
from hasten.pipelines.recipes import recipe as find_recipe
from tests.hosts import PIXART_CALL, small_pixart, small_wan
from tests.pipelines.bench_calls import CALL, FIRST_BLOCK, SAMPLES

KEYS = {
    "model", "recipe", "control", "seconds", "speedup", "computed_fraction", "nfe", "psnr_median", "psnr_worst",
    "psnr_converged", "n_converged", "ssim_median", "latent_error", "prompt_accuracy", "frechet", "recall",
    "exact_match", "bytes_held", "n", "note",
}  # fmt: skip
"""Row keys of the design, and the note."""

INERT = diffusers_cache("TaylorSeer @ defaults", lambda _: TaylorSeerCacheConfig())


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_presets_with_arguments_are_families() -> None:
    name, recipe = preset("easycache:limit=0.5,warmup=0.1")
    assert name == "easycache @ limit=0.5, warmup=0.1"
    assert recipe.reuse is not None and recipe.reuse.rule.limit == 0.5  # type: ignore[attr-defined]
    assert preset("every-other")[0] == "every-other"
    with pytest.raises(RecipeError, match="'0.5' is no argument"):
        preset("easycache:0.5")
    with pytest.raises(RecipeError, match="easycach"):
        preset("easycach")


def test_the_default_is_every_recipe_and_auto_over_tolerances_the_bars_can_read() -> None:
    labels = [preset(text)[0] for text in all_presets()]
    found = {name: find_recipe(name) for name in names()}
    caches = {name for name, one in found.items() if one.attention is None and one.adapter is None}
    assert {label.partition(" @ ")[0] for label in labels} == caches - {"plain"} | {"fast"}
    assert "fast @ student=false" in labels, "a student draws other pictures"
    auto = [label for label in labels if label.startswith("auto @")]
    assert len(auto) > 5 and all(bars.named_tolerance(label) for label in auto)


def test_controls_are_no_more_steps_than_the_plain_run() -> None:
    assert {c.steps for c in controls(4)} == {2, 3} and len(controls(4)) == 6
    assert max(c.steps or 0 for c in controls(50)) < 50


@contextlib.contextmanager
def _crash_late(pipe: Any) -> Iterator[None]:
    _crash_late.count = getattr(_crash_late, "count", 0) + 1  # type: ignore[attr-defined]
    if _crash_late.count == 3:  # type: ignore[attr-defined]
        raise OSError("disk on fire")
    yield


@pytest.fixture(scope="module")
def bench() -> Bench:
    others = [
        FIRST_BLOCK,
        INERT,
        unavailable("gone", "peer:gone", "refused: it left"),
        Candidate("late", _crash_late, "peer:late"),
    ]
    others.append(diffusers_cache("wrong", lambda _: object()))
    chosen = dict(preset(text) for text in ("every-other", "held-guidance"))
    return bench_cache(small_wan(), CALL, SAMPLES, chosen, model="small", peers=others, oracle_of="every-other")


def by_name(bench: Bench) -> dict[str, dict[str, Any]]:
    assert len({row["recipe"] for row in bench.rows}) == len(bench.rows)
    return {row["recipe"]: row for row in bench.rows}


def test_rows_have_the_keys_of_the_design(bench: Bench) -> None:
    assert all(set(row) <= KEYS for row in bench.rows)
    rows = by_name(bench)
    assert rows["plain"]["nfe"] == 8 and rows["plain"]["psnr_median"] is None
    every = rows["every-other"]
    assert every["n"] == 2 and every["nfe"] == 4 and every["computed_fraction"] == 0.5
    assert every["psnr_median"] > 10 and 0 < every["latent_error"] < 1 and every["bytes_held"] > 0
    assert every["prompt_accuracy"] is not None and every["recall"] is None, "recall needs four runs"
    assert {"euler 2 steps", "unipc 3 steps", "dpm++ 2 steps"} <= set(rows)
    assert rows["euler 2 steps"]["computed_fraction"] == 0.5
    assert len(bench.outcomes["every-other"]) == 2


def test_every_peer_is_a_row_with_numbers_or_a_reason(bench: Bench) -> None:
    rows = by_name(bench)
    first = rows["diffusers FirstBlockCache @ 0.9"]
    assert first["computed_fraction"] < 1 and first["bytes_held"] > 0 and "note" not in first
    inert = rows["diffusers TaylorSeer @ defaults"]
    assert (
        inert["exact_match"] is True
        and inert["note"].startswith("inert")
        and inert["computed_fraction"] == 1.0
    )
    assert rows["gone"]["note"] == "refused: it left" and rows["gone"]["n"] == 0
    assert rows["late"]["note"] == "on 'a two', seed 1: crashed: OSError: disk on fire"
    assert rows["diffusers wrong"]["note"].startswith("crashed: ValueError: Cache config")


def test_the_oracle_is_never_below_what_it_limits(bench: Bench) -> None:
    rows = by_name(bench)
    oracle = rows["every-other, oracle schedule"]
    assert oracle["control"] == "oracle" and oracle["n"] == 2
    assert oracle["nfe"] <= rows["every-other"]["nfe"]
    for mine, best in zip(
        bench.outcomes["every-other"], bench.outcomes["every-other, oracle schedule"], strict=True
    ):
        assert best["psnr"] is None or (mine["psnr"] is not None and best["psnr"] >= mine["psnr"])


def test_bars_are_answered_from_the_rows(bench: Bench) -> None:
    found = bars.bars(bench.rows, "every-other", bench.outcomes)
    assert [bar.met is None for bar in found] == [False] * 5 + [True]


def test_a_peer_that_stays_on_the_pipeline_ends_the_benchmark() -> None:
    @contextlib.contextmanager
    def clingy(pipe: Any) -> Iterator[None]:
        with torch.no_grad():
            pipe.transformer.proj_out.weight.mul_(1.5)
        yield

    with pytest.raises(RefusedError, match="clingy left the pipeline changed"):
        bench_cache(small_wan(layers=1), CALL, SAMPLES[:1], {}, peers=[Candidate("clingy", clingy, "peer:c")])


def test_a_solver_without_oracle_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    call = {**PIXART_CALL, "num_inference_steps": 3}
    pipe = small_pixart(layers=1)
    found = bench_cache(pipe, call, SAMPLES[:1], dict([preset("every-other")]), oracle_of="every-other", tell=told.append)
    assert not [row for row in found.rows if row["control"] == "oracle"]
    assert any("no oracle" in line and "DPMSolver" in line for line in told)


@pytest.mark.long
def test_jobs_share_the_samples_and_find_the_same() -> None:
    samples = [*SAMPLES, Sample("a four", 2)]
    chosen = dict([preset("every-other")])

    def crash_on_last(pipe: Any) -> contextlib.AbstractContextManager[None]:
        return _crash_at(pipe, 2)

    others = [Candidate("late", crash_on_last, "peer:late")]
    together, apart = (
        bench_cache(
            small_wan(layers=1), CALL, samples, chosen, peers=others, oracle_of="every-other", jobs=jobs
        )
        for jobs in (1, 2)
    )
    assert [row["recipe"] for row in together.rows] == [row["recipe"] for row in apart.rows]
    for one, two in zip(together.rows, apart.rows, strict=True):
        assert {k: v for k, v in one.items() if k not in TIMES} == {k: v for k, v in two.items() if k not in TIMES}
    for name, runs in together.outcomes.items():
        assert [run["psnr"] for run in runs] == [run["psnr"] for run in apart.outcomes[name]]
    assert by_name(apart)["late"]["note"] == "on 'a four', seed 2: crashed: OSError: disk on fire"


TIMES = {"seconds", "speedup"}


@contextlib.contextmanager
def _crash_at(pipe: Any, seed: int) -> Iterator[None]:
    """Fail in the run of this seed, whichever process it is in: the first noise tells it."""
    prepare = pipe.prepare_latents

    def prepared(*args: Any, **kwargs: Any) -> Any:
        latents = prepare(*args, **kwargs)
        if torch.equal(latents, torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))):
            raise OSError("disk on fire")
        return latents

    pipe.prepare_latents = prepared
    try:
        yield
    finally:
        del pipe.prepare_latents


def test_jobs_beside_other_threads_are_refused() -> None:
    torch.set_num_threads(2)
    try:
        with pytest.raises(UsageError, match="one thread each"):
            bench_cache(small_wan(layers=1), CALL, SAMPLES, {}, jobs=2)
    finally:
        torch.set_num_threads(1)


def test_an_output_that_is_not_finite_is_a_reason() -> None:
    @contextlib.contextmanager
    def broken(pipe: Any) -> Iterator[None]:
        weight = copy.deepcopy(pipe.vae.decoder.conv_out.weight.data)
        pipe.vae.decoder.conv_out.weight.data.fill_(float("nan"))
        yield
        pipe.vae.decoder.conv_out.weight.data.copy_(weight)

    found = bench_cache(
        small_wan(layers=1), CALL, SAMPLES[:1], {}, peers=[Candidate("nan", broken, "peer:n")]
    )
    assert [row["note"] for row in found.rows if row["recipe"] == "nan"] == [
        "refused: the output is not finite."
    ]
