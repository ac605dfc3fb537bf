"""What one `accelerate` did to a language model's decoding: tokens per forward, who guessed them, where the time went, and
whether the texts are still the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from hasten.recipe import Recipe
from hasten.report_forms import Traced, fact_lines, installed_versions, strict
from hasten.rounds import Round
from hasten.trace import Trace


@dataclass
class DecodeReport(Traced):
    """The account of a whole session. `print` it, `save` it, or read its properties.

    model: class of the model. calls: "drafted" and "plain" -> calls of generate. verifier, lossless: kind of the verifier,
    and whether it keeps the model's law. lead: smallest distance of a written token's logit to the next best, where tokens
    were not sampled; None where all were. forgets: what the cache beside the drafts does not keep or read as it was, in words;
    "" where it is all there. hardware, versions: names to values. extras: what the caller adds.
    """

    trace: Trace
    recipe: Recipe | None = None
    model: str = ""
    calls: Mapping[str, int] = field(default_factory=dict)
    verifier: str = ""
    lossless: bool = True
    lead: float | None = None
    forgets: str = ""
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.versions = self.versions or installed_versions()

    # --- numbers ----------------------------------------------------------------------------------

    @property
    def rounds(self) -> list[Round]:
        """All forwards behind prompts, in order."""
        return self.trace.rounds

    @cached_property
    def written(self) -> int:
        """Tokens written by these forwards; the one behind each prompt comes from reading the prompt."""
        return sum(sum(each.written) for each in self.rounds)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that a row gains by a forward, over all forwards in which it was not finished; 1.0 is plain decoding."""
        rows = sum(each.rows for each in self.rounds)
        return self.written / rows if rows else 1.0

    @property
    def computed_fraction(self) -> float:
        """Forwards over those that plain decoding takes, row by row, 0 to 1."""
        return 1 / self.tokens_per_forward if self.written else 1.0

    @property
    def drafters(self) -> dict[str, tuple[int, int]]:
        """Drafter -> nodes that the model read, and nodes that were accepted."""
        return _together((name, drafted, accepted) for each in self.rounds for name, drafted, accepted in each.sources)

    @property
    def depths(self) -> dict[int, tuple[int, int]]:
        """Depth in the tree, from 1 -> nodes that the model read there, and nodes that were accepted."""
        found = _together((at, *pair) for each in self.rounds for at, pair in enumerate(each.depths, 1))
        return dict(sorted(found.items()))

    @property
    def seconds(self) -> dict[str, float]:
        """Part of a round -> seconds, over all rounds."""
        return {part: sum(getattr(each, part) for each in self.rounds) for part in ("draft", "verify", "commit")}

    @property
    def exactness(self) -> str:
        """What the texts are, compared with the model's own."""
        if not self.lossless:
            return f"lossy: {self.verifier} accepts drafts that the model would not write"
        if self.forgets:
            return f"lossy: the cache {self.forgets}; drafts are verified by the model that reads what is left"
        if self.lead is None:
            return "lossless in distribution"
        return f"exact; the closest written token was ahead of the next by {self.lead:.3g} in logits"

    @property
    def warnings(self) -> list[str]:
        """What the reader must know before the numbers."""
        if not self.calls:
            return [*self.trace.notes, "No call was recorded: generate() never ran while the model was accelerated."]
        return self.trace.notes + self.inert

    @property
    def inert(self) -> list[str]:
        """A sentence where drafts did nothing."""
        if not self.rounds or self.written > sum(each.rows for each in self.rounds):
            return []
        drafted = sum(sum(each.drafted) for each in self.rounds)
        if not drafted:
            asked = sum(each.asked > 0 for each in self.rounds)
            why = "the drafter found nothing to propose" if asked else "the pace found that no draft pays here"
            return [f"The recipe's drafts did nothing: there were none in {len(self.rounds)} forwards; {why}."]
        return [f"The recipe's drafts did nothing: none of {drafted:,} was accepted."]

    # --- forms ------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """Readable text: warnings first, then the numbers."""
        lines = self.opening(self.model)
        made = ", ".join(f"{number} {how}" for how, number in self.calls.items()) or "none"
        lines += [
            f"  calls       {made}",
            f"  texts       {self.exactness}",
            f"  tokens      {self.written:,} by {len(self.rounds):,} forwards: {self.tokens_per_forward:.2f} per forward of a row",
        ]
        lines += [f"  {name:<11} {_rate(pair)}" for name, pair in self.drafters.items()]
        lines += [f"  depth {at:<5} {_rate(pair)}" for at, pair in self.depths.items()]
        if self.rounds:
            whole = sum(self.seconds.values())
            parts = ", ".join(f"{part} {value / max(whole, 1e-12):.0%}" for part, value in self.seconds.items())
            lines.append(f"  time        {whole:.3g} s: {parts}")
        return "\n".join(lines + fact_lines({"hardware": self.hardware, "versions": self.versions}))

    def to_dict(self) -> dict[str, Any]:
        """Plain, strict-JSON data."""
        data = {
            "recipe": self.recipe.model_dump() if self.recipe else None,
            "model": self.model,
            "calls": self.calls,
            "exactness": self.exactness,
            "lossless": self.lossless,
            "lead": self.lead,
            "written": self.written,
            "tokens_per_forward": self.tokens_per_forward,
            "computed_fraction": self.computed_fraction,
            "drafters": self.drafters,
            "depths": self.depths,
            "seconds": self.seconds,
            "warnings": self.warnings,
            "notes": self.notes,
            "hardware": self.hardware,
            "versions": self.versions,
            "extras": self.extras,
            "rounds": [asdict(each) for each in self.rounds],
        }
        return {key: strict(value) for key, value in data.items()}

    def to_html(self) -> str:
        """One self-contained page; nothing is loaded from anywhere."""
        from hasten.report_decode_page import render

        return render(self)


def _together(each: Any) -> dict[Any, tuple[int, int]]:
    found: dict[Any, tuple[int, int]] = {}
    for name, drafted, accepted in each:
        before = found.get(name, (0, 0))
        found[name] = (before[0] + drafted, before[1] + accepted)
    return found


def _rate(pair: tuple[int, int]) -> str:
    return f"{pair[1]:,} of {pair[0]:,} drafts accepted ({pair[1] / max(pair[0], 1):.0%})"
