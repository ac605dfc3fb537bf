"""Does a model pass? What hasten promises on any host, tried on this one with short runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hasten import metrics
from hasten.errors import HastenError, RefusedError
from hasten.pipelines.accelerate import Session, accelerate
from hasten.pipelines.backends import Check, check
from hasten.pipelines.generate import Prompt, Request, plan
from hasten.pipelines.host import denoisers
from hasten.pipelines.recipes import catalogue
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.recipe import Recipe

STEPS = 12
PROMPT = "a seven moving left"


def conformance(pipe: Any, *, quick: bool = False) -> Iterator[Check]:
    """The promises, one by one, then what was found inside the model and how each recipe fares on it.

    Every run has `STEPS` steps at the model's usual size. quick: promises only.
    """
    model = Model(pipe)
    yield check("same seed, same result", model.deterministic)
    for which, recipe in never_skipping().items():
        yield check(f"never-skip, {which}", lambda recipe=recipe: model.never_skip(recipe))  # type: ignore[misc]
    yield check("skipping on equal input", model.lossless)
    yield check("second run like the first", model.second_run)
    yield check("exact restore", model.restored)
    yield check("exception in mid-run", model.exception)
    yield check("NaN in mid-run", model.not_a_number)
    yield check("structure", model.structure)
    if quick:
        return
    for entry in catalogue():
        if entry.recipe.axes:
            yield model.method(entry.name, entry.recipe)


def never_skipping() -> dict[str, Recipe]:
    """Recipes whose seams are all in place and whose rules never allow a skip."""
    return {
        "watched only": find_recipe("plain"),
        "whole network": find_recipe("easycache").replace({"reuse.rule.limit": 0.0}),
        "blocks": find_recipe("first-block-cache").replace({"reuse.rule.limit": 0.0}),
    }


class Model:
    """One pipeline, and its plain output as the reference of all checks."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        request = Request((Prompt(PROMPT),), steps=STEPS)
        self.call = {**plan(pipe, request), "prompt": PROMPT, "output_type": "latent"}
        self.reference = self.run()
        self.before = _attributes(
            pipe
        )  # after a run, because pipelines keep notes of their own on themselves

    def run(self, recipe: Recipe | None = None) -> Tensor:
        """The latents of one short run."""
        if recipe is None:
            return self._once()
        return self.watched(recipe)[0]

    def watched(self, recipe: Recipe, times: int = 1) -> tuple[Tensor, Session]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # hasten's own warnings are read from the trace instead
            with accelerate(self.pipe, recipe) as session:
                for _ in range(times):
                    result = self._once()
        return result, session

    def _once(self) -> Tensor:
        output = self.pipe(generator=torch.Generator("cpu").manual_seed(0), **self.call)
        return torch.as_tensor(output[0] if isinstance(output[0], Tensor) else output[0][0]).detach().cpu()

    # --- the promises -----------------------------------------------------------------------------

    def deterministic(self) -> str:
        assert torch.isfinite(self.reference).all(), "the plain result holds NaN or infinity"
        _same(self.run(), self.reference)
        return "two plain runs are bit-identical"

    def never_skip(self, recipe: Recipe) -> str:
        result, session = self.watched(recipe)
        report = session.report()
        assert report.computed_fraction == 1.0, f"{1 - report.computed_fraction:.0%} was skipped"
        _same(result, self.reference)
        return f"bit-identical, {report.evaluations} evaluations seen"

    def lossless(self) -> str:
        """The stack gate skips all blocks once on the input that was just computed; it refuses if that loses."""
        _, session = self.watched(never_skipping()["blocks"])
        _raise_refusal(session)
        return "nothing is lost but rounding when all blocks are skipped on equal input"

    def second_run(self) -> str:
        recipe = find_recipe("balanced")
        once, _ = self.watched(recipe)
        twice, session = self.watched(recipe, times=2)
        assert session.report().computed_fraction < 1.0, "balanced skipped nothing"
        _same(twice, once)
        return "nothing of a run is left over in the next"

    def restored(self) -> str:
        self.watched(find_recipe("first-block-cache"))
        self.watched(find_recipe("fewer-steps"))
        changed = sorted(_attributes(self.pipe) ^ self.before)
        assert not changed, f"left behind or missing: {', '.join(changed[:4])}"
        _same(self.run(), self.reference)
        return "no attribute left behind, next output bit-identical"

    def exception(self) -> str:
        def fail(module: nn.Module, args: Any, kwargs: Any) -> None:
            raise _Stop

        self._disturbed(fail, None, expects=_Stop)
        _same(self.run(), self.reference)
        return "restored, and the next run in the same session is clean"

    def not_a_number(self) -> str:
        def spoil(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple | list) else getattr(output, "sample", output)
            first.fill_(float("nan"))
            return output

        self._disturbed(None, spoil, expects=None)
        _same(self.run(), self.reference)
        return "no crash, and the next run in the same session is clean"

    def _disturbed(self, before: Any, after: Any, *, expects: type[BaseException] | None) -> None:
        """A run of `balanced` disturbed in its third evaluation, then a clean one in the same session."""
        recipe = find_recipe("balanced")
        clean = self.run(recipe)
        network = next(iter(denoisers(self.pipe).values()))
        block = next((m for m in network.modules() if m is not network and not list(m.children())), network)
        trigger = _Third(before or after)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with accelerate(self.pipe, recipe):
                hook: Any = (
                    block.register_forward_pre_hook(trigger, with_kwargs=True)
                    if before
                    else block.register_forward_hook(trigger, with_kwargs=True)
                )
                try:
                    self._once()
                except Exception as error:
                    if expects is None or not isinstance(error, expects):
                        raise
                finally:
                    hook.remove()
                again = self._once()
        assert trigger.fired, "the disturbance never happened"
        _same(again, clean)

    # --- what is inside, and how methods fare -----------------------------------------------------

    def structure(self) -> str:
        _, session = self.watched(never_skipping()["blocks"])
        _raise_refusal(session)
        lists = [f"{site} ({num} blocks)" for site, num in session.trace.structure.items()]
        always = [note for note in session.trace.notes if "always computed" in note]
        return "; ".join(["can skip " + ", ".join(lists), *always])

    def method(self, name: str, recipe: Recipe) -> Check:
        """One recipe on this model: how much it computes, how near it stays, or why it is refused."""
        refused: list[str] = []

        def body() -> str:
            try:
                result, session = self.watched(recipe)
            except HastenError as error:
                refused.append(str(error))
                return ""
            report = session.report()
            refused.extend(note for note in session.trace.notes if "refused" in note or "in full" in note)
            assert torch.isfinite(result).all(), "the result holds NaN or infinity"
            distance = metrics.latent_error(result, self.reference)
            others = [note for note in session.trace.notes if note not in refused]
            told = f"{report.computed_fraction:.0%} computed, latent error {distance:.2g}"
            return "; ".join([told, *others])

        found = check(f"recipe {name}", body)
        if refused and found.status == "ok":
            detail = "; ".join(part for part in (refused[0], found.detail) if part)
            return Check(found.name, "refused", detail, found.seconds)
        return found


def _raise_refusal(session: Session) -> None:
    for note in session.trace.notes:
        if "refused" in note:
            raise RefusedError(note)


class _Stop(Exception):
    """Raised on purpose."""


class _Third:
    """Calls `action` the third time it is called, once."""

    def __init__(self, action: Any) -> None:
        self.action, self.calls, self.fired = action, 0, False

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls != 3:
            return None
        self.fired = True
        return self.action(*args)


def _same(result: Tensor, reference: Tensor) -> None:
    if torch.equal(result, reference):
        return
    error = metrics.latent_error(result, reference) if torch.isfinite(result).all() else float("nan")
    raise AssertionError(f"not bit-identical: relative difference {error:.1e}")


def _attributes(pipe: Any) -> set[str]:
    """Names of everything set on the pipeline, its scheduler and its networks, down to each module."""
    owners = {"pipe": pipe, "scheduler": pipe.scheduler}
    for site, network in denoisers(pipe).items():
        owners |= {f"{site}.{name}": module for name, module in network.named_modules()}
    return {f"{owner}.{name}" for owner, thing in owners.items() for name in vars(thing)}
