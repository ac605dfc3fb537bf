"""A report as one self-contained page: numbers, warnings, step x block timeline, signals, media, recipe.

Actions differ in colour *and* in pattern, so that the timeline reads without colour.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hasten.bands import Band
from hasten.report import Report
from hasten.report_attention import draw
from hasten.report_forms import readable_bytes
from hasten.report_page import facts, page, rows, tiles, yaml_of
from hasten.report_plot import draw_signals
from hasten.report_style import GUTTER, canvas, column
from hasten.trace import Run

MAX_MEDIA_BYTES = 24 * 1024 * 1024
"""Larger files are named in the page instead of embedded."""
_VERBS = {"compute": "computed", "reuse": "reused", "forecast": "forecast", "skip": "skipped"}
_MEDIA = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png"}


def render(report: Report) -> str:
    """The page of `report` as HTML text, UTF-8."""
    sections = [
        _tiles(report),
        _shares(report),
        *_runs(report),
        _media(report.extras.get("media") or []),
        _metrics(report.extras.get("metrics")),
        facts("Request", {k: v for k, v in report.extras.items() if k not in ("media", "metrics")}),
        yaml_of(report.recipe),
        facts("Hardware", report.hardware),
        facts("Versions", report.versions),
    ]
    return page(report.name, _subtitle(report), report.warnings, sections)


def _subtitle(report: Report) -> str:
    paper = report.recipe.paper if report.recipe else ""
    return f"hasten report, {report.scope}" + (f" - {paper}" if paper else "")


def _tiles(report: Report) -> str:
    seconds = sum(report.seconds.values())
    read = report.attention
    shown = [
        (f"{report.computed_fraction:.1%}", "of the block work computed"),
        (f"{report.nfe:.4g} / {report.evaluations}", "network evaluations computed"),
        (
            f"{seconds:.3g} s",
            "wall time" if len(report.runs) < 2 else f"wall time of {len(report.runs)} runs",
        ),
        (readable_bytes(report.bytes_held), "held by caches at most"),
    ]
    if read is not None:
        recall = "" if read.recall is None else f", {read.recall:.1%} of the mass by estimate"
        shown.append((f"{read.density:.1%}", f"of the pairs read by attention{recall}"))
    return tiles(shown)


def _shares(report: Report) -> str:
    """Legend and share of each action."""
    total = sum(report.totals.values())
    if not total:
        return ""
    items = "".join(
        f'<li><svg width="26" height="16"><rect class="{action}" x="1" y="1" width="24" height="14"/></svg>'
        f" {_VERBS[action]} <b>{num / total:.1%}</b> <small>{num:,.10g} blocks</small></li>"
        for action, num in report.totals.items()
    )
    return f'<ul class="legend">{items}</ul>'


def _runs(report: Report) -> Iterable[str]:
    for run in report.runs:
        bands = [band for band in report.bands if band.run == run.index]
        steps = max([run.steps, *(band.step + 1 for band in bands)])
        for branch in sorted({band.branch for band in bands}):
            mine = [band for band in bands if band.branch == branch]
            pictures = draw([call for call in report.attended if (call.run, call.branch) == (run.index, branch)], run.steps, steps)
            prefix = f"Run {run.index}, branch" if len(report.runs) > 1 else "Branch"
            yield f"<section><h2>{prefix} {branch}: step by step</h2>"
            yield f'<div class="scroll" tabindex="0">{_timeline(run, mine, steps)}{draw_signals(run, mine, steps)}{pictures}</div></section>'


def _timeline(run: Run, bands: Sequence[Band], steps: int) -> str:
    """One SVG: a strip of rows per site (a row per block), a column per step."""
    width, top, parts = column(steps), 0, []
    for site in dict.fromkeys(band.site for band in bands):
        mine = [band for band in bands if band.site == site]
        num = max(band.stop for band in mine)
        row = 28 if num == 1 else max(4, min(16, 240 // num))
        top += 18
        what = "whole network" if num == 1 else f"{num} blocks"
        parts.append(f'<text x="{GUTTER}" y="{top - 5}">{escape(site)}, {what}</text>')
        if num > 1:
            ends = ((1, top + min(row, 9)), (num, top + num * row - 1))
            parts += [f'<text class="end" x="{GUTTER - 6}" y="{y}">{block}</text>' for block, y in ends]
        for band in mine:
            x, y = GUTTER + band.step * width, top + band.start * row
            parts += [
                f"<g><title>{escape(_title(run, band))}</title>",
                *_cells(band, x, y, width - 1, band.num * row - 1),
                "</g>",
            ]
        top += num * row + 6
    every = next(k for k in (1, 2, 5, 10, 20, 50, 100, 10**9) if k * width >= 24)
    for step in range(0, steps, every):
        x = GUTTER + step * width + width // 2
        parts.append(f'<text class="mid" x="{x}" y="{top + 9}">{step}</text>')
    parts.append(f'<text class="end" x="{GUTTER - 6}" y="{top + 9}">step</text>')
    return (
        f'<svg role="img" aria-label="Timeline: what was computed and what was replaced, per step and block"'
        f' width="{canvas(steps)}" height="{top + 14}">{"".join(parts)}</svg>'
    )


def _cells(band: Band, x: int, y: int, width: int, height: int) -> Iterable[str]:
    """The rectangle of a band; two beside each other where the rest of the batch was skipped."""
    covered = round(width * band.share)
    for action, left, wide in ((band.action, x, covered), ("skip", x + covered, width - covered)):
        if wide:
            yield f'<rect class="{action}" x="{left}" y="{y}" width="{wide}" height="{height}"/>'


def _title(run: Run, band: Band) -> str:
    """The text shown when the pointer rests on a cell."""
    event = band.event
    time = f", time {run.times[band.step]:.4g}" if band.step < len(run.times) else ""
    blocks = f"blocks {band.start + 1}-{band.stop} " if band.num > 1 else f"block {band.start + 1} "
    parts = [f"step {band.step} of {run.steps}{time}: {blocks}{_VERBS[band.action]}"]
    if band.share < 1:
        parts.append(f"for {band.share:.0%} of the batch, the rest skipped")
    if event is not None:
        if event.signal is not None:
            limit = "" if event.threshold is None else f" against limit {event.threshold:.4g}"
            parts.append(f"signal {event.signal:.4g}{limit}")
        if event.seconds is not None:
            parts.append(f"{1000 * event.seconds:.3g} ms")
        if event.why:
            parts.append(event.why)
    return "; ".join(parts)


def _media(media: Sequence[Mapping[str, Any]]) -> str:
    """Videos and pictures side by side, embedded."""
    if not media:
        return ""
    figures = "".join(
        f"<figure>{_embedded(Path(str(item['path'])), str(item.get('label', '')))}"
        f"<figcaption>{escape(str(item.get('label', '')))}</figcaption></figure>"
        for item in media
    )
    videos = sum(Path(str(item["path"])).suffix.lower() == ".mp4" for item in media)
    button = '<button id="together" type="button">Play or pause all together</button>' if videos > 1 else ""
    return f'<section><h2>Side by side</h2><div class="media">{figures}</div>{button}</section>'


def _embedded(path: Path, label: str) -> str:
    """The file as a data URI, or a visible sentence why it is not in the page."""
    kind = _MEDIA.get(path.suffix.lower())
    try:
        if kind is None:
            raise OSError(f"a page shows {', '.join(_MEDIA)} only")
        if path.stat().st_size > MAX_MEDIA_BYTES:
            raise OSError(f"it is larger than {MAX_MEDIA_BYTES // 2**20} MiB")
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        return f'<p class="warning">{escape(path.name)} is not shown: {escape(error.strerror or str(error))}.</p>'
    source = f"data:{kind};base64,{data}"
    if kind.startswith("video"):
        return f'<video controls loop muted playsinline aria-label="{escape(label)}" src="{source}"></video>'
    return f'<img alt="{escape(label)}" src="{source}">'


def _metrics(metrics: Any) -> str:
    """A table from {name: value} or from a list of such rows."""
    found = [metrics] if isinstance(metrics, Mapping) else list(metrics or [])
    return rows("Measured", [row for row in found if row], note="Similarity to the run without acceleration, not quality.")
