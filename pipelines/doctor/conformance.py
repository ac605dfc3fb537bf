"""Does a model pass? What hasten promises on any host, tried on this one with short runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hasten.pipelines.doctor import network, promises, runs, weights
from hasten.pipelines.doctor.backends import Check
from hasten.pipelines.doctor.model import Model, same
from hasten.pipelines.recipes import catalogue


def conformance(
    pipe: Any, *, quick: bool = False, compiled: bool = False, call: Mapping[str, Any] | None = None
) -> Iterator[Check]:
    """The promises, one by one, then how each recipe fares on this model, then that nothing has changed on it.

    Every run has 12 steps at the model's usual size. quick: promises only. compiled: also with torch.compile, which
    takes longer and forgets what was compiled in this process. call: further arguments of the pipeline's call, for
    pipelines that need more than a prompt (a control image). The pipeline is as it was after every single check,
    whatever came of it. Raises `ModelError` for a pipeline that takes no prompt or has no denoiser.
    """
    model = Model(pipe, call)
    yield from promises.checks(model)
    yield from network.checks(model)
    yield from runs.checks(model)
    yield from weights.checks(model, compiled=compiled)
    if not quick:
        for entry in catalogue():
            if entry.recipe.axes:
                yield promises.method(model, entry.name, entry.recipe)
    yield model.attempt("unchanged after all checks", lambda: unchanged(model))


def unchanged(model: Model) -> str:
    """The plain result is what it was before the first check."""
    same(model.run(), model.reference)
    return "the plain result is bit-identical to the one before the first check"
