"""What one `accelerate` did to a language model: how much of its attention was read, in which phase, at which layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hasten.recipe import Recipe
from hasten.report_attention import DENSE
from hasten.report_forms import Traced, fact_lines, installed_versions, readable_bytes, strict
from hasten.trace import Reading, Trace

PHASES = {"prompt": "prompts", "cache": "new tokens"}
"""Phase -> what reads in it."""


@dataclass
class TextReport(Traced):
    """The account of a whole session. `print` it, `save` it, or read its properties.

    model: class of the model. acts: phases that the recipe should make sparse. idle: phase -> why its calls were dense,
    where that is known. hardware, versions: names to values. extras: what the caller adds (prompt, seed, ...).
    """

    trace: Trace
    recipe: Recipe | None = None
    model: str = ""
    acts: tuple[str, ...] = ()
    idle: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.versions = self.versions or installed_versions()

    # --- numbers ----------------------------------------------------------------------------------

    @property
    def rows(self) -> list[Reading]:
        """What was read where: one row for each layer and phase."""
        return self.trace.readings

    @property
    def phases(self) -> dict[str, Reading]:
        """Phase -> its layers together (site "", layer -1); phases without a call are left out."""
        found = {phase: [row for row in self.rows if row.phase == phase] for phase in PHASES}
        return {phase: together(rows) for phase, rows in found.items() if rows}

    @property
    def attention(self) -> Reading | None:
        """All calls together; None where there were none."""
        return together(self.rows) if self.rows else None

    @property
    def computed_fraction(self) -> float:
        """Pairs of a query and a key that were computed, over those that the model computes by itself, 0 to 1; 1.0 when
        nothing was recorded. Attention's pairs alone: the rest of the network is always computed."""
        return self.attention.density if self.attention else 1.0

    @property
    def warnings(self) -> list[str]:
        """What the reader must know before the numbers: notes of the session, and phases that did nothing."""
        found = list(self.trace.notes)
        if not self.rows:
            return [*found, "No call was recorded: the model's attention never ran while it was accelerated."]
        return found + self.inert + self._broken()

    @property
    def inert(self) -> list[str]:
        """One sentence for each phase in which the recipe did nothing, or saved nothing."""
        found = []
        for phase in self.acts:
            whole = self.phases.get(phase)
            if whole is None:
                found.append(f"The recipe's part for {PHASES[phase]} did nothing: there were none.")
            elif not whole.sparse:
                why = self.idle.get(phase, "the notes say why")
                found.append(f"The recipe's part for {PHASES[phase]} did nothing: all {whole.dense:,} calls were dense; {why}.")
            elif whole.saves_nothing:
                found.append(
                    f"The recipe's part for {PHASES[phase]} left out nothing: its sparse calls computed as many pairs as the"
                    " model's own attention. Take longer inputs, smaller windows or smaller blocks."
                )
        return found

    def _broken(self) -> list[str]:
        broken = [row for row in self.rows if row.recall is not None and not math.isfinite(row.recall)]
        return [f"Attention of {broken[0].site} ({broken[0].phase}) gave NaN. Do not trust this result."] if broken else []

    # --- forms ------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """Readable text: warnings first, then the numbers, then one character per layer."""
        lines = self.opening(self.model)
        lines += [f"  {PHASES[phase]:<11} {sentence(whole)}" for phase, whole in self.phases.items()]
        if self.bytes_held:
            lines.append(f"  held        {readable_bytes(self.bytes_held)} at most, beside the model's own cache")
        lines += fact_lines({"hardware": self.hardware, "versions": self.versions})
        if self.rows:
            lines.append(f"  attention read, one character per layer ({DENSE} everything, else tenths of the pairs):")
            lines += [f"  {PHASES[phase]:<11} {self._marks(phase)}" for phase in self.phases]
        return "\n".join(lines)

    def _marks(self, phase: str) -> str:
        rows = {row.layer: row for row in self.rows if row.phase == phase}
        return "".join(_mark(rows.get(layer)) for layer in range(max(rows) + 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain, strict-JSON data: numbers that are not finite become None."""
        data = {
            "recipe": self.recipe.model_dump() if self.recipe else None,
            "model": self.model,
            "computed_fraction": self.computed_fraction,
            "bytes_held": self.bytes_held,
            "warnings": self.warnings,
            "notes": self.notes,
            "hardware": self.hardware,
            "versions": self.versions,
            "extras": self.extras,
            "phases": {phase: _plain(whole) for phase, whole in self.phases.items()},
            "rows": [asdict(row) | _shares(row) for row in self.rows],
        }
        return {key: strict(value) for key, value in data.items()}

    def to_html(self) -> str:
        """One self-contained page; nothing is loaded from anywhere."""
        from hasten.report_text_page import render

        return render(self)


def together(rows: Iterable[Reading]) -> Reading:
    """Several rows as one; calls count alike in the mean of `recall`."""
    group = list(rows)
    known = [row for row in group if row.recall is not None]

    def total(of: Callable[[Reading], float]) -> float:
        return math.fsum(map(of, group))

    weight = sum(row.sparse for row in known)
    return Reading(
        "", -1, group[0].phase if len({row.phase for row in group}) == 1 else "",
        sum(row.sparse for row in group), sum(row.dense for row in group),
        total(lambda row: row.read), total(lambda row: row.all), total(lambda row: row.rest),
        math.fsum((row.recall or 0.0) * row.sparse for row in known) / weight if weight else None,
        min((row.lowest for row in known if row.lowest is not None), default=None),
    )  # fmt: skip


def sentence(whole: Reading) -> str:
    """What a phase read, in words."""
    if whole.of_sparse is None:
        return f"dense in all of {whole.calls:,} calls"
    words = f"{whole.sparse:,} of {whole.calls:,} calls sparse; they read {whole.of_sparse:.1%} of their pairs"
    words += f", all together {whole.density:.1%}" if whole.dense else ""
    if whole.recall is None:
        return words + "; how much of the mass is not known"
    return words + f"; {whole.recall:.1%} of the mass by estimate, at least {whole.lowest:.1%}"


def _mark(row: Reading | None) -> str:
    if row is None:
        return " "
    return str(min(9, int(10 * row.density))) if row.sparse else DENSE


def _shares(row: Reading) -> dict[str, float | None]:
    return {"density": row.density, "of_sparse": row.of_sparse}


def _plain(whole: Reading) -> dict[str, Any]:
    """A phase as data, without a place of its own."""
    return {key: value for key, value in asdict(whole).items() if key not in ("site", "layer", "phase")} | _shares(whole)
