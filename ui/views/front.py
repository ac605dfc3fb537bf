"""A study's trials: speed against likeness, the front that nothing beats, the budget, and the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.errors import UsageError
from hasten.ui.views.markup import empty, number, seconds, text, view
from hasten.ui.views.plot import Axis, frame, line, place, rule

AXES = {"speedup": ("speed-up", "×"), "seconds": ("seconds of a run", " s")}


@dataclass(frozen=True, slots=True)
class Point:
    """One trial. number: what a click reports. quality: PSNR in dB, median. low, high: ends of its error bar."""

    number: int
    name: str
    pace: float
    quality: float
    low: float
    high: float
    kind: str


def front(about: Mapping[str, Any]) -> str:
    """HTML of the plot and its table.

    about: `rows` (`recipe`, `speedup`, `seconds`, `psnr_median`, optional `number`, `psnr_worst`, `psnr_interval` and
    `control`: "fewer_steps" or "baseline"), optional `across` ("speedup" or "seconds") and `budget` (PSNR in dB). A click
    sends `select` with {"number", "recipe"}; a row's number is its place where it has none.
    """
    across_key = about.get("across") or "speedup"
    if across_key not in AXES:
        raise UsageError(f"A front is drawn over {' or '.join(AXES)}; got {across_key!r}.")
    points = _points(about.get("rows") or (), across_key)
    if not points:
        return empty("front", "Trials", "No trial is finished yet. Points appear here one by one.")
    best = best_of(points, across_key)
    budget = number(about, "budget")
    across = Axis.around([p.pace for p in points], AXES[across_key][0], AXES[across_key][1], log=True, room=0.08)
    heights = [value for p in points for value in (p.low, p.high)] + ([budget] if budget is not None else [])
    down = Axis.around(heights, "PSNR to the plain run", " dB", room=0.08)
    lines = line(across, down, [(p.pace, p.quality) for p in best], "hv-frontline")
    lines += "".join(line(across, down, [(p.pace, p.low), (p.pace, p.high)], "hv-error") for p in points if p.high > p.low)
    marks = ""
    if budget is not None:
        lines = rule(down, budget, "hv-budget") + lines
        marks = f'<span class="hv-budget-tag" style="top:{100 - down.at(budget):.2f}%">budget {budget:g} dB</span>'
    order = sorted(points, key=lambda p: (p.pace, p.quality))
    marks += "".join(_mark(p, across, down, p in best, across_key, at == 0) for at, p in enumerate(order))
    plot = frame(across, down, lines, marks, name="Trials: speed against PSNR; the table below has the numbers")
    return view("front", "Trials: speed against likeness", f"{_head(points, best)}{plot}{_legend(points)}{_table(order, best)}")


def best_of(points: Sequence[Point], across: str) -> list[Point]:
    """Points that no other beats in speed and quality, by rising speed. Controls count as competitors, too."""
    sign = 1 if across == "speedup" else -1
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (-sign * p.pace, -p.quality)):
        if not found or point.quality > found[-1].quality:
            found.append(point)
    return found[::-1]


def _points(rows: Sequence[Mapping[str, Any]], across: str) -> list[Point]:
    """Rows that have both numbers; identical outputs have no finite PSNR, and no place on the axis."""
    found = []
    for at, row in enumerate(rows):
        pace, quality = number(row, across), number(row, "psnr_median")
        if pace is None or quality is None or pace <= 0:
            continue
        worst = number(row, "psnr_worst")
        low, high = row.get("psnr_interval") or (quality if worst is None else worst, quality)
        kind = {"fewer_steps": "fewer", "baseline": "baseline"}.get(str(row.get("control") or ""), "trial")
        found.append(Point(int(row.get("number", at)), str(row.get("recipe", at)), pace, quality, min(float(low), quality), max(float(high), quality), kind))
    return found


def _told(point: Point, across: str) -> str:
    pace = f"{point.pace:.2f}×" if across == "speedup" else seconds(point.pace)
    bar = f" ({point.low:.1f} to {point.high:.1f})" if point.high > point.low else ""
    return f"{point.name}: {pace}, {point.quality:.1f} dB{bar}"


def _mark(point: Point, across: Axis, down: Axis, best: bool, across_key: str, first: bool) -> str:
    """A button. One of them is reached by Tab, the others from there by arrow keys."""
    kind = " hv-best" if best and point.kind == "trial" else f" hv-{point.kind}" if point.kind != "trial" else ""
    said = text(_told(point, across_key) + (", on the front" if best else ""))
    return (
        f'<button type="button" class="hv-point{kind}" style="{place(across, down, point.pace, point.quality)}" tabindex="{0 if first else -1}"'
        f' data-number="{point.number}" data-recipe="{text(point.name)}" aria-label="{said}" title="{said}" aria-pressed="false"></button>'
    )


def _head(points: Sequence[Point], best: Sequence[Point]) -> str:
    return (
        f'<div class="hv-head"><h3>{len(points)} trials, {len(best)} of them on the front</h3></div>'
        '<p class="hv-said" data-said="Choose a point to compare it with the plain run." aria-live="polite">'
        "Choose a point to compare it with the plain run.</p>"
    )


def _legend(points: Sequence[Point]) -> str:
    kinds = {"best": "on the front", "trial": "trial", "baseline": "plain run", "fewer": "fewer steps alone"}
    there = {point.kind for point in points} | {"best"}
    items = "".join(
        f'<li><span class="hv-mark"><span class="hv-point hv-{kind}"></span></span>{name}</li>' for kind, name in kinds.items() if kind in there
    )
    return f'<ul class="hv-legend" aria-hidden="true">{items}<li>bars: worst to best, or the interval</li></ul>'


def _table(points: Sequence[Point], best: Sequence[Point]) -> str:
    lines = "".join(
        f'<tr><th scope="row">{text(p.name)}</th><td class="hv-right">{p.pace:.3g}</td><td class="hv-right">{p.quality:.1f}</td>'
        f'<td class="hv-right">{p.low:.1f}</td><td>{"yes" if p in best else ""}</td></tr>'
        for p in points
    )
    return (
        '<details><summary>Trials as a table</summary><div class="hv-scroll hv-tall" tabindex="0" role="group" aria-label="Table of trials"><table>'
        '<thead><tr><th scope="col">recipe</th><th scope="col" class="hv-right">pace</th><th scope="col" class="hv-right">PSNR dB</th>'
        f'<th scope="col" class="hv-right">lowest</th><th scope="col">on the front</th></tr></thead><tbody>{lines}</tbody></table></div></details>'
    )
