"""What hasten promises on any pipeline: nothing changes unless something is skipped, and nothing is left over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from hasten import metrics
from hasten.errors import HastenError
from hasten.pipelines.doctor.backends import Check
from hasten.pipelines.doctor.model import REMEMBERING, STEPS, Model, raise_refusal, same, stood_in
from hasten.pipelines.host import Output
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.recipe import Recipe


def never_skipping() -> dict[str, Recipe]:
    """Recipes whose seams are all in place and whose rules never allow a skip."""
    return {
        "watched only": find_recipe("plain"),
        "whole network": find_recipe("easycache").replace({"reuse.rule.limit": 0.0}),
        "blocks": find_recipe("first-block-cache").replace({"reuse.rule.limit": 0.0}),
    }


def checks(model: Model) -> Iterator[Check]:
    """Bit-identity when nothing is skipped, losslessness when something is, and disturbances."""
    yield model.attempt("same seed, same result", lambda: deterministic(model))
    for which, recipe in never_skipping().items():
        yield model.attempt(f"never-skip, {which}", lambda recipe=recipe: never_skip(model, recipe))  # type: ignore[misc]
    yield model.attempt("skipping on equal input", lambda: lossless(model))
    yield model.attempt("second run like the first", lambda: second_run(model))
    yield model.attempt("exact restore", lambda: restored(model))
    yield model.attempt("exception in mid-run", lambda: exception(model))
    yield model.attempt("NaN in mid-run", lambda: not_a_number(model))
    yield model.attempt("structure", lambda: structure(model))


def deterministic(model: Model) -> str:
    assert torch.isfinite(model.reference).all(), "the plain result holds NaN or infinity"
    same(model.run(), model.reference)
    return "two plain runs are bit-identical"


def never_skip(model: Model, recipe: Recipe) -> str:
    result, session = model.watched(recipe)
    report = session.report()
    assert report.computed_fraction == 1.0, f"{1 - report.computed_fraction:.0%} was skipped"
    assert report.evaluations, "no evaluation was seen"
    same(result, model.reference)
    return f"bit-identical, {report.evaluations} evaluations seen"


def lossless(model: Model) -> str:
    """The stack gate skips all blocks once on the input that was just computed; it refuses if that loses."""
    _, session = model.watched(never_skipping()["blocks"])
    raise_refusal(session)
    return "nothing is lost but rounding when all blocks are skipped on equal input"


def second_run(model: Model) -> str:
    recipe = find_recipe("balanced")
    once, _ = model.watched(recipe)
    twice, session = model.watched(recipe, times=2)
    assert session.report().computed_fraction < 1.0, "balanced skipped nothing"
    same(twice, once)
    return "nothing of a run is left over in the next"


def restored(model: Model) -> str:
    before = model.snapshot.names()
    model.watched(find_recipe("first-block-cache"))
    model.watched(find_recipe("fewer-steps"))
    changed = sorted(model.snapshot.names() ^ before)
    assert not changed, f"left behind or missing: {', '.join(changed[:4])}"
    same(model.run(), model.reference)
    return "no attribute left behind, next output bit-identical"


# --- disturbances ---------------------------------------------------------------------------------


def exception(model: Model) -> str:
    def fail(module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Stop

    _disturbed(model, lambda block, once: block.register_forward_pre_hook(once(fail), with_kwargs=True), _Stop)
    same(model.run(), model.reference)
    return "restored, and the next run in the same session is clean"


def not_a_number(model: Model) -> str:
    def spoil(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        for tensor in Output(output).tensors:
            tensor.fill_(float("nan"))
        return output

    _disturbed(model, lambda block, once: block.register_forward_hook(once(spoil), with_kwargs=True), ())
    same(model.run(), model.reference)
    return "no crash, and the next run in the same session is clean"


class _Stop(Exception):
    """Raised on purpose."""


class Once:
    """Calls `action` the `number`-th time it is called, and only then."""

    def __init__(self, action: Callable[..., Any], number: int = 3) -> None:
        self.action, self.number, self.calls = action, number, 0

    @property
    def fired(self) -> bool:
        return self.calls >= self.number

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.action(*args) if self.calls == self.number else None


def _disturbed(model: Model, attach: Callable[[nn.Module, Any], Any], expected: Any) -> None:
    """A run disturbed in the third evaluation of a part of the network, then a clean one in the same session."""
    network = model.network
    part = next((m for m in network.modules() if m is not network and not list(m.children())), network)
    for which, recipe in {"balanced": find_recipe("balanced"), **REMEMBERING}.items():
        clean = model.run(recipe)
        triggers: list[Once] = []

        def once(action: Callable[..., Any], triggers: list[Once] = triggers) -> Once:
            triggers.append(Once(action))
            return triggers[-1]

        with model.session(recipe):
            model.once()  # in the first run of a session blocks are tried out, and a disturbance of that is a refusal
            hook = attach(part, once)
            try:
                model.once()
            except expected:
                pass
            finally:
                hook.remove()
            again = model.once()
        assert triggers[0].fired, f"{which}: the disturbance never happened"
        same(again, clean, which)


# --- what is inside, and how methods fare ---------------------------------------------------------


def structure(model: Model) -> str:
    _, session = model.watched(never_skipping()["blocks"])
    raise_refusal(session)
    lists = [f"{site} ({num} blocks)" for site, num in session.trace.structure.items()]
    always = [note for note in session.trace.notes if "always computed" in note]
    return "; ".join(["can skip " + ", ".join(lists), *always])


def method(model: Model, name: str, recipe: Recipe) -> Check:
    """One recipe on this model: how much it computes, how near it stays, or why it is refused."""
    refused: list[str] = []

    def body() -> str:
        try:
            result, session = model.watched(recipe)
        except HastenError as error:
            refused.append(str(error))
            return ""
        report = session.report()
        refused.extend(note for note in session.trace.notes if "refused" in note or "in full" in note)
        assert torch.isfinite(result).all(), "the result holds NaN or infinity"
        inert = recipe.reuse is not None and not stood_in(session)
        told = [f"{report.computed_fraction:.0%} computed"]
        told.append(f"latent error {metrics.latent_error(result, model.reference):.2g}")
        told += [f"reuse skipped nothing in {STEPS} steps"] if inert else []
        return "; ".join([", ".join(told), *(note for note in session.trace.notes if note not in refused)])

    found = model.attempt(f"recipe {name}", body)
    if refused and found.status == "ok":
        detail = "; ".join(part for part in (refused[0], found.detail) if part)
        return Check(found.name, "refused", detail, found.seconds)
    return found
