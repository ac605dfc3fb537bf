"""What is compared: recipes, the controls that they must beat, and other libraries' caches on the same pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hasten.errors import UsageError
from hasten.pipelines.accelerate import Session, accelerate
from hasten.pipelines.solver import other_scheduler
from hasten.recipe import Recipe
from hasten.session import Attachment

Apply = Callable[[Any], contextlib.AbstractContextManager[Session | None]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of a comparison.

    recipe: its name in the table. control: "" for ours, else "fewer_steps", "oracle", "peer:<name>".
    apply: puts it onto a pipeline while its context is open. steps: solver steps, None for the plain number.
    """

    recipe: str
    apply: Apply
    control: str = ""
    steps: int | None = None


def ours(name: str, recipe: Recipe | str) -> Candidate:
    """A recipe of this library."""
    return Candidate(name, lambda pipe: accelerate(pipe, recipe))


def fewer_steps(solver: str, steps: int) -> Candidate:
    """The control: diffusers' `solver` on `steps` steps, nothing skipped."""

    @contextlib.contextmanager
    def apply(pipe: Any) -> Iterator[None]:
        attachment = Attachment()
        attachment.replace(pipe, "scheduler", other_scheduler(pipe.scheduler, solver))
        try:
            yield
        finally:
            attachment.restore()

    return Candidate(f"{solver} {steps} steps", apply, "fewer_steps", steps)


def diffusers_cache(label: str, config: Any) -> Candidate:
    """A cache that diffusers ships, through `enable_cache`."""

    @contextlib.contextmanager
    def apply(pipe: Any) -> Iterator[None]:
        pipe.transformer.enable_cache(config)
        try:
            yield
        finally:
            pipe.transformer.disable_cache()

    return Candidate(f"diffusers {label}", apply, "peer:diffusers")


def cache_dit(label: str, threshold: float, order: int | None) -> Candidate:
    """cache-dit's DBCache (F1B0), with its TaylorSeer calibrator when `order` is given."""

    @contextlib.contextmanager
    def apply(pipe: Any) -> Iterator[None]:
        import cache_dit as peer

        config = peer.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold, max_warmup_steps=4
        )
        calibrator = peer.TaylorSeerCalibratorConfig(taylorseer_order=order) if order is not None else None
        peer.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
        try:
            yield
        finally:
            peer.disable_cache(pipe)

    return Candidate(f"cache-dit {label}", apply, "peer:cache-dit")


def peers() -> list[Candidate]:
    """Peers at settings around our presets' speed. cache-dit is left out, with a `UsageError` to the caller, if absent."""
    from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

    found = [
        diffusers_cache("FirstBlockCache 0.1", FirstBlockCacheConfig(threshold=0.1)),
        diffusers_cache(
            "TaylorSeer lite, interval 3", TaylorSeerCacheConfig(cache_interval=3, max_order=1, use_lite_mode=True)
        ),
        diffusers_cache(
            "TaylorSeer lite, interval 5", TaylorSeerCacheConfig(cache_interval=5, max_order=1, use_lite_mode=True)
        ),
    ]
    try:
        import cache_dit as _  # noqa: F401
    except ImportError:
        raise UsageError("cache-dit is not installed; `pip install cache-dit`, or pass peers=False.") from None
    found.append(cache_dit("F1B0 0.08 + TaylorSeer 1", 0.08, 1))
    found.append(cache_dit("F1B0 0.15 + TaylorSeer 1", 0.15, 1))
    found.append(cache_dit("F1B0 0.5 + TaylorSeer 1", 0.5, 1))
    return found
