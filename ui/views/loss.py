"""How a training goes: losses over steps, and the samples it drew."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hasten.ui.views.markup import empty, number, source, text, view
from hasten.ui.views.plot import Axis, frame, line

MOST = 400
"""Points of a line; longer logs are drawn as means of neighbouring steps."""


def loss(about: Mapping[str, Any]) -> str:
    """HTML of the plot and the samples.

    about: `rows` (lines of a training's log.jsonl: `step` and numbers), optional `series` (which numbers, up to three;
    default: `loss`), `log` (begin with a logarithmic axis) and `samples` ([{"step", "url"}], pictures of the student).
    """
    rows: Sequence[Mapping[str, Any]] = about.get("rows") or ()
    lines = {name: points for name in list(about.get("series") or ["loss"])[:3] if (points := _points(rows, str(name)))}
    samples = _samples(about.get("samples") or ())
    if not lines and not samples:
        return empty("loss", "Training", "No step is done yet. The loss is drawn here from the first one on.")
    drawn = _plots(lines, bool(about.get("log"))) if lines else ""
    return view("loss", "Training", drawn + samples)


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    found = [(step, value) for row in rows if (step := number(row, "step")) is not None and (value := number(row, name)) is not None]
    each = math.ceil(len(found) / MOST) or 1
    groups = [found[at : at + each] for at in range(0, len(found), each)]
    return [(group[-1][0], statistics.fmean(value for _, value in group)) for group in groups]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over a twentieth of the line around each point."""
    reach = len(points) // 40
    near = (points[max(0, at - reach) : at + reach + 1] for at in range(len(points)))
    return [(step, statistics.fmean(value for _, value in group)) for (step, _), group in zip(points, near, strict=True)]


def _plots(lines: Mapping[str, Sequence[tuple[float, float]]], log: bool) -> str:
    """The same plot over a plain and a logarithmic axis; a box chooses between them."""
    positive = all(value > 0 for points in lines.values() for _, value in points)
    steps = [step for points in lines.values() for step, _ in points]
    across = Axis(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1, "step")
    values = [value for points in lines.values() for _, value in points]
    plots = ""
    for which in (False, True) if positive else (False,):
        down = Axis.around(values, ", ".join(lines), log=which)
        svg = "".join(
            (line(across, down, points, "hv-raw") if at == 0 else "")
            + line(across, down, _smooth(points), "hv-line" if at == 0 else f"hv-series-{at}")
            for at, points in enumerate(lines.values())
        )
        drawn = frame(across, down, svg, name=f"{', '.join(lines)} over steps")
        plots += f'<div data-axis="{"log" if which else "plain"}">{drawn}</div>'
    last = ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in lines.items())
    box = f'<label class="hv-check"><input type="checkbox" data-keep="loss-log"{" checked" if log else ""}> logarithmic</label>' if positive else ""
    head = f'<div class="hv-head"><h3>Step {max(steps):g}: {text(last)}</h3>{box}</div>'
    keys = [f'<li><i class="hv-key hv-key-{at}"></i>{text(name)}</li>' for at, name in enumerate(lines)]
    return head + plots + (f'<ul class="hv-legend">{"".join(keys)}</ul>' if len(keys) > 1 else "")


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """Newest first; older ones are loaded when they come into sight."""
    if not samples:
        return ""
    figures = "".join(
        f'<li><figure><img loading="lazy" alt="Samples at step {text(row["step"])}" src="{source(row["url"])}">'
        f"<figcaption>step {text(row['step'])}</figcaption></figure></li>"
        for row in sorted(samples, key=lambda row: -int(row["step"]))
    )
    return f'<p class="hv-branch">Samples, newest first</p><ul class="hv-samples">{figures}</ul>'
