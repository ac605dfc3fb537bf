"""A budget on text diffusion: the kept recipe that was tuned on this model for texts of this length, else sequential decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hasten.budget import Budget
from hasten.errors import HastenError
from hasten.limits import Limits
from hasten.pipelines.text.arguments import PLAIN
from hasten.pipelines.text.pipeline import TextPipeline
from hasten.pipelines.text.session import TextDiffusionSession
from hasten.pipelines.tune.fingerprint import of_text
from hasten.pipelines.tune.kept import Found, files_kept, read_kept, told_of
from hasten.pipelines.tune.text_goal import TextGoal
from hasten.recipe import Recipe
from hasten.report_diffusion import TextDiffusionReport
from hasten.stamp import Stamp

SAME = ("weights", "tokenizer", "hardware")
"""What of a stamp must be as it is here. The length is known when a call begins."""

SEQUENTIAL = "so texts are decoded one token after the other, which saves nothing (hasten tune makes a recipe)"


def fitting_texts(pipe: TextPipeline, budget: Budget) -> Found:
    """The kept recipes that were measured on this model and tokenizer, here, within a budget that is at least as strict, fastest
    first. Reads the weights only where anything is kept. Raises `UsageError` for a budget that is not about texts."""
    goal, files = TextGoal.read(budget), files_kept()
    if not files:
        return Found((), f"no tuned recipe is kept here, {SEQUENTIAL}")
    here = of_text(pipe.model, pipe.tokenizer)
    reading = read_kept(files, here["weights"])
    ready = [recipe for recipe in reading.recipes if recipe.tuned is not None and _fits(recipe.tuned, here, goal)]
    if not ready:
        return Found((), f"none of the tuned recipes kept here is for this model and {goal}, {SEQUENTIAL}", reading.skipped)
    ready.sort(key=lambda recipe: (recipe.tuned.speedup or 0.0) if recipe.tuned else 0.0, reverse=True)
    return Found(tuple(ready), told_of(ready[0]), reading.skipped)


def _fits(stamp: Stamp, here: Mapping[str, Any], wanted: TextGoal) -> bool:
    if any(getattr(stamp, name) != here[name] for name in SAME) or stamp.speedup is None or stamp.kept is None:
        return False
    try:
        measured = TextGoal.read(stamp.budget)
    except HastenError:  # of pictures
        return False
    return measured.limit >= wanted.limit and measured.met(stamp.kept)


class TextBudgetSession(TextDiffusionSession):
    """A session within a budget. Each call has the fastest kept recipe that was tuned for its number of tokens."""

    def __init__(self, pipe: TextPipeline, budget: Budget, limits: Limits | None = None) -> None:
        found = fitting_texts(pipe, budget)
        self.ready, refused = _fitted(pipe, found)
        self.online = pipe.fitted(PLAIN)
        self.told = f"no kept recipe can be used, {SEQUENTIAL}" if found.ready and not self.ready else found.told
        self.notes = [sentence for sentence in (*refused, found.skipped) if sentence]
        super().__init__(pipe, self.ready[0] if self.ready else self.online, limits)

    def asked(self, length: int | None) -> Recipe:
        """The recipe for this call; the report says which it was."""
        self.recipe = next((each for each in self.ready if each.tuned is not None and each.tuned.length == length), self.online)
        if self.recipe is not self.online:
            self.told = told_of(self.recipe)
        elif self.ready:
            lengths = ", ".join(str(each.tuned.length) for each in self.ready if each.tuned is not None)
            self.told = f"this call asks for {length} tokens (tuned at {lengths}), {SEQUENTIAL}"
        return self.recipe

    def report(self) -> TextDiffusionReport:
        """What the generations so far cost, and which recipe the last of them had."""
        whole = super().report()
        unmet = [f"Budget: {self.told}."] if self.recipe is self.online else []
        return replace(whole, extras={**whole.extras, "budget": self.told}, notes=[*whole.notes, *self.notes, *unmet])


def _fitted(pipe: TextPipeline, found: Found) -> tuple[list[Recipe], list[str]]:
    """The recipes as this model takes them, and a sentence for each that it does not."""
    ready, refused = [], []
    for recipe in found.ready:
        try:
            ready.append(pipe.fitted(recipe))
        except HastenError as error:
            refused.append(f"The tuned recipe that is kept for this budget cannot be used: {str(error).rstrip('.')}.")
    return ready, refused
