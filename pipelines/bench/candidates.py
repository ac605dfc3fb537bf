"""What is compared: recipes and the controls that they must beat. Other libraries are in `peers`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hasten.pipelines.accelerate import accelerate
from hasten.pipelines.quiet import quiet
from hasten.pipelines.session import Session
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

    def apply(pipe: Any) -> Session:
        session: Session = accelerate(pipe, recipe)
        return session

    return Candidate(name, apply)


def fewer_steps(solver: str, steps: int) -> Candidate:
    """The control: diffusers' `solver` on `steps` steps, nothing skipped."""

    @contextlib.contextmanager
    def apply(pipe: Any) -> Iterator[None]:
        attachment = Attachment()
        with quiet("diffusers"):  # it warns of every setting that the other solver does not have
            attachment.replace(pipe, "scheduler", other_scheduler(pipe.scheduler, solver))
        try:
            yield
        finally:
            attachment.restore()

    return Candidate(f"{solver} {steps} steps", apply, "fewer_steps", steps)
