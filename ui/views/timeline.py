"""What was computed and what stood in for it: steps against blocks, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from hasten.bands import Band, bands_of
from hasten.report import ACTIONS
from hasten.report_plot import draw_signals
from hasten.report_timeline import VERBS, draw_timeline, sparse_blocks, swatch
from hasten.trace import Action, Attended, Event, Run, Trace
from hasten.ui.views.markup import data, empty, seconds, share, text, view


def timeline(about: Mapping[str, Any]) -> str:
    """HTML of the last run of a report.

    about: `Report.to_dict()`, or its keys `runs`, `events`, `structure` and `attention`; optional `phases`
    ([{"name", "seconds"}], else what the events say), `title`, and `download` (name of the JSON file).
    """
    trace = trace_of(about)
    if not trace.runs or not trace.events:
        return empty("timeline", "Timeline", "No decision was recorded: nothing was accelerated in this run.")
    run = trace.runs[-1]
    bands = list(bands_of(trace, run.index))
    steps = max([run.steps, *(band.step + 1 for band in bands)])
    branches = sorted({band.branch for band in bands})
    pictures = "".join(_branch(trace, run, bands, steps, branch, len(branches) > 1) for branch in branches)
    warnings = "".join(f'<p class="hv-warning">{text(sentence)}</p>' for sentence in about.get("warnings") or ())
    inner = (
        f'<div class="hv-head"><h3>{text(about.get("title") or "What was computed")}</h3>{_download(about)}</div>{warnings}'
        f'<div class="hv-scroll" tabindex="0" role="group" aria-label="Drawing; scroll it sideways">{pictures}</div>'
        f'<p class="hv-said" data-said="Point at a cell for its decision.">Point at a cell for its decision.</p>'
        f"{_legend(trace, bands)}{_phases(about, trace, run)}{_table(bands)}"
    )
    return view("timeline", "Timeline: steps against blocks", inner)


def trace_of(about: Mapping[str, Any]) -> Trace:
    """The trace that a report's data came from. Keys that are not known are left out."""
    attention = about.get("attention") or ()
    calls = attention.get("each", ()) if isinstance(attention, Mapping) else attention
    return Trace(
        runs=[_built(Run, row) for row in about.get("runs") or ()],
        events=[_built(Event, {**row, "blocks": tuple(row["blocks"]) if row.get("blocks") else None}) for row in about.get("events") or ()],
        attention=[_built(Attended, row) for row in calls],
        structure=dict(about.get("structure") or {}),
    )


def _built(kind: Any, row: Mapping[str, Any]) -> Any:
    return kind(**{field.name: row[field.name] for field in fields(kind) if field.name in row})


def _branch(trace: Trace, run: Run, bands: Sequence[Band], steps: int, branch: int, several: bool) -> str:
    mine = [band for band in bands if band.branch == branch]
    calls = [call for call in trace.attended(run.index) if call.branch == branch]
    title = f'<p class="hv-branch">Branch {branch}</p>' if several else ""
    return title + draw_timeline(run, mine, steps, calls) + draw_signals(run, mine, steps)


def _legend(trace: Trace, bands: Sequence[Band]) -> str:
    """Share of each kind of cell, in blocks."""
    work = {kind: sum(band.work(kind) for band in bands) for kind in ACTIONS}
    calls = list(trace.attended(bands[-1].run))
    sparse = 0
    for branch in {band.branch for band in bands}:
        mine = [band for band in bands if band.branch == branch]
        at = sparse_blocks([call for call in calls if call.branch == branch], {band.site for band in mine})
        sparse += sum((band.step, band.site, k) in at for band in mine if band.action == "compute" for k in range(band.start, band.stop))
    found: dict[str, float] = {"compute": work["compute"] - sparse, "sparse": sparse}
    found.update((kind, work[kind]) for kind in ACTIONS[1:])
    whole = sum(found.values()) or 1
    items = (
        f"<li>{swatch(kind)} {VERBS[kind]} <b>{share(round(num / whole, 3))}</b></li>" for kind, num in found.items() if num or kind == "compute"
    )
    return f'<ul class="hv-legend" aria-label="Shares of the block work">{"".join(items)}</ul>'


def _phases(about: Mapping[str, Any], trace: Trace, run: Run) -> str:
    """A bar of time by phase."""
    given = [(str(row["name"]), float(row["seconds"])) for row in about.get("phases") or ()]
    phases = given or time_of(trace, run)
    whole = sum(value for _, value in phases)
    if not whole:
        return ""
    shades = [max(20, 100 - 100 * at // max(len(phases), 1)) for at in range(len(phases))]
    parts = "".join(
        f'<i style="flex-grow:{value / whole:.4f};--shade:{shade}%" title="{text(name)}: {seconds(value)}"></i>'
        for (name, value), shade in zip(phases, shades, strict=True)
    )
    told = "".join(
        f'<li><i class="hv-swatch" style="--shade:{shade}%"></i>{text(name)} <b>{seconds(value)}</b></li>'
        for (name, value), shade in zip(phases, shades, strict=True)
    )
    return f'<p class="hv-branch">Where the time went</p><div class="hv-bar" aria-hidden="true">{parts}</div><ul class="hv-legend">{told}</ul>'


def time_of(trace: Trace, run: Run) -> list[tuple[str, float]]:
    """Seconds in whole evaluations, in evaluations of which blocks stood still, and in all the rest of a run."""
    evaluations: dict[tuple[int, int], list[Event]] = {}
    for event in trace.of_run(run.index):
        evaluations.setdefault((event.step, event.branch), []).append(event)
    full = part = 0.0
    for events in evaluations.values():
        spent = sum(event.seconds or 0.0 for event in events)
        if all(event.action == "compute" for event in events):
            full += spent
        else:
            part += spent
    rest = max(0.0, run.seconds - full - part)
    named = [("whole evaluations", full), ("partial evaluations", part), ("everything else", rest)]
    return [(name, value) for name, value in named if value > 0]


def _table(bands: Sequence[Band]) -> str:
    """The same for readers who do not see the drawing: a row for each step and branch."""
    work: dict[tuple[int, int], dict[Action, float]] = {}
    none: dict[Action, float] = dict.fromkeys(ACTIONS, 0.0)
    for band in bands:
        row = work.setdefault((band.step, band.branch), none.copy())
        for kind in ACTIONS:
            row[kind] += band.work(kind)
    lines = "".join(
        f"<tr><td>{step}</td><td>{branch}</td>{''.join(f'<td>{num:.4g}</td>' for num in row.values())}</tr>"
        for (step, branch), row in work.items()
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("step", "branch", "computed", "reused", "forecast", "skipped"))
    return (
        f'<details><summary>Blocks by step, as a table</summary><div class="hv-scroll hv-tall" tabindex="0" role="group" aria-label="Table">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div></details>"
    )


def _download(about: Mapping[str, Any]) -> str:
    kept = {key: about[key] for key in ("runs", "events", "structure", "attention", "warnings") if key in about}
    name = text(about.get("download") or "timeline.json")
    return f'<button type="button" class="hv-button" data-do="download" data-name="{name}" data-json="{data(kept)}">Download as JSON</button>'
