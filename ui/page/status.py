"""One line at the head of the page: what runs now, whoever asked for it, and what waits."""

from __future__ import annotations

import gradio as gr

from hasten.ui.engine import Engine
from hasten.ui.page.results import title
from hasten.ui.page.watch import HIDDEN
from hasten.ui.views.component import shown
from hasten.ui.views.markup import text, view

EVERY = 1.5
"""Seconds between two looks."""

LONGEST = 70
"""Characters of a title."""


class Status:
    """Asked by a timer, so that an open page holds nothing of the server."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.line = shown(self.now(), elem_classes="status")

    def begin(self, page: gr.Blocks) -> None:
        """Look at once, and then again and again."""
        timer = gr.Timer(EVERY)
        timer.tick(self.now, None, [self.line], queue=False, **HIDDEN)

    def now(self) -> str:
        """HTML of the line."""
        jobs = self.engine.jobs.list(100, states=("running", "queued"))
        running = next((job for job in jobs if job.state == "running"), None)
        waiting = sum(job.state == "queued" for job in jobs)
        paused = self.engine.jobs.paused
        more = " · ".join(filter(None, (f"{waiting} waiting" if waiting else "", "the queue is paused" if paused else "")))
        if running is None:
            return _line("idle", "Nothing is running", more)
        snapshot = self.engine.snapshot(running.id)
        done = f"{100 * snapshot.step / snapshot.steps:.0f} %" if snapshot.steps else ""
        return _line("busy", title(running.asked)[:LONGEST], " · ".join(part for part in (snapshot.phase, done, more) if part))


def _line(kind: str, words: str, more: str) -> str:
    inner = f'<i class="hp-dot hp-{kind}" aria-hidden="true"></i><span data-part="what">{text(words)}</span><span class="hv-number" data-part="more">{text(more)}</span>'
    return view("status", "What runs now", f'<p class="hp-line">{inner}</p>')


