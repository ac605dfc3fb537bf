"""Boxes for numbers that may stay empty, which Gradio's own turn into 0."""

from __future__ import annotations

from typing import Any

import gradio as gr

from hasten.ui.engine import RequestError


def box(label: str, placeholder: str = "usual", **more: Any) -> gr.Textbox:
    """An empty box for a number. placeholder: what is taken where it stays empty."""
    return gr.Textbox("", label=label, placeholder=placeholder, max_lines=1, min_width=90, **more)


def read(name: str, typed: str | float | None, *, whole: bool = True) -> int | float | None:
    """What was typed; None where nothing was. Raises `RequestError` for what is no number."""
    text = str(typed if typed is not None else "").strip()
    if not text:
        return None
    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise RequestError(name, text, "a whole number, or nothing" if whole else "a number, or nothing") from None


def written(value: Any) -> str:
    """How a box shows a number of a request."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
