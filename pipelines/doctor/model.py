"""The model that `hasten doctor` examines: short runs of its pipeline, and a guard that nothing stays on it."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hasten import metrics
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every
from hasten.caching.stack import StackReuse
from hasten.errors import ModelError, RefusedError
from hasten.forecast import Forecast, Hold, Polynomial
from hasten.pipelines.accelerate import accelerate
from hasten.pipelines.doctor.backends import Check, Inapplicable, check
from hasten.pipelines.doctor.restore import Snapshot
from hasten.pipelines.generate import Prompt, Request, plan
from hasten.pipelines.host import Call, Layout, denoisers
from hasten.pipelines.quiet import quiet
from hasten.pipelines.session import Session
from hasten.recipe import Recipe

STEPS = 12
PROMPT = "a seven moving left"


def scheduled(interval: int, forecast: Forecast) -> dict[str, Recipe]:
    """Compute one step in `interval`, whatever is measured, so that each check is sure to see skipped steps."""
    rule = Every(interval=interval)
    return {
        "whole network": Recipe(name="check-network", reuse=NetworkReuse(rule=rule, forecast=forecast)),
        "blocks": Recipe(name="check-blocks", reuse=StackReuse(lead=1, rule=rule, forecast=forecast)),
    }


ALTERNATE = scheduled(2, Hold())
"""Every second step repeats the one before: on equal input nothing may be lost."""

REMEMBERING = scheduled(2, Polynomial(order=1))
"""A forecast from two earlier values, into which anything left over from another run would enter."""

ONCE = scheduled(99, Hold())
"""Only the first step of a run is computed: in a loop that stands still all others must repeat it."""


class Model:
    """One pipeline, its plain output as the reference of all checks, and one recorded call of its network.

    extra: further arguments of the pipeline's call, for those that need more than a prompt (a control image).
    call: what the pipeline is called with. site, recorded: the first network that ran, and its call in the middle.
    """

    def __init__(self, pipe: Any, extra: Mapping[str, Any] | None = None) -> None:
        self.pipe = pipe
        request = Request((Prompt(PROMPT),), steps=STEPS)
        self.call = {**plan(pipe, request), "prompt": PROMPT, **(extra or {}), "output_type": "latent"}
        with recording(pipe) as found, quiet("diffusers"):
            self.reference = self._first()
        if not found:
            raise ModelError(f"{type(pipe).__name__} ran without calling any of {', '.join(denoisers(pipe))}.")
        self.site, self.recorded = found[0]
        # After a run, because pipelines and networks keep notes of their own on themselves.
        self.snapshot = Snapshot(pipe)

    @property
    def network(self) -> nn.Module:
        """The network of `recorded`."""
        return denoisers(self.pipe)[self.site]

    @property
    def step_callback(self) -> bool:
        """Can the pipeline be told something at the end of each step?"""
        return "callback_on_step_end" in inspect.signature(self.pipe.__call__).parameters

    def _first(self) -> Tensor:
        try:
            return self.run()
        except Exception as error:
            raise ModelError(
                f"{type(self.pipe).__name__} cannot be run with a prompt alone: {short(error)}. Pass what it needs in"
                " Python: hasten.pipelines.doctor.conformance: conformance(pipe, call={...})."
            ) from error

    # --- runs -------------------------------------------------------------------------------------

    def run(self, recipe: Recipe | None = None, **changes: Any) -> Tensor:
        """The latents of one short run. changes: arguments of the pipeline's call that differ."""
        return self.once(**changes) if recipe is None else self.watched(recipe, **changes)[0]

    def watched(self, recipe: Recipe, times: int = 1, **changes: Any) -> tuple[Tensor, Session]:
        """The latents of the last of several runs in one session, and that session."""
        with self.session(recipe) as session:
            for _ in range(times):
                result = self.once(**changes)
        return result, session

    @contextmanager
    def session(self, recipe: Recipe, host: Any = None, **more: Any) -> Iterator[Session]:
        """`accelerate` on the pipeline (or on `host`), silent: hasten's warnings are read from the trace instead."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with accelerate(self.pipe if host is None else host, recipe, **more) as session:
                yield session

    def once(self, pipe: Any = None, **changes: Any) -> Tensor:
        """The latents of one run of `pipe` with the noise and the arguments of the reference."""
        call = {**self.call, **changes}
        output = (pipe or self.pipe)(generator=torch.Generator("cpu").manual_seed(0), **call)
        return torch.as_tensor(output[0] if isinstance(output[0], Tensor) else output[0][0]).detach().cpu()

    # --- the guard --------------------------------------------------------------------------------

    def attempt(self, name: str, body: Callable[[], str]) -> Check:
        """One check, after which the pipeline is as it was; whatever the check left on it is taken off and told."""
        with quiet("diffusers"):
            found = check(name, body)
        left = self.snapshot.differences()
        if not left:
            return found
        self.snapshot.restore()
        told = f"left on the model (now removed): {', '.join(left[:3])}{' ...' if len(left) > 3 else ''}"
        detail = f"{found.detail}; {told}" if found.status == "failed" else told
        return dataclasses.replace(found, status="failed", detail=detail)

    @contextmanager
    def borrowed(self) -> Iterator[nn.Module]:
        """The network, to be changed at will; afterwards everything on it is exactly as before."""
        before = Snapshot(self.pipe, weights=True)
        try:
            yield self.network
        finally:
            before.restore()


@contextmanager
def recording(pipe: Any) -> Iterator[list[tuple[str, Call]]]:
    """One entry: a call, not the first one, of the first denoiser that runs, with tensors of its own."""
    found: list[tuple[str, Call]] = []
    seen = itertools.count(1)

    def hook(site: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (found and found[0][0] != site) or next(seen) > STEPS // 2:
                return
            found[:] = [(site, Call(Layout.of(module), own(args), own(kwargs)))]

        return keep

    networks = denoisers(pipe).items()
    handles = [network.register_forward_pre_hook(hook(site), with_kwargs=True) for site, network in networks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_hasten(what: str) -> Iterator[None]:
    """Whatever fails inside, where no session is open, is the model's own limit: `Inapplicable` with `what` and why."""
    try:
        yield
    except Inapplicable:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        raise Inapplicable(f"{what} ({short(error)})") from None


def short(error: Exception) -> str:
    """What went wrong, in a line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said if len(said) <= 200 else said[:200].rsplit(' ', 1)[0] + ' ...'}"


def own(value: Any, change: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """`value` with `change` applied to each tensor in its lists, tuples and dicts, to any depth."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is dict:
        return {key: own(inner, change) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(own(inner, change) for inner in value)
    return value


def same(result: Tensor, reference: Tensor, what: str = "") -> None:
    """Raise `AssertionError` unless both are bit-identical. what: what is compared, for the message."""
    where = f"{what}: " if what else ""
    assert result.shape == reference.shape, f"{where}shape {tuple(result.shape)}, not {tuple(reference.shape)}"
    if torch.equal(result, reference):
        return
    error = metrics.latent_error(result, reference) if torch.isfinite(result).all() else float("nan")
    raise AssertionError(f"{where}not bit-identical: relative difference {error:.1e}")


def raise_refusal(session: Session) -> None:
    """Raise `RefusedError` when the session says that something is refused."""
    for note in session.trace.notes:
        if "refused" in note:
            raise RefusedError(note)


def stood_in(session: Session) -> int:
    """How many decisions of a session were to skip."""
    return sum(event.action in ("reuse", "forecast") for event in session.trace.events)
