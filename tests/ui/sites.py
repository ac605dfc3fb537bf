"""A served page for tests: a bare one of Gradio, with a handler that would give away files if it were let."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import httpx

PATIENT = 120.0
"""Seconds: the machine that runs the tests is busy."""


def bare() -> gr.Blocks:
    """A page with a text and a file."""
    with gr.Blocks() as page:
        file, text = gr.File(), gr.Textbox()
        gr.Button("Say").click(lambda words: words, text, text, api_name="say")
        gr.Button("Take").click(lambda path: Path(path).read_text(), file, text, api_name="take")
    return page


def client(url: str, **more: object) -> httpx.Client:
    """Of this machine, without looking at the environment's proxies."""
    return httpx.Client(base_url=url, timeout=PATIENT, trust_env=False, **more)  # type: ignore[arg-type]
