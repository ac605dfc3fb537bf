"""A report as one self-contained page: numbers, warnings, step x block timeline, signals, media, recipe."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hasten.report import Report
from hasten.report_attention import draw
from hasten.report_forms import readable_bytes
from hasten.report_page import facts, page, rows, tiles, yaml_of
from hasten.report_plot import draw_signals
from hasten.report_timeline import VERBS, draw_timeline, swatch

MAX_MEDIA_BYTES = 24 * 1024 * 1024
"""Larger files are named in the page instead of embedded."""
_MEDIA = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png"}


def render(report: Report, first: Sequence[str] = (), *, style: str = "", script: str = "") -> str:
    """The page of `report` as HTML text, UTF-8. first: HTML that stands above it all, with the style and script it needs."""
    sections = [
        *first,
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
    return page(report.name, _subtitle(report), report.warnings, sections, style=style, script=script)


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
        f"<li>{swatch(action)} {VERBS[action]} <b>{num / total:.1%}</b> <small>{num:,.10g} blocks</small></li>"
        for action, num in report.totals.items()
    )
    return f'<ul class="legend">{items}</ul>'


def _runs(report: Report) -> Iterable[str]:
    for run in report.runs:
        bands = [band for band in report.bands if band.run == run.index]
        steps = max([run.steps, *(band.step + 1 for band in bands)])
        for branch in sorted({band.branch for band in bands}):
            mine = [band for band in bands if band.branch == branch]
            calls = [call for call in report.attended if (call.run, call.branch) == (run.index, branch)]
            drawn = draw_timeline(run, mine, steps, calls) + draw_signals(run, mine, steps) + draw(calls, run.steps, steps)
            prefix = f"Run {run.index}, branch" if len(report.runs) > 1 else "Branch"
            yield f"<section><h2>{prefix} {branch}: step by step</h2>"
            yield f'<div class="scroll" tabindex="0">{drawn}</div></section>'


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
