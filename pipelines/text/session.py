"""A recipe on a text diffusion pipeline for some time: what `hasten.accelerate` returns for one."""

from __future__ import annotations

from typing import Self

from hasten.limits import Limits
from hasten.pipelines.text.pipeline import TextPipeline
from hasten.recipe import Recipe
from hasten.report_diffusion import TextDiffusionReport, together


class TextDiffusionSession:
    """A context manager. Within, every `generate` uses the recipe; `report()` says what it saved."""

    def __init__(self, pipe: TextPipeline, recipe: Recipe, limits: Limits | None = None) -> None:
        self.host, self.recipe = pipe, pipe.fitted(recipe)
        self.reports: list[TextDiffusionReport] = []
        self.limits = limits or pipe.limits
        self._closed = False
        pipe.sessions.append(self)

    @property
    def closed(self) -> bool:
        """Does the pipeline go its own way again?"""
        return self._closed

    @property
    def skipped(self) -> float:
        """Share of the work of one token per evaluation, without a cache, that was left out so far, 0 to 1."""
        return max(0.0, 1.0 - self.report().of_sequential)

    def asked(self, length: int | None) -> Recipe:
        """The recipe for a call whose longest text may have `length` new tokens; None where that is not known."""
        return self.recipe

    def report(self) -> TextDiffusionReport:
        """What the generations so far cost, ready to print, to save as JSON or as a page."""
        return together(self.reports) if self.reports else self.host.nothing(self.recipe)

    def close(self) -> None:
        """Give the pipeline its own recipe back. Safe to call twice; the report stays."""
        if not self._closed:
            self._closed = True
            self.host.sessions.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
