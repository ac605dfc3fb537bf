"""Signal against threshold as inline SVG, on the same columns as the timeline above it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from hasten.bands import Band
from hasten.report_style import GUTTER, canvas, column
from hasten.trace import Event, Run

HEIGHT = 130
_LOG_FROM = 50.0
"""A range of signals wider than this factor is drawn on a logarithmic axis."""


def draw_signals(run: Run, bands: Sequence[Band], steps: int) -> str:
    """One plot per site that compared anything; an empty string when none did."""
    plots = []
    for site in dict.fromkeys(band.site for band in bands):
        # One decision may cover several bands (and sites): each event is drawn once.
        events = {
            id(band.event): band.event for band in bands if band.site == site and band.event is not None
        }
        mine = [
            event for event in events.values() if event.signal is not None and math.isfinite(event.signal)
        ]
        if mine:
            plots.append(_plot(run, site, mine, steps))
    return "".join(plots)


def _plot(run: Run, site: str, events: Sequence[Event], steps: int) -> str:
    width = column(steps)
    right = GUTTER + steps * width
    by_step: dict[int, list[Event]] = {}
    for event in events:
        by_step.setdefault(event.step, []).append(event)
    limits = {step: _limit(group) for step, group in by_step.items()}
    ticks, place = _scale([e.signal or 0.0 for e in events] + [v for v in limits.values() if v is not None])
    parts = [f'<text x="{GUTTER}" y="13">{escape(site)}: signal (line) against limit (dashes)</text>']
    for tick in ticks:
        y = place(tick)
        parts.append(f'<line class="grid" x1="{GUTTER}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{GUTTER - 6}" y="{y + 4:.1f}">{tick:.2g}</text>')

    def middle(step: int) -> float:
        return GUTTER + step * width + (width - 1) / 2

    points = []
    for step, group in sorted(by_step.items()):
        values = sorted(event.signal or 0.0 for event in group)
        low, high, median = values[0], values[-1], values[len(values) // 2]
        if high > low:
            parts.append(
                f'<line class="spread" x1="{middle(step)}" x2="{middle(step)}" y1="{place(low):.1f}" y2="{place(high):.1f}"/>'
            )
        points.append((step, median, group[0]))
    line = " ".join(f"{middle(step)},{place(value):.1f}" for step, value, _ in points)
    parts.append(f'<polyline class="signal" points="{line}"/>')
    for step, limit in limits.items():
        if limit is not None:
            x, y = GUTTER + step * width, place(limit)
            parts.append(f'<line class="limit" x1="{x}" x2="{x + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for step, value, event in points:
        limit = limits[step]
        against = "" if limit is None else f" against limit {limit:.4g}"
        several = f" (median of {len(by_step[step])})" if len(by_step[step]) > 1 else ""
        parts.append(
            f'<circle class="{"filled" if event.action == "compute" else "hollow"}" cx="{middle(step)}"'
            f' cy="{place(value):.1f}" r="3"><title>step {step} of {run.steps}: signal {value:.4g}{several}{against},'
            f" {event.action}</title></circle>"
        )
    return (
        f'<svg class="drawn" role="img" aria-label="Signal against limit of {escape(site)}"'
        f' width="{canvas(steps)}" height="{HEIGHT}">{"".join(parts)}</svg>'
    )


def _limit(events: Sequence[Event]) -> float | None:
    """The smallest finite threshold of a step."""
    return min(
        (e.threshold for e in events if e.threshold is not None and math.isfinite(e.threshold)), default=None
    )


def _scale(values: Sequence[float]) -> tuple[list[float], Callable[[float], float]]:
    """(ticks, value -> y in pixels) for an axis that holds all `values`."""
    top, bottom = 24.0, HEIGHT - 10.0
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_FROM:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        stride = max(1, (last - first) // 4)
        ticks = [10.0**k for k in range(first, last + 1, stride)]
        return ticks, lambda v: bottom - (bottom - top) * (math.log10(v) - first) / (last - first)
    low, high = min(low, 0.0), max(high, 0.0)
    span = (high - low) or 1.0
    ticks = [low, low + span / 2, low + span]
    return ticks, lambda v: bottom - (bottom - top) * (v - low) / span
