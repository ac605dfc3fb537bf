"""What a study found: the front, the recipe, its checks; as JSON, as YAML, as text."""

from __future__ import annotations

import datetime
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from hasten.pipelines.tune.goal import Goal
from hasten.pipelines.tune.study import Trial, front
from hasten.pipelines.tune.trials import Measured
from hasten.pipelines.tune.verify import Interaction, Verdict, interval
from hasten.recipe import Recipe
from hasten.stamp import Stamp


@dataclass(slots=True)
class Tuned:
    """best: the verdict on the recipe that was chosen, None where nothing kept the budget. recipe: it, with its stamp.

    trials: those that ran on every tuning sample. given_up: (composition, reason) of the others. verdicts: on held-out samples, in the order in which they were tried.
    control: the fastest fewer-steps run that keeps the budget on held-out samples. noise_floor: PSNR of another seed.
    plain_seconds: of a plain run. spent: seconds of the search. why: what the reader must know, a sentence each.
    """

    goal: Goal
    trials: list[Trial]
    verdicts: list[Verdict]
    best: Verdict | None = None
    recipe: Recipe | None = None
    control: Verdict | None = None
    interactions: list[Interaction] = field(default_factory=list)
    peers: list[Measured] = field(default_factory=list)
    given_up: list[tuple[str, str]] = field(default_factory=list)
    noise_floor: float | None = None
    plain_seconds: float = 0.0
    spent: float = 0.0
    why: list[str] = field(default_factory=list)

    @property
    def front(self) -> list[Trial]:
        """Trials that no other beats in speed and worst quality, by rising speed-up."""
        return front(self.trials, self.goal)

    def sentences(self) -> list[str]:
        """The verdict, the controls and the interactions, for a reader; then `why`."""
        found, goal = [], self.goal
        if self.best is not None:
            measured, row = self.best.measured, self.row(self.best.measured)
            values = [value for each in measured.outcomes if (value := each.value(goal)) is not None]
            found.append(
                f"{measured.name}: {measured.speedup:.2f}x on {len(measured.outcomes)} held-out prompts, of which {measured.kept(goal):.0%}"
                f" keep {goal}; median {goal.told(statistics.median(values))}{self._between(row)}, worst"
                f" {goal.told(measured.worst(goal))}."
            )
            if self.noise_floor is not None:
                found.append(f"Another seed of the same prompt is {self.noise_floor:.1f} dB from the plain run: the noise floor.")
            found.append(self._beside_control())
        return found + [each.told() for each in self.interactions] + self.why

    def _between(self, row: dict[str, Any]) -> str:
        ends = row["goal_interval"]
        return f" (95 % interval {self.goal.told(ends[0])} to {self.goal.told(ends[1])})" if ends else ""

    def _beside_control(self) -> str:
        assert self.best is not None
        if self.control is None:
            return f"Fewer steps alone did not keep {self.goal} in any run that was tried."
        if self.control.trial.number == self.best.trial.number:
            return "That is fewer steps of a solver and nothing else."
        ratio = self.best.measured.speedup / self.control.measured.speedup
        return f"Fewer steps alone ({self.control.measured.name}) keep it at {self.control.measured.speedup:.2f}x: the composition is {ratio:.2f} times as fast."

    def rows(self) -> list[dict[str, Any]]:
        """The front, the held-out verdicts and the peers, with the keys of the design."""
        found = [self.row(trial.measured) | {"where": "tuning"} for trial in self.front]
        found += [self.row(verdict.measured) | {"where": "held out"} for verdict in self.verdicts]
        if self.control is not None and self.control not in self.verdicts:
            found.append(self.row(self.control.measured) | {"where": "held out", "control": "fewer_steps"})
        return found + [self.row(peer) | {"where": "held out", "control": f"peer:{peer.name.partition(' ')[0]}"} for peer in self.peers]

    def row(self, measured: Measured) -> dict[str, Any]:
        """One row of a table; None for what is infinite or not known."""
        values = [value for each in measured.outcomes if (value := each.value(self.goal)) is not None]
        finite = [value for value in values if math.isfinite(value)]
        psnrs = [each.psnr for each in measured.outcomes if each.psnr is not None]
        ends = interval(finite)
        nfe = [each.nfe for each in measured.outcomes if each.nfe is not None]
        held = [each.bytes_held for each in measured.outcomes if each.bytes_held is not None]
        errors = [each.latent_error for each in measured.outcomes if each.latent_error is not None]
        return {
            "recipe": measured.name,
            "speedup": measured.speedup if measured.outcomes else None,
            "seconds": statistics.median(each.seconds for each in measured.outcomes) if measured.outcomes else None,
            "nfe": statistics.median(nfe) if nfe else None,
            "bytes_held": max(held) if held else None,
            "psnr_median": statistics.median(psnrs) if psnrs else None,
            "psnr_worst": min(psnrs) if psnrs else None,
            "latent_error": statistics.median(errors) if errors else None,
            "goal_median": statistics.median(finite) if finite else None,
            "goal_interval": list(ends) if ends else None,
            "goal_worst": value if math.isfinite(value := measured.worst(self.goal)) else None,
            "kept": measured.kept(self.goal),
            "n": len(measured.outcomes),
            "note": measured.why or None,
        }


def stamped(verdict: Verdict, goal: Goal, here: dict[str, Any], model: str) -> Recipe:
    """The verdict's recipe with where and how it was measured."""
    measured = verdict.measured
    median, worst = measured.median(goal), measured.worst(goal)
    stamp = Stamp(
        model=model, budget=str(goal), prompts=len(measured.outcomes), kept=round(measured.kept(goal), 4),
        speedup=round(measured.speedup, 3), worst=round(worst, 4) if math.isfinite(worst) else None,
        median=round(median, 4) if median is not None and math.isfinite(median) else None,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(), **here,
    )  # fmt: skip
    return verdict.trial.recipe.model_copy(update={"name": f"tuned for {goal}", "tuned": stamp})
