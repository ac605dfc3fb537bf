"""The few things that every view needs: escaped text, numbers in words, and URLs that stay on this machine."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from html import escape
from typing import Any

from hasten.errors import UsageError

_LOCAL = re.compile(r"(/(?!/)|blob:|data:(image/(png|jpeg|gif|webp)|video/(mp4|webm))[;,]|https?://(127\.0\.0\.1|localhost)(:\d+)?/)")
"""What a source of a picture or clip may begin with: this server, or the data itself."""
_MENDED = re.compile(r"[\x00-\x20\\]")
"""Browsers drop or turn these before they read a URL, so that /\\host or a line break after the first slash names a host."""


def text(value: Any) -> str:
    """Any value as HTML text; safe in quoted attributes, too."""
    return escape(str(value), quote=True)


def data(value: Any) -> str:
    """JSON for a quoted attribute."""
    return escape(json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")), quote=True)


def source(url: Any) -> str:
    """A checked URL for `src`. Raises `UsageError` for what would ask another host."""
    if not isinstance(url, str) or not _LOCAL.match(url) or _MENDED.search(url):
        raise UsageError(
            f"Cannot show {str(url)[:80]!r}: a view shows files of this server (/...) and data: URLs of pictures and clips"
            " only. Give the URL under which this server offers the file."
        )
    return escape(url, quote=True)


def view(kind: str, name: str, inner: str, **attributes: str | None) -> str:
    """The root of a view. kind: what its script is called. name: plain text for screen readers. attributes: `data-*`."""
    more = "".join(f' data-{key}="{text(value)}"' for key, value in attributes.items() if value is not None)
    return f'<section class="hv hv-{kind}" data-view="{kind}" aria-label="{text(name)}"{more}>{inner}</section>'


def empty(kind: str, name: str, sentence: str) -> str:
    """A view without anything to show says why."""
    return view(kind, name, f'<p class="hv-empty">{text(sentence)}</p>')


def number(row: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a row, None where there is none."""
    value = row.get(key)
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good and value is not None else None


def seconds(value: float | None) -> str:
    """`0.98 s`, `48.1 s`, `12 min 05 s`, `3 h 20 min`; a dash where it is not known."""
    if value is None:
        return "–"
    if value < 99.95:
        return f"{value:.3g} s" if value < 9.995 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def share(value: float | None) -> str:
    """`24 %`."""
    return "–" if value is None else f"{100 * value:.3g} %"


def decibel(value: float | None, identical: bool = False) -> str:
    """`52.3 dB`; what is the same in every bit has no finite number."""
    if value is None:
        return "identical" if identical else "–"
    return f"{value:.1f} dB"
