"""Colours, and the style and script of all views as two texts. One accent; every pair of colours meets WCAG AA."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from hasten.report_style import DRAWN, PALETTE, PALETTE_DARK

ACCENT, ACCENT_HOVER, ON_ACCENT = "#0063a6", "#00518a", "#ffffff"
"""Of primary buttons, in light and dark alike: white on it has a contrast of 6.2 to 1."""

STYLES = ("views", "player", "cards", "drawings", "canvas", "decoding", "lists")
SCRIPTS = ("views", "player", "plots", "canvas", "decoding", "lists")


@cache
def script() -> str:
    """What makes views move; it registers itself in `hastenViews` and starts nothing."""
    return _joined(SCRIPTS, "js")


@cache
def style() -> str:
    """What views need in a page that already has the report's colours and drawings."""
    return _joined(STYLES, "css")


@cache
def style_in_gradio() -> str:
    """The same for a Gradio page, whose class `dark` says which colours."""
    light = f".gradio-container .hv{{{PALETTE};--bg:var(--block-background-fill,#fff)}}"
    dark = f".dark .gradio-container .hv,.gradio-container.dark .hv{{{PALETTE_DARK};--bg:var(--block-background-fill,#14171a)}}"
    return f"{light}\n{dark}\n.dark{{--color-accent:#4ea8de}}\n{DRAWN}{style()}"


def _joined(names: tuple[str, ...], suffix: str) -> str:
    folder = files("hasten.ui.views") / "assets"
    return "\n".join((folder / f"{name}.{suffix}").read_text(encoding="utf-8").strip() for name in names) + "\n"
