"""What a search for the fastest lossless decoding found: trials, the recipe with its stamp, and sentences."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any

from hasten.pipelines.tune.fingerprint import of_text
from hasten.recipe import Recipe
from hasten.stamp import Stamp

LOSSLESS = "lossless"
"""The budget of such a stamp."""

ALWAYS = 1.05
"""By how much a pace that never stops drafting has to be faster than goodput."""


@dataclass(frozen=True, slots=True)
class DecodeVerdict:
    """One recipe on the tuning or on the held-out prompts. row: as `hasten bench decode` has it."""

    name: str
    recipe: Recipe
    row: dict[str, Any]

    def speed(self, clock: str) -> float:
        """Of plain decoding's; 0.0 where it could not run."""
        return float(self.row.get(clock) or 0.0)


@dataclass(slots=True)
class DecodeTuned:
    """clock: which ratio was searched, "speedup" of the wall or "speedup_processor". batch, new, sampled: of the calls.
    trials: on the tuning prompts. given_up: (name, reason). verdicts: on held-out ones. best: the verdict on what was chosen;
    None where plain decoding is fastest. recipe: it, with its stamp. spent: seconds. why: what the reader must know."""

    clock: str
    batch: int
    new: int
    sampled: bool
    trials: list[DecodeVerdict] = field(default_factory=list)
    given_up: list[tuple[str, str]] = field(default_factory=list)
    verdicts: list[DecodeVerdict] = field(default_factory=list)
    best: DecodeVerdict | None = None
    recipe: Recipe | None = None
    spent: float = 0.0
    why: list[str] = field(default_factory=list)

    def fastest(self, count: int) -> list[DecodeVerdict]:
        """The fastest trials; those that draft in every round count as 1 / `ALWAYS` of what they are."""
        return sorted(self.trials, key=self._worth, reverse=True)[:count]

    def _worth(self, trial: DecodeVerdict) -> float:
        always = getattr(trial.recipe.pace, "kind", "") != "goodput"
        return trial.speed(self.clock) / (ALWAYS if always else 1.0)

    def rows(self) -> list[dict[str, Any]]:
        """The trials by falling speed, then what held-out prompts said, with the keys of the design."""
        ordered = sorted(self.trials, key=lambda trial: -trial.speed(self.clock))
        return [each.row | {"where": where} for where, part in (("tuning", ordered), ("held out", self.verdicts)) for each in part]

    def sentences(self) -> list[str]:
        """The verdict, for a reader; then `why`."""
        if self.best is None:
            return [f"None of {len(self.trials)} lossless ways of drafting is faster than plain decoding here.", *self.why]
        row, unit = self.best.row, "in seconds" if self.clock == "speedup" else "in processor time"
        mode = "drawn tokens follow the model's law" if self.sampled else "texts are plain decoding's, token for token"
        verdict = (
            f"{self.best.name}: {row[self.clock]:.2f}x {unit}, {row['tokens_per_forward']:.2f} tokens per forward on {row['n']}"
            f" held-out prompts in batches of {self.batch}; {mode}."
        )
        return [verdict, *self.why]


def stamped(found: DecodeTuned, best: DecodeVerdict, model: Any, tokenizer: Any, name: str) -> Recipe:
    """The recipe with where it was measured."""
    here = of_text(model, tokenizer)
    stamp = Stamp(
        model=name, weights=here["weights"], tokenizer=here["tokenizer"], hardware=here["hardware"], versions=here["versions"],
        asked=(("batch", found.batch), ("max_new_tokens", found.new)), budget=LOSSLESS, prompts=best.row["n"], kept=1.0,
        speedup=best.speed(found.clock), date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )  # fmt: skip
    return best.recipe.model_copy(update={"name": "tuned", "tuned": stamp})
