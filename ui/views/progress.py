"""Where a run stands, and what waits behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.report_forms import readable_bytes
from hasten.ui.views.markup import number, seconds, share, text, view

STATES = {
    "queued": "waiting", "running": "running", "stopping": "stopping", "done": "done", "failed": "failed",
    "cancelled": "stopped", "interrupted": "interrupted, may be tried again",
}  # fmt: skip


def progress(about: Mapping[str, Any]) -> str:
    """HTML of the current job.

    about: `state` (one of `STATES`), `phase` (one word or two), `step`, `steps`, `seconds_per_step`, `seconds_left`,
    `memory_bytes`, `skipped` (0 to 1, share of the work so far) and `message` (a sentence, for example why it failed).
    What a screen reader says changes with the phase and each quarter, not with each step.
    """
    state = str(about.get("state") or "")
    phase = str(about.get("phase") or STATES.get(state, "Nothing is running"))
    step, steps = number(about, "step"), number(about, "steps")
    done = min(1.0, step / steps) if step is not None and steps else 1.0 if state == "done" else None
    facts = [
        ("step", f"{step:g} of {steps:g}" if step is not None and steps else "–"),
        ("each", seconds(number(about, "seconds_per_step"))),
        ("left", seconds(number(about, "seconds_left"))),
        ("memory", readable_bytes(int(memory)) if (memory := number(about, "memory_bytes")) is not None else "–"),
        ("skipped so far", share(skipped if (skipped := number(about, "skipped")) is None else round(skipped, 3))),
    ]
    told = "".join(f"<div><dt>{name}</dt><dd>{text(value)}</dd></div>" for name, value in facts)
    said = phase if done is None else f"{phase}, {int(4 * done) * 25} %"
    width = f'style="width:{100 * done:.1f}%"' if done is not None else 'style="width:30%"'
    bar = (
        f'<i class="hv-fill{" hv-unknown" if done is None and state in ("running", "stopping") else ""}" data-part="fill" {width}></i>'
        if state in ("running", "stopping", "done")
        else '<i class="hv-fill" data-part="fill" style="width:0"></i>'
    )
    message = str(about.get("message") or "")
    inner = (
        f'<div class="hv-head"><h3 data-part="phase">{text(phase)}</h3><span class="hv-number" data-part="state">{text(STATES.get(state, ""))}</span></div>'
        f'<div class="hv-track" aria-hidden="true">{bar}</div><dl class="hv-facts" data-part="facts">{told}</dl>'
        f'<p class="hv-message" data-part="message"{"" if message else " hidden"}>{text(message)}</p>'
        f'<p class="hv-hidden" role="status" aria-live="polite" data-part="said">{text(f"{said}. {message}")}</p>'
    )
    return view("progress", "Progress", inner, live="progress")


def queue(about: Mapping[str, Any]) -> str:
    """HTML of the list of jobs. about: `jobs` ([{"id", "title", "state", optional "detail"}], first to run first).

    A click on a job's name sends `select` with {"id"}; buttons that act on it belong to the page around.
    """
    jobs: Sequence[Mapping[str, Any]] = about.get("jobs") or ()
    if not jobs:
        return view("queue", "Queue", '<p class="hv-note">Nothing waits.</p>')
    rows = "".join(
        f'<li class="hv-job hv-is-{text(job.get("state", ""))}"><i aria-hidden="true"></i>'
        f'<button type="button" data-id="{text(job.get("id", ""))}">{text(job.get("title") or job.get("id", ""))}</button>'
        f"<span>{text(' · '.join(filter(None, [STATES.get(str(job.get('state')), str(job.get('state', ''))), str(job.get('detail') or '')])))}</span></li>"
        for job in jobs
    )
    return view("queue", "Queue", f'<ol class="hv-jobs">{rows}</ol>')
