"""`hasten tune` for masked language models: prompts and a share of texts that must stay, a recipe comes out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hasten.cli.output import Output
from hasten.cli.places import writable
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.pipelines.tune.text_result import TextTuned

COLUMNS = {
    "recipe": "composition", "control": "control", "speedup": "speed-up", "of_sequential": "work", "nfe": "evaluations",
    "agreement": "as sequential", "between": "95 % interval", "exact_match": "right", "n": "texts", "note": "note",
}  # fmt: skip

TOGETHER = 8
"""Texts at once, where nobody says otherwise."""


@dataclass(frozen=True, slots=True)
class TextTask:
    """What is tuned. unfit: options that have no meaning for texts, by name; None and empty ones were not given."""

    model: str
    budget: str
    seconds: float
    out: Path
    study: Path
    call: Mapping[str, Any]
    batch: int
    seed: int
    device: str | None
    dtype: str | None
    revision: str | None
    unfit: Mapping[str, Any]
    keep: bool = True

    def run(self, prompts: Sequence[str], output: Output) -> TextTuned:
        """Check, open the model, search, and show what was found."""
        from hasten.pipelines.loading import silence
        from hasten.pipelines.text.diffusion import TextDiffusionPipeline
        from hasten.pipelines.tune.text_goal import TextGoal
        from hasten.pipelines.tune.text_run import tune_text

        goal = TextGoal.read(self.budget)
        for name, value in self.unfit.items():
            if value:
                raise UsageError(f"--{name} is for images and videos, and {self.model} writes texts. Leave it out.")
        held = len(set(prompts)) - -(-len(set(prompts)) // 3)
        if goal.needed is not None and held < goal.needed:
            output.warn(f"{held} of these prompts are held out, and {goal} is only shown by {goal.needed} without one other text.")
        silence()
        with writable(self.out.absolute().parent, self.study.absolute()):
            pipe = TextDiffusionPipeline.from_pretrained(self.model, device=self.device, dtype=self.dtype, revision=self.revision)
            try:
                found = tune_text(
                    pipe, prompts, self.budget, seconds=self.seconds, study=self.study, out=self.out, model=self.model,  # type: ignore[arg-type]
                    call=dict(self.call), batch=self.batch, seed=self.seed, keep=self.keep, say=output.note,
                )  # fmt: skip
            except KeyboardInterrupt:
                output.warn(f"Interrupted. The study is kept in {self.study}; this continues it:\n  hasten {shlex.join(sys.argv[1:])}")
                raise typer.Exit(130) from None
        self._show(found, output)
        output.finish([{"model": self.model, **row} for row in found.rows()], **document(found))
        return found

    def _show(self, found: TextTuned, output: Output) -> None:
        """The front, what held-out prompts said, and what else is to be known."""
        rows = [row | {"between": "{:.1%} to {:.1%}".format(*row["agreement_interval"]) if row["n"] else ""} for row in found.rows()]
        for where, title in (("tuning", "Front, on the tuning prompts"), ("held out", "On held-out prompts")):
            if part := [row for row in rows if row["where"] == where]:
                output.say(f"\n{title}")
                output.table(part, COLUMNS)
        output.say("")
        for sentence in found.sentences():
            output.say(sentence)
        if found.recipe is not None:
            output.say(f"The recipe is in {self.out}: hasten generate {self.model} ... --recipe {self.out}")


def document(found: TextTuned) -> dict[str, Any]:
    """What the JSON says besides the rows."""
    best, control, single = found.best, found.control, found.single
    return {
        "budget": str(found.goal), "best": best and best.measured.name, "shown": bool(best and best.shown(found.goal)),
        "needed": found.goal.needed, "fewer_steps": control and control.measured.name, "single": single and single.measured.name,
        "noise_floor": found.floor, "plain_seconds": found.plain_seconds, "spent": found.spent, "notes": found.why,
        "interactions": [
            {"axes": each.axes, "alone": each.alone, "together": each.together, "ratio": each.ratio} for each in found.interactions
        ],
        "given_up": [{"recipe": name, "why": why} for name, why in found.given_up],
        "recipe": found.recipe and found.recipe.model_dump(),
    }  # fmt: skip
