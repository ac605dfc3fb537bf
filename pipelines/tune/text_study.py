"""The search for texts: as for pictures, with three objectives, and with numbers for what was given up early, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from hasten.pipelines.tune.study import Search, Tried
from hasten.pipelines.tune.text_space import TextSpace, first_guesses
from hasten.pipelines.tune.text_trials import TextBench, TextMeasured

TextTrial = Tried[TextMeasured]


class TextStudy(Search[TextMeasured]):
    """A search of text diffusion. Objectives: `TextMeasured.values`."""

    objectives: ClassVar[int] = 3

    def search(
        self, bench: TextBench, space: TextSpace, seconds: float, told: Callable[[TextTrial], None] = lambda _: None
    ) -> None:
        """Run trials until `seconds` are spent, the first guesses first."""
        self.run(bench, space, seconds, first_guesses(space), told)

    def _values(self, measured: TextMeasured) -> list[float] | None:
        return measured.values(self.goal)

    def _read(self, name: str, outcomes: Sequence[dict[str, Any]], why: str = "") -> TextMeasured:
        return TextMeasured.of(name, outcomes, why)


def text_front(trials: Sequence[TextTrial]) -> list[TextTrial]:
    """Those that no other beats in seconds and in the share of equal texts, by rising speed-up; of equals, the one with less work."""
    kept: list[TextTrial] = []
    for trial in sorted(trials, key=lambda each: (-each.measured.speedup, each.measured.work)):
        if not kept or trial.measured.share > kept[-1].measured.share:
            kept.append(trial)
    return kept[::-1]
