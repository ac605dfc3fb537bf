"""The page that every report is put into: its shell, and the pieces that reports share.

No script library, no font, no image comes from elsewhere, and a content security policy forbids it; every text
is escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from hasten.recipe import Recipe
from hasten.report_style import SCRIPT, STYLE


def page(
    name: str, subtitle: str, warnings: Iterable[str], sections: Iterable[str], *, style: str = "", script: str = ""
) -> str:
    """The whole page as HTML text, UTF-8. name, subtitle, warnings: plain text. sections: HTML; empty ones are left out.
    style, script: what the sections need beside the page's own."""
    script = SCRIPT + script
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; script-src 'sha256-{digest}'"
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="sub">{escape(subtitle)}</p>',
        *(f'<p class="warning" role="alert"><b>Warning.</b> {escape(text)}</p>' for text in warnings),
        *sections,
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(name)} - hasten report</title><style>{STYLE}{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main><script>{script}</script></body></html>\n"
    )


def tiles(items: Iterable[tuple[str, str]]) -> str:
    """The numbers that matter, in large: (value, what it is)."""
    inner = "".join(f"<div><strong>{escape(value)}</strong><span>{escape(label)}</span></div>" for value, label in items)
    return f'<section class="tiles">{inner}</section>'


def facts(title: str, about: Mapping[str, Any]) -> str:
    """A table of names and values; empty without any."""
    if not about:
        return ""
    lines = "".join(f"<tr><th>{escape(str(key))}</th><td>{cell(value)}</td></tr>" for key, value in about.items())
    return f'<section><h2>{title}</h2><div class="scroll" tabindex="0"><table class="facts">{lines}</table></div></section>'


def rows(title: str, about: Sequence[Mapping[str, Any]], note: str = "") -> str:
    """A table with a column for each key that any row has; empty without rows."""
    if not about:
        return ""
    keys = list(dict.fromkeys(key for row in about for key in row))
    head = "".join(f"<th>{escape(str(key))}</th>" for key in keys)
    lines = "".join(f"<tr>{''.join(f'<td>{cell(row.get(key))}</td>' for key in keys)}</tr>" for row in about)
    below = f'<p class="sub">{escape(note)}</p>' if note else ""
    return (
        f'<section><h2>{title}</h2><div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>{below}</section>"
    )


def yaml_of(recipe: Recipe | None) -> str:
    """The recipe in full; empty without one."""
    if recipe is None:
        return ""
    return f'<section><h2>Recipe</h2><pre tabindex="0">{escape(recipe.to_yaml())}</pre></section>'


def cell(value: Any) -> str:
    """One value of a table."""
    if value is None:
        return "-"
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))
