"""A job and the page that looks at it: submit, follow, stop, try again, and find it again after a reload.

A follower holds no thread while it waits and looks at the newest snapshot only; when its page has gone it ends within `BEAT`.
Leaving a page never stops a job: only its Stop button does.
"""

from __future__ import annotations

import asyncio
import functools
import html
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr
from gradio.components import Component

from hasten.errors import HastenError, UsageError
from hasten.ui.engine import ENDED, Engine, Job, Snapshot
from hasten.ui.page.results import failure, standing
from hasten.ui.views.component import shown
from hasten.ui.views.progress import progress

LOOKED = 0.2
"""Seconds between two looks at a job."""

BEAT = 2.0
"""Seconds after which a follower with nothing new gives a sign of life: Gradio sees only then that a page has gone."""

REMEDIES = 4
"""Buttons for what a failed job may be tried again with, at most."""

Updates = dict[Any, Any]
"""Component -> its new value, or what `gr.update` gives."""

HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""How all events are that only the page itself has."""

TOLD: dict[str, Any] = {**HIDDEN, "concurrency_limit": None}
"""How those are that may go wrong: Gradio 6.31 shows no message of an event that has `queue=False`."""


def in_words(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same; what is wrong with a request is told to the person in its own words."""

    @functools.wraps(function)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except HastenError as error:
            raise gr.Error(html.escape(str(error), quote=False), title="Not like this", print_exception=False) from None

    return told


async def snapshots(engine: Engine, job: str, wanted: Callable[[], bool]) -> AsyncIterator[Snapshot | None]:
    """Where the job stands, the newest each time, until it is over, gone or not wanted any more; None is a sign of life."""
    seen: tuple[int, str, str] | None = None
    told = time.monotonic()
    while wanted():
        try:
            found = await asyncio.to_thread(engine.snapshot, job)
        except UsageError:  # somebody has removed it
            return
        now = (found.number, found.state, found.note)  # what is said of its turn changes while it waits
        if now != seen:
            seen, told = now, time.monotonic()
            yield found
            if found.state in ENDED:
                return
        elif time.monotonic() - told > BEAT:
            told = time.monotonic()
            yield None
        await asyncio.sleep(LOOKED)


class Watch:
    """The part of a tab that looks at one job: its progress, its Stop button, and what may be tried when it failed.

    kind: of job, and `also` further ones; a page that is opened finds its own last one, else the newest of all. kept: the browser's memory, {kind: job}.
    Make it where the progress is to stand; `show` says what else follows the job; then `starts` for each button that starts one.
    """

    def __init__(self, engine: Engine, kind: str, kept: gr.BrowserState, also: tuple[str, ...] = ()) -> None:
        self.engine, self.kind, self.kept, self.kinds = engine, kind, kept, (kind, *also)
        self.job = gr.State("")
        self.progress = shown(visible=False, elem_classes="progress")
        with gr.Row(visible=False, elem_classes="remedies") as self.row:
            self.remedies = [gr.Button(visible=False, size="sm") for _ in range(REMEDIES)]
        self.asked = gr.State([])
        self.stop: gr.Button | None = None
        self.own: list[Component] = []
        self._running: Callable[[Snapshot], Updates] = lambda snapshot: {}
        self._over: Callable[[Job], Updates] = lambda job: {}
        self._looked_at: dict[str, str] = {}

    def show(self, outputs: list[Component], running: Callable[[Snapshot], Updates], over: Callable[[Job], Updates]) -> None:
        """outputs: everything that `running` (of a snapshot) and `over` (of a job that is done) update."""
        self.own, self._running, self._over = outputs, running, over
        for number, button in enumerate(self.remedies):
            self.starts(button.click, functools.partial(_nth, number), [self.asked])

    def stop_button(self) -> gr.Button:
        """Make it, where it is to stand. Escape presses it."""
        self.stop = gr.Button("Stop", interactive=False, elem_classes="halt", variant="stop", min_width=96)
        self.stop.click(in_words(self._stop), [self.job], [self.stop], **TOLD)
        return self.stop

    def starts(self, event: Callable[..., Any], ask: Callable[..., dict[str, Any]], inputs: list[Component], js: str | None = None) -> Any:
        """On `event`, submit the request that `ask` makes of the values of `inputs`, and follow it."""

        def submit(kept: dict[str, str], *values: Any) -> tuple[dict[str, str], str]:
            return self.submitted(kept, ask(*values))

        begun = event(in_words(submit), [self.kept, *inputs], [self.kept, self.job], js=js, **TOLD)
        self.follows(begun.success)
        return begun

    def submitted(self, kept: dict[str, str] | None, request: dict[str, Any]) -> tuple[dict[str, str], str]:
        """Submit it, and remember it as this tab's job."""
        job = self.engine.submit(request)
        return {**(kept or {}), self.kind: job.id}, job.id

    def follows(self, event: Callable[..., Any]) -> Any:
        """On `event`, look at the job that `self.job` names."""
        return event(
            self._follow, [self.job], self.outputs, concurrency_limit=None, trigger_mode="multiple", **HIDDEN,
        )  # fmt: skip

    @property
    def outputs(self) -> list[Component]:
        """All that following updates."""
        assert self.stop is not None
        return [self.stop, self.progress, self.row, self.asked, *self.remedies, *self.own]

    def found_again(self, kept: dict[str, str] | None) -> str:
        """The job that a page which is opened now looks at: the browser's last one, else the newest of all; "" where there is none."""
        known = (kept or {}).get(self.kind, "")
        try:
            return self.engine.job(str(known)).id
        except UsageError:
            newest = self.engine.jobs.list(1, kinds=self.kinds)
            return newest[0].id if newest else ""

    # --- handlers ---------------------------------------------------------------------------------

    def _stop(self, job: str) -> Any:
        if job and not self.engine.cancel(job).over:
            return gr.update(value="Stopping…", interactive=False)
        return gr.update(value="Stop", interactive=False)

    async def _follow(self, job: str, request: gr.Request) -> AsyncIterator[Updates]:
        """The newest job that a page looks at wins: an older follower of it ends."""
        yield {self.progress: gr.skip()}  # a follower that yields nothing at all would empty what it updates
        if not job:
            return
        page = str(request.session_hash)
        self._looked_at[page] = job
        try:
            async for snapshot in snapshots(self.engine, job, lambda: self._looked_at.get(page) == job):
                yield await asyncio.to_thread(self.updates, job, snapshot) if snapshot is not None else {self.progress: gr.skip()}
        finally:
            if self._looked_at.get(page) == job:
                del self._looked_at[page]

    def updates(self, job: str, snapshot: Snapshot) -> Updates:
        """What the page shows of a job."""
        if snapshot.state not in ENDED:
            return {**self._standing(snapshot, []), **self._running(snapshot)}
        found = self.engine.job(job)
        remedies = self.engine.remedies(found)[:REMEDIES]
        sentence = failure(found, remedies)
        changed = self._standing(snapshot.but(note=sentence or snapshot.note), remedies)
        return {**changed, **(self._over(found) if found.state == "done" else {})}

    def _standing(self, snapshot: Snapshot, remedies: list[dict[str, Any]]) -> Updates:
        """Progress, Stop and remedies."""
        stopping, over = snapshot.phase == "Stopping", snapshot.state in ENDED
        buttons = {
            button: gr.update(value=remedies[number]["label"], visible=True) if number < len(remedies) else gr.update(visible=False)
            for number, button in enumerate(self.remedies)
        }
        assert self.stop is not None
        return {
            self.stop: gr.update(value="Stopping…" if stopping and not over else "Stop", interactive=not (over or stopping)),
            self.progress: gr.update(value=progress(standing(snapshot)), visible=snapshot.state != "done"),
            self.row: gr.update(visible=bool(remedies)), self.asked: [remedy["request"] for remedy in remedies], **buttons,
        }  # fmt: skip


def _nth(number: int, requests: list[dict[str, Any]]) -> dict[str, Any]:
    if number >= len(requests):
        raise UsageError("There is nothing to try again.")
    return requests[number]
