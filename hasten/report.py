"""What one `accelerate` did: how much work was left out, where, by which numbers, and what it held.

Everything is counted from the trace, in blocks, as `hasten.bands` defines it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Literal, get_args

from hasten import report_attention
from hasten.bands import Band, bands_of, network_of
from hasten.errors import UsageError
from hasten.recipe import Recipe
from hasten.report_attention import Read
from hasten.report_forms import Traced, fact_lines, installed_versions, readable_bytes, strict
from hasten.trace import Action, Attended, Run, Trace

ACTIONS: tuple[Action, ...] = get_args(Action)
MARKS: dict[Action, str] = {"compute": "#", "reuse": "=", "forecast": "~", "skip": "."}
_DOES: dict[str, set[Action]] = {"reuse": {"reuse", "forecast"}, "guidance": {"skip"}}
"""Axis -> the actions by which it shows that it did something."""
_LINE = 100
"""Steps per row of the terminal timeline."""


@dataclass
class Report(Traced):
    """The account of one run (the last, by default), of the run with a given index, or of "all".

    hardware, versions: names to values. extras: what the caller adds; `media` ([{"label", "path"}]) and
    `metrics` ({name: value} or a list of such rows) are drawn side by side in the page, other plain values
    (prompt, seed, model) are listed. `print` it, `save` it, or read its properties. It counts the trace once,
    when first asked. Raises `UsageError` for a run that does not exist.
    """

    trace: Trace
    recipe: Recipe | None = None
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    run: int | Literal["all"] | None = None

    def __post_init__(self) -> None:
        self.versions = self.versions or installed_versions()
        known = [run.index for run in self.trace.runs]
        if self.run not in (None, "all", *known):
            raise UsageError(
                f"There is no run {self.run!r}; the runs are {known}, or 'all'. Leave it out for the last."
            )

    def of(self, run: int | Literal["all"]) -> Report:
        """The same report about another run, or about all of them together."""
        return replace(self, run=run)

    # --- numbers ----------------------------------------------------------------------------------

    @property
    def runs(self) -> list[Run]:
        """The runs this report is about, oldest first."""
        if self.run is None:
            return self.trace.runs[-1:]
        return [run for run in self.trace.runs if self.run in ("all", run.index)]

    @property
    def scope(self) -> str:
        """Which runs this is about, in words."""
        chosen = ", ".join(str(run.index) for run in self.runs) or "none"
        return f"run {chosen} ({len(self.trace.runs)} recorded)"

    @cached_property
    def bands(self) -> list[Band]:
        """All work of the chosen runs, in order of run, step, branch, site, block."""
        return [band for run in self.runs for band in bands_of(self.trace, run.index)]

    @property
    def totals(self) -> dict[Action, float]:
        """action -> blocks; fractional where only a part of a batch was evaluated."""
        return {action: math.fsum(band.work(action) for band in self.bands) for action in ACTIONS}

    @property
    def computed_fraction(self) -> float:
        """Computed block work over all block work, 0 to 1; 1.0 when nothing was recorded."""
        totals = self.totals
        return totals["compute"] / sum(totals.values()) if self.bands else 1.0

    @property
    def evaluations(self) -> int:
        """Network evaluations the loop asked for."""
        return len(self._shares)

    @property
    def nfe(self) -> float:
        """Network evaluations that were really computed; fractional where only some of the blocks ran."""
        return math.fsum(self._shares)

    @cached_property
    def _shares(self) -> list[float]:
        """Computed share of each evaluation (one network on one branch at one step)."""
        shares = []
        for _, group in groupby(
            self.bands, lambda band: (band.run, band.step, band.branch, network_of(band.site))
        ):
            bands = list(group)
            shares.append(sum(b.work("compute") for b in bands) / sum(b.num for b in bands))
        return shares

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Blocks per action for every run, step, branch and site: what was skipped where."""
        rows = []
        for key, group in groupby(self.bands, lambda band: (band.run, band.step, band.branch, band.site)):
            row: dict[str, Any] = dict(zip(("run", "step", "branch", "site"), key, strict=True))
            row |= dict.fromkeys(ACTIONS, 0)
            for band in group:
                for action in ACTIONS:
                    row[action] += band.work(action)
            rows.append(row)
        return rows

    @property
    def attended(self) -> list[Attended]:
        """What every attention call of the chosen runs read, where a recipe makes them sparse."""
        chosen = {run.index for run in self.runs}
        return [call for call in self.trace.attention if call.run in chosen]

    @property
    def attention(self) -> Read | None:
        """Density and recall of all these calls together; None where attention was left alone."""
        return report_attention.read_by(self.attended) if self.attended else None

    @property
    def estimated_error(self) -> dict[int, float]:
        """Run index -> relative error of the final latents that skipping is estimated to have caused; empty where no
        budget kept an account."""
        return {run.index: run.estimated_error for run in self.runs if run.estimated_error is not None}

    @property
    def seconds(self) -> dict[int, float]:
        """Run index -> wall seconds of that run."""
        return {run.index: run.seconds for run in self.runs}

    @property
    def warnings(self) -> list[str]:
        """What the reader must know before the numbers: notes of the run, and methods that did nothing."""
        found = list(self.trace.notes)
        if not self.bands:
            return [*found, "No decision was recorded: the model was never called while it was accelerated."]
        for run in self.runs:
            if not run.finished:
                last = max((band.step + 1 for band in self.bands if band.run == run.index), default=0)
                found.append(
                    f"Run {run.index} has not finished ({last} of {run.steps} steps); the numbers cover that part."
                )
        totals = self.totals
        axes = [axis for axis in _DOES if self.recipe is not None and axis in self.recipe.axes and axis not in self.trace.facts]
        idle = [axis for axis in axes if not any(totals[action] for action in self._does(axis))]
        if idle and self.computed_fraction == 1.0:
            found.append(
                f"This recipe skipped nothing: all {totals['compute']:,.0f} blocks were computed. {self._why_idle()}"
            )
        elif idle:
            found.append(f"The recipe's {' and '.join(idle)} part skipped nothing. {self._why_idle()}")
        if self.recipe is not None and self.recipe.attention is not None:
            found += self._attention_warnings()
        if totals["compute"] == 0:
            found.append("Nothing was computed: every evaluation was replaced. Do not trust this result.")
        return found

    def _does(self, axis: str) -> set[Action]:
        """The actions by which an axis of this recipe shows that it did something."""
        left_out = axis == "reuse" and self.recipe is not None and self.recipe.reuse is not None and self.recipe.reuse.leaves_out
        return _DOES[axis] | ({"skip"} if left_out else set())

    def _attention_warnings(self) -> list[str]:
        sparse = [call for call in self.attended if call.sparse]
        if not sparse:
            return ["The recipe's attention part did nothing: every attention call was dense. The notes say why."]
        broken = [call for call in sparse if call.recall is not None and not math.isfinite(call.recall)]
        if broken:
            return [f"{len(broken)} attention calls ({broken[0].site}, step {broken[0].step}) gave NaN. Do not trust this result."]
        if all(call.reads_all for call in sparse):
            return ["The recipe's attention part left out nothing: every sparse call read all pairs. Choose smaller blocks or windows."]
        return []

    def _why_idle(self) -> str:
        """How far the rule was from skipping, when it compared anything."""
        events = [band.event for band in self.bands if band.event is not None]
        pairs = [(e.signal, e.threshold) for e in events if e.signal is not None and e.threshold is not None]
        pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if not pairs:
            return "Check that it fits this model, its guidance and this number of steps."
        below = sum(signal < threshold for signal, threshold in pairs)
        if below:
            return (
                f"{below} signals were below their limit, but the rule's warm-up, tail or other guards computed anyway;"
                " take more steps or loosen them."
            )
        signal, threshold = min(pairs, key=lambda pair: pair[0] - pair[1])
        return f"The closest call was a signal of {signal:.4g} against a limit of {threshold:.4g}; raise the limit."

    # --- forms ------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """Readable text: warnings first, then the numbers, then one character per step."""
        totals = self.totals
        lines = self.opening(self.scope)
        lines += [f"  {label + ':':<11} {words}" for label, words in self.trace.facts.items()]
        lines += [
            f"  computed    {self.computed_fraction:.1%} of the block work, {self.nfe:.4g} of {self.evaluations} evaluations",
            f"  blocks      {', '.join(f'{action} {num:,.10g}' for action, num in totals.items())}",
            f"  seconds     {', '.join(f'{value:.3g}' for value in self.seconds.values()) or 'none'}",
            f"  cache held  {readable_bytes(self.bytes_held)} at most",
        ]
        if self.estimated_error:
            spent = ", ".join(f"{value:.2g}" for value in self.estimated_error.values())
            lines.append(f"  latents     estimated to be off by about {spent} of their size or less, from the forecasts' measured errors")
        lines += [f"  of that     {_levels(run.error_by_level)}" for run in self.runs if run.error_by_level]
        lines += report_attention.lines(self.attended)
        lines += fact_lines({"hardware": self.hardware, "versions": self.versions})
        if self.bands:
            legend = "  ".join(f"{mark} {action}" for action, mark in MARKS.items())
            lines += [f"  timeline, one character per step, most of its blocks:  {legend}", *self._timeline()]
        return "\n".join(lines)

    def _timeline(self) -> list[str]:
        lines = []
        by_row: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
        for row in self.rows:
            by_row.setdefault((row["run"], row["branch"], row["site"]), []).append(row)
        labels = {key: f"run {key[0]} branch {key[1]} {key[2]}" for key in by_row}
        width = max(map(len, labels.values()))
        for key, rows in by_row.items():
            marks = [" "] * (rows[-1]["step"] + 1)
            for row in rows:
                # On a tie the action that left work out is shown: it is the news.
                marks[row["step"]] = MARKS[max(reversed(ACTIONS), key=lambda action: row[action])]
            for start in range(0, len(marks), _LINE):
                label = labels[key] if start == 0 else f"from step {start}"
                lines.append(f"  {label:<{width}}  {''.join(marks[start : start + _LINE])}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain, strict-JSON data: numbers that are not finite become None."""
        chosen = {run.index for run in self.runs}
        whole = self.trace.to_dict()
        data = {
            "recipe": self.recipe.model_dump() if self.recipe else None,
            "computed_fraction": self.computed_fraction,
            "nfe": self.nfe,
            "evaluations": self.evaluations,
            "blocks": self.totals,
            "seconds": self.seconds,
            "bytes_held": self.bytes_held,
            "estimated_error": self.estimated_error,
            "warnings": self.warnings,
            "notes": self.notes,
            "hardware": self.hardware,
            "versions": self.versions,
            "extras": self.extras,
            "attention": report_attention.to_dict(self.attended),
            "structure": self.trace.structure,
            "facts": self.trace.facts,
            "runs": [run for run in whole["runs"] if run["index"] in chosen],
            "rows": self.rows,
            "events": [event for event in whole["events"] if event["run"] in chosen],
        }
        return {key: strict(value) for key, value in data.items()}

    def to_html(self) -> str:
        """One self-contained page; nothing is loaded from anywhere."""
        from hasten.report_html import render

        return render(self)


def _levels(errors: Mapping[str, float]) -> str:
    """What each level has spent; squares of the levels add up to the square of the whole."""
    return ", ".join(f"{level} {error:.2g}" for level, error in errors.items())
