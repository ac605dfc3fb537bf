"""What a study of texts found: the front, the recipe, its checks; as rows, as sentences, as a stamp."""

from __future__ import annotations

import datetime
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from hasten.pipelines.tune.text_goal import TextGoal
from hasten.pipelines.tune.text_study import TextTrial, text_front
from hasten.pipelines.tune.text_trials import TextMeasured
from hasten.pipelines.tune.text_verify import Losses, TextVerdict
from hasten.recipe import Recipe
from hasten.stamp import Stamp


@dataclass(slots=True)
class TextTuned:
    """best: the verdict on the recipe that was chosen, None where nothing kept the budget. recipe: it, with its stamp.

    trials: those that ran on every tuning prompt. given_up: (composition, reason) of the others. verdicts: on held-out prompts,
    in the order in which they were tried. control, single: the fastest that only writes the surest k slots per evaluation, and
    the fastest that changes one axis of sequential decoding, where they keep the budget on held-out prompts. late: which of these
    ("fewer_steps", "single") did not meet them, because the time was over. floor: share of its own texts that sequential
    decoding repeats when they are batched otherwise. plain_seconds: of a text of it. spent: seconds of all. why: what the
    reader must know, a sentence each.
    """

    goal: TextGoal
    trials: list[TextTrial]
    given_up: list[tuple[str, str]]
    verdicts: list[TextVerdict] = field(default_factory=list)
    best: TextVerdict | None = None
    recipe: Recipe | None = None
    control: TextVerdict | None = None
    single: TextVerdict | None = None
    interactions: list[Losses] = field(default_factory=list)
    late: dict[str, str] = field(default_factory=dict)
    floor: float | None = None
    plain_seconds: float = 0.0
    spent: float = 0.0
    why: list[str] = field(default_factory=list)

    @property
    def front(self) -> list[TextTrial]:
        """Trials that no other beats in speed and in equal texts, by rising speed-up."""
        return text_front(self.trials)

    def rows(self) -> list[dict[str, Any]]:
        """The front on the tuning prompts, and the held-out verdicts, with the keys of the design."""
        found = [self.row(trial.measured) | {"where": "tuning"} for trial in self.front]
        for verdict in self.verdicts:
            roles = {"fewer_steps": self.control, "single": self.single}
            role = next((role for role, of in roles.items() if of is verdict and of is not self.best), None)
            row = self.row(verdict.measured) | {"where": "held out", "agreement_interval": list(verdict.interval), "looks": verdict.looks}
            found.append(row | ({"control": role} if role else {}))
        return found

    def row(self, measured: TextMeasured) -> dict[str, Any]:
        """One row of a table. agreement: share of sequential decoding's texts; exact_match: of right answers, None where
        nobody knows them."""
        outcomes, known = measured.outcomes, measured.accuracy
        return {
            "recipe": measured.name,
            "speedup": measured.speedup if outcomes else None,
            "seconds": statistics.fmean(each.seconds for each in outcomes) if outcomes else None,
            "nfe": statistics.fmean(each.nfe for each in outcomes) if outcomes else None,
            "token_layers": statistics.fmean(each.layers for each in outcomes) if outcomes else None,
            "of_sequential": measured.work if outcomes else None,
            "agreement": measured.share if outcomes else None,
            "agreement_interval": list(measured.interval()) if outcomes else None,
            "exact_match": known[0] if known else None,
            "n": len(outcomes),
            "note": measured.why or None,
        }

    def sentences(self) -> list[str]:
        """The verdict, the controls and the interactions, for a reader; then `why`."""
        found = []
        if self.best is not None:
            found += [self._verdict(self.best), self._enough(self.best), *self._answers(self.best.measured)]
            found.append(self._beside("The surest k slots per evaluation", self.control, "fewer_steps"))
            found.append(self._beside("The best single method", self.single, "single"))
        if self.floor is not None:
            found.append(f"Sequential decoding itself repeats {self.floor:.1%} of its texts when they are batched otherwise: the noise floor.")
            if self.floor < self.goal.limit:
                found.append(f"Rounding alone changes more texts than {self.goal} allows: take a wider budget, or float32.")
        return found + [f"{pair}." for pair in self.interactions] + self.why

    def _verdict(self, verdict: TextVerdict) -> str:
        measured = verdict.measured
        low, high = verdict.interval
        looks = f", which allows for {verdict.looks} looks at them" if verdict.looks > 1 else ""
        return (
            f"{measured.name}: {measured.speedup:.2f}x in seconds, {measured.work:.1%} of the work;"
            f" {measured.same} of {len(measured.outcomes)} held-out texts are sequential decoding's"
            f" (95 % interval {low:.1%} to {high:.1%}{looks})."
        )

    def _enough(self, verdict: TextVerdict) -> str:
        """What the prompts at hand can show."""
        goal, count = self.goal, len(verdict.measured.outcomes)
        if verdict.shown(goal):
            return f"So the prompts show that it keeps {goal}."
        if goal.needed is None:
            return f"No number of prompts shows {goal}; only a lossless recipe (drafts, an exact cache) has it by construction."
        if count < goal.needed:
            total = math.ceil(1.5 * goal.needed)
            return (
                f"That keeps {goal}, but {count} prompts cannot show it: it takes {goal.needed} without one other text. Give"
                f" {total} prompts, of which two in three are held out, and the time for them."
            )
        return f"That keeps {goal} among these prompts, and they do not exclude that it is less in truth. Give more prompts to be surer."

    def _answers(self, measured: TextMeasured) -> list[str]:
        known = measured.accuracy
        return [] if known is None else [f"Right answers: {known[0]:.1%}, sequential decoding {known[1]:.1%}."]

    def _beside(self, what: str, other: TextVerdict | None, role: str) -> str:
        assert self.best is not None
        if role in self.late:
            return f"{what} ({self.late[role]}): the time was over before it met the held-out prompts."
        if other is None:
            return f"{what}: none that was tried keeps {self.goal} and saves time."
        if other is self.best:
            return f"{what} is what was chosen: no composition was faster within the budget."
        ratio = self.best.measured.speedup / other.measured.speedup
        return f"{what} ({other.measured.name}) keeps it at {other.measured.speedup:.2f}x: the composition is {ratio:.2f} times as fast."


def text_stamped(verdict: TextVerdict, goal: TextGoal, here: dict[str, Any], model: str) -> Recipe:
    """The verdict's recipe with where and how it was measured."""
    measured = verdict.measured
    stamp = Stamp(
        model=model, budget=str(goal), prompts=len(measured.outcomes), kept=round(measured.share, 4),
        speedup=round(measured.speedup, 3), worst=round(verdict.interval[0], 4),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(), **here,
    )  # fmt: skip
    return verdict.trial.recipe.model_copy(update={"name": f"tuned for {goal}", "tuned": stamp})
