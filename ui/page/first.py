"""The comparison that a page without any shows: made once, from what comes with hasten."""

from __future__ import annotations

from hasten.ui.engine import Engine

FIRST = {
    "kind": "compare", "model": "tiny-video", "prompt": "a seven moving left, slowly", "seed": 1,
    "recipes": ["balanced", "fast:student=false", "fastest"],
}  # fmt: skip
"""The same as `hasten demo`, so that page and terminal show one story."""


def begin(engine: Engine) -> str | None:
    """Ask for it unless there is, or will be, a comparison; the job, None where nothing had to be asked."""
    if engine.jobs.list(1, states=("queued", "running", "done"), kinds=["compare"]):
        return None
    return engine.submit(FIRST).id
