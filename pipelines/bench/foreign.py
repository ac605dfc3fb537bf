"""Putting other libraries' caches onto a pipeline, and taking them off again without a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from hasten.errors import RefusedError, UsageError
from hasten.pipelines.bench.candidates import Candidate
from hasten.pipelines.host import denoisers
from hasten.pipelines.quiet import quiet

Config = Callable[[Callable[[], float]], Any]
"""Makes the peer's configuration object when the peer is put on; given what returns the current timestep, 0..1000."""


def diffusers_cache(label: str, config: Config) -> Candidate:
    """A cache that diffusers ships: through `enable_cache`, or hooked on directly where the model lacks that.

    Without `enable_cache` there is no `cache_context` either; then the whole run is one context, which is right for
    pipelines that put both branches into one batch.
    """

    @contextlib.contextmanager
    def apply(pipe: Any) -> Iterator[None]:
        model = getattr(pipe, "transformer", None)
        if model is None:
            raise RefusedError(
                f"{type(pipe).__name__} has no transformer, and diffusers' caches take nothing else."
            )
        with (
            quiet("diffusers"),
            _timestep(pipe, model) as now,
            _no_hook_stays(model),
            contextlib.ExitStack() as context,
        ):
            if hasattr(model, "enable_cache"):
                model.enable_cache(config(now))
            else:
                _hook_on(model, config(now))
                from diffusers.models.cache_utils import CacheMixin

                context.enter_context(CacheMixin.cache_context(model, "both"))
            yield

    return Candidate(f"diffusers {label}", apply, "peer:diffusers")


def _hook_on(model: nn.Module, config: Any) -> None:
    """What `enable_cache` does with this configuration, for a model that does not offer it."""
    from diffusers import hooks

    name = type(config).__name__
    functions = {
        "FirstBlockCacheConfig": "apply_first_block_cache",
        "MagCacheConfig": "apply_mag_cache",
        "TaylorSeerCacheConfig": "apply_taylorseer_cache",
        "SeaCacheConfig": "apply_sea_cache",
        "PyramidAttentionBroadcastConfig": "apply_pyramid_attention_broadcast",
        "FasterCacheConfig": "apply_faster_cache",
    }
    getattr(hooks, functions[name])(model, config)


@contextlib.contextmanager
def _no_hook_stays(model: nn.Module) -> Iterator[None]:
    """Take off what was put on meanwhile, also after a registration that broke off, and the empty registries with it."""

    def registries() -> dict[str, list[str]]:
        found = {name: getattr(module, "_diffusers_hook", None) for name, module in model.named_modules()}
        return {name: list(registry._hook_order) for name, registry in found.items() if registry is not None}

    before, attributes = registries(), dict(model.__dict__)
    try:
        yield
    finally:
        for name, hooks in registries().items():
            module: Any = model.get_submodule(name)
            for hook in [h for h in reversed(hooks) if h not in before.get(name, ())]:
                module._diffusers_hook.remove_hook(hook, recurse=False)
            module._diffusers_hook.invalidate_child_registries_cache()
            if name not in before:
                del module._diffusers_hook
                if hooks:
                    module.__dict__.pop("forward", None)  # remove_hook leaves a bound copy of the class's own
        model.__dict__.pop("_cache_config", None)
        if "_cache_config" in attributes:
            model.__dict__["_cache_config"] = attributes["_cache_config"]


@contextlib.contextmanager
def _timestep(pipe: Any, model: nn.Module) -> Iterator[Callable[[], float]]:
    """The current timestep in 0..1000: the pipeline's own, or else what its denoiser was last called with."""
    if hasattr(type(pipe), "current_timestep"):
        yield lambda: float(pipe.current_timestep)
        return
    seen = [1000.0]

    def keep(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        seen[:] = [float(kwargs["timestep"].flatten()[0])]

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield lambda: seen[0]
    finally:
        handle.remove()


def cache_dit(label: str, threshold: float, order: int | None) -> Candidate:
    """cache-dit's DBCache (F1B0), with its TaylorSeer calibrator when `order` is given."""

    @contextlib.contextmanager
    def apply(pipe: Any) -> Iterator[None]:
        import cache_dit as peer

        config = peer.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold, max_warmup_steps=4
        )
        calibrator = peer.TaylorSeerCalibratorConfig(taylorseer_order=order) if order is not None else None
        with quiet("CACHE_DIT", "cache_dit"), _attributes_stay(pipe):
            try:
                peer.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
                yield
            finally:
                peer.disable_cache(pipe)

    return Candidate(f"cache-dit {label}", apply, "peer:cache-dit")


@contextlib.contextmanager
def _attributes_stay(pipe: Any) -> Iterator[None]:
    """Give every module of the denoisers the attributes and the order of children back that it had.

    cache-dit leaves its own forward on a Flux transformer, and the list it swapped as the last child. Plain runs do not
    change by that, but diffusers' caches then take another block for the first and crash.
    """
    owners = [module for model in denoisers(pipe).values() for module in model.modules()]
    before = [(vars(owner), dict(vars(owner))) for owner in owners]
    children = [(owner._modules, dict(owner._modules)) for owner in owners]
    try:
        yield
    finally:
        for current, old in before:
            for name in [name for name in current if name not in old]:
                del current[name]
            current.update(old)
        for now, then in children:
            now.clear()
            now.update(then)


class Unavailable(RefusedError):
    """A peer that could not be prepared; the message is the whole reason."""


def unavailable(recipe: str, control: str, reason: str) -> Candidate:
    """A peer that cannot even be put on: its row says why."""

    @contextlib.contextmanager
    def apply(pipe: Any) -> Iterator[None]:
        raise Unavailable(reason)
        yield

    return Candidate(recipe, apply, control)


def because(error: BaseException) -> str:
    """One line of a table: whether it was refused, is absent or crashed, and the first line of the message."""
    message = (str(error).strip() or "no message").splitlines()[0]
    if isinstance(error, Unavailable):
        return message
    if isinstance(error, RefusedError | UsageError):
        return f"refused: {message}"
    if isinstance(error, ImportError):
        return f"not available: {message}"
    return f"crashed: {type(error).__name__}: {message}"
