"""What a search for the fastest lossless decoding found: trials, the recipe with its stamp, and sentences."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any

from hasten.pipelines.bench.decode_ways import family
from hasten.pipelines.tune.fingerprint import of_text
from hasten.recipe import Drafting, FromFile, Recipe
from hasten.stamp import Stamp

LOSSLESS = "lossless"
"""The budget of such a stamp."""

ALWAYS = 1.05
"""By how much a pace that never stops drafting has to be faster than goodput."""

NETWORK = 1.02
"""By how much a drafter that runs a network has to be faster than one that only reads texts, and needs no memory."""

HARDLY = 1.05
"""Tokens per forward up to which drafts have next to no part in what was saved."""

FEW = 6
"""Held-out prompts below which a verdict says little of others."""


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
        """The fastest trials; those that draft in every round count as 1 / `ALWAYS` of what they are, those that run a network as
        1 / `NETWORK`."""
        return sorted(self.trials, key=self._worth, reverse=True)[:count]

    def _worth(self, trial: DecodeVerdict) -> float:
        always = getattr(trial.recipe.pace, "kind", "") != "goodput"
        return trial.speed(self.clock) / (ALWAYS if always else 1.0) / (1.0 if family(trial.recipe.draft) == "text" else NETWORK)

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
            f" held-out prompts, {min(self.batch, row['n'])} at once; {mode}."
        )
        return [verdict, *self._limits(row), *self.why]

    @staticmethod
    def _limits(row: dict[str, Any]) -> list[str]:
        """What a verdict does not say."""
        found = []
        if row["tokens_per_forward"] < HARDLY:
            found.append(
                "Drafts have next to no part in this: hasten's own loop has less to do for a token than transformers'. Such a gain is that"
                " of a small model, and shrinks with the size of the network."
            )
        if row["n"] < FEW:
            found.append(f"{row['n']} held-out prompts say little of others: name a dozen or more, such as you will use.")
        return found


def stamped(found: DecodeTuned, best: DecodeVerdict, model: Any, tokenizer: Any, name: str) -> Recipe:
    """The recipe with where it was measured."""
    here = of_text(model, tokenizer)
    stamp = Stamp(
        model=name, weights=here["weights"], tokenizer=here["tokenizer"], hardware=here["hardware"], versions=here["versions"],
        asked=(("batch", found.batch), ("max_new_tokens", found.new)), budget=LOSSLESS, prompts=best.row["n"], kept=1.0,
        speedup=best.speed(found.clock), date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )  # fmt: skip
    return best.recipe.model_copy(update={"name": "tuned", "tuned": stamp, "draft": _anywhere(best.recipe.draft)})


def _anywhere(draft: Drafting | None) -> Drafting | None:
    """The same with where its trained files are said in full, for the recipe will not lie where it was named."""
    if isinstance(draft, FromFile):
        return draft.model_copy(update={"path": str(draft.place.absolute())})
    skip = getattr(draft, "skip", None)
    if draft is not None and isinstance(skip, FromFile):
        return draft.model_copy(update={"skip": skip.model_copy(update={"path": str(skip.place.absolute())})})
    return draft
