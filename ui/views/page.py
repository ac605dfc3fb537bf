"""Views in a file of their own: nothing is loaded, nothing is sent, and it opens without a server."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

from hasten.errors import UsageError
from hasten.report import Report
from hasten.report_html import render
from hasten.report_page import page
from hasten.ui.views import theme

MOST_BYTES = 24 * 2**20
"""Larger files do not belong into a page."""

_KINDS = {".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif", ".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}


def alone(name: str, subtitle: str, views: Iterable[str], warnings: Iterable[str] = ()) -> str:
    """A whole page, UTF-8. name, subtitle, warnings: plain text. views: HTML that the functions of this folder gave."""
    sections = (f'<div class="hv-page">{one}</div>' for one in views)
    return page(name, subtitle, warnings, sections, style=theme.style() + MARGIN, script=started())


def of_report(report: Report, views: Iterable[str]) -> str:
    """The page of a report, UTF-8, with views above its numbers."""
    first = [f'<div class="hv-page">{one}</div>' for one in views]
    return render(report, first, style=theme.style() + MARGIN, script=started())


MARGIN = ".hv-page{margin:24px 0 40px}\n"


def started() -> str:
    """The script of a page whose views are all there."""
    return theme.script() + "hastenViews.start(document);\n"


def embedded(path: Path) -> str:
    """A picture or clip as a data: URL. Raises `UsageError` for other kinds of files and for very large ones."""
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"Cannot put {path.name} into a page; allowed: {', '.join(_KINDS)}.")
    if path.stat().st_size > MOST_BYTES:
        raise UsageError(f"Cannot put {path.name} into a page: it is larger than {MOST_BYTES // 2**20} MiB. Make a shorter clip.")
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
