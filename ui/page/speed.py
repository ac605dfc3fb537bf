"""One slider between fidelity and speed: recipes in their order, with words for people who know none of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Level:
    """One position. recipe: its name. label: one or two words. sentence: what it does."""

    recipe: str
    label: str
    sentence: str


PICTURES = (
    Level("plain", "Exact", "Nothing is left out."),
    Level("auto:psnr=40", "Careful", "Leaves out only what it predicts to within a small error, measured as it goes."),
    Level("balanced", "Balanced", "Skips work that barely changes the picture: about a quarter of it is done."),
    Level("fast:student=false", "Fast", "Does about a sixth of the work."),
    Level("fast", "Four calls", "A student of the model draws in four calls: as good a picture, but another one."),
    Level("fastest", "One call", "A student of the model draws in one single call: another picture."),
)
"""The last two where hasten has a student of the model."""

TEXTS = (
    Level("plain", "Exact", "The model's own way of writing."),
    Level("text-exact", "Checked", "Guesses several tokens ahead and keeps those that the model confirms."),
    Level("text-balanced", "Balanced", "Writes down at once every token that the model is sure of."),
    Level("text-fast", "Fast", "Is content with less certainty."),
)

USUAL = 2
"""Where the slider stands at first: balanced."""


def levels(model: str, kind: str) -> tuple[Level, ...]:
    """The positions for a model. kind: of its card."""
    if kind == "text":
        return TEXTS
    from hasten.pipelines.students import calls_of, students_of

    calls = {calls_of(student) for student in students_of(model)}
    return tuple(level for level in PICTURES if level.recipe not in ("fast", "fastest") or {"fast": 4, "fastest": 1}[level.recipe] in calls)


def place_of(recipe: str, among: tuple[Level, ...]) -> int | None:
    """The position of a recipe; None where it has none."""
    return next((at for at, level in enumerate(among) if level.recipe == recipe), None)
