"""History: what was made here, the queue, and settings back from a file."""

from __future__ import annotations

import functools
from typing import Any

import gradio as gr
from gradio.components import Component

from hasten.errors import UsageError
from hasten.ui.engine import ENDED, Engine, RequestError
from hasten.ui.engine.jobs import Where
from hasten.ui.engine.request import to_json
from hasten.ui.page.results import Shelf, recipe_words, title
from hasten.ui.page.sentences import said
from hasten.ui.page.watch import HIDDEN, TOLD, in_words
from hasten.ui.views.component import shown
from hasten.ui.views.gallery import gallery
from hasten.ui.views.progress import queue

LISTED = 30
"""Jobs in the list; of those that wait, all."""

MOVES: dict[str, Where] = {"First": "first", "Up": "up", "Down": "down"}
"""Buttons for a job that waits."""


class HistoryTab:
    """Nothing here follows a job: the lists are read anew whenever the tab is opened, and after each button."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.shelf = engine, Shelf(engine)
        self.output, self.job, self.asked = gr.State(""), gr.State(""), gr.State({})
        with gr.Row(equal_height=False, elem_classes="sides"):
            with gr.Column(scale=8, min_width=320):
                self.gallery = shown(gallery({}), elem_id="history-gallery")
                with gr.Row(visible=False, elem_classes="buttons chosen") as self.actions:
                    self.words = shown()
                    self.open = gr.Button("Open", variant="primary", size="sm", min_width=90)
                    self.restore = gr.Button("Restore its settings", size="sm", min_width=140)
                    self.export = gr.Button("Export", size="sm", min_width=90)
                    self.remove = gr.Button("Delete", variant="stop", size="sm", min_width=90)
            with gr.Column(scale=4, min_width=280):
                self.file = gr.File(
                    label="Restore settings from a file", file_types=[".png", ".mp4", ".gif", ".json", ".yaml", ".yml"],
                    type="binary", height=170, elem_id="history-file",
                )  # fmt: skip
                self.queue = shown(queue({}), elem_id="history-queue")
                with gr.Row(visible=False, elem_classes="buttons chosen") as self.job_actions:
                    self.job_words = shown()
                    self.moves = [gr.Button(label, size="sm", min_width=60, visible=False) for label in MOVES]
                    self.cancel = gr.Button("Stop it", size="sm", min_width=80)
                    self.again = gr.Button("Try again", size="sm", min_width=80)
                    self.forget = gr.Button("Remove", size="sm", min_width=80)
                with gr.Row(elem_classes="buttons"):
                    self.pause = gr.Button(**self._pause_words(), size="sm", min_width=120, elem_id="history-pause")
                    self.refresh = gr.Button("Look again", size="sm", min_width=100)
        self._events()

    def _events(self) -> None:
        self.gallery.select(in_words(self.choose), None, [self.output, self.actions, self.words], **TOLD)
        self.queue.select(in_words(self.choose_job), None, [self.job, self.job_actions, self.job_words, *self.moves], **TOLD)
        for button, to in zip(self.moves, MOVES.values(), strict=True):
            button.click(in_words(functools.partial(self.move, to)), [self.job], [self.queue], **TOLD)
        self.pause.click(in_words(self.paused), None, [self.pause, self.queue], **TOLD)
        self.refresh.click(self.look, None, self.looks, queue=False, **HIDDEN)
        self.remove.click(in_words(self.removed), [self.output], self.looks, **TOLD)
        for button, act in ((self.cancel, self.engine.cancel), (self.again, self.engine.retry), (self.forget, self.engine.remove)):
            button.click(in_words(self._acting(act)), [self.job], self.looks, **TOLD)

    @property
    def looks(self) -> list[Component]:
        """All that `look` updates."""
        return [self.gallery, self.queue, self.actions, self.job_actions, self.pause]

    # --- handlers ---------------------------------------------------------------------------------

    def look(self) -> tuple[Any, ...]:
        """Both lists as they are now; nothing is chosen."""
        hidden = gr.update(visible=False)
        return gallery(self.shelf.gallery()), self.listed(), hidden, hidden, gr.update(**self._pause_words())

    def listed(self) -> str:
        """What runs, what waits in the order of its turns, then what is over, the newest first."""
        waiting = self.engine.jobs.queue()
        others = self.engine.jobs.list(LISTED, states=("running", *ENDED))
        jobs = [*(job for job in others if not job.over), *waiting, *(job for job in others if job.over)][: max(LISTED, len(waiting))]
        return queue({"jobs": [{"id": job.id, "title": title(job.asked), "state": job.state} for job in jobs]})

    def _pause_words(self) -> dict[str, Any]:
        paused = self.engine.jobs.paused
        return {"value": "Go on with the queue" if paused else "Pause the queue", "variant": "primary" if paused else "secondary"}

    def paused(self) -> tuple[Any, str]:
        """The other way round than it is. What runs goes on."""
        if self.engine.jobs.paused:
            self.engine.resume()
        else:
            self.engine.pause()
        return gr.update(**self._pause_words()), self.listed()

    def move(self, to: Where, job: str) -> str:
        """Another turn for the job that is chosen, which stays chosen."""
        if not job:
            raise UsageError("Choose a job of the list first.")
        self.engine.move(job, to)
        return self.listed()

    def choose(self, event: gr.EventData) -> tuple[str, Any, str]:
        """A card of the gallery."""
        found = self.shelf.result(str(event.id))
        return found["output"], gr.update(visible=True), said(title(found["request"]))

    def choose_job(self, event: gr.EventData) -> tuple[Any, ...]:
        """A row of the queue."""
        job = self.engine.job(str(event.id))
        words = str(job.error.get("sentence") or f"{title(job.asked)} ({recipe_words(job.asked) or job.kind})")
        return job.id, gr.update(visible=True), said(words), *(gr.update(visible=job.state == "queued") for _ in MOVES)

    def chosen(self, output: str) -> dict[str, Any]:
        """The result that is chosen, with its request. Raises `UsageError` where none is."""
        if not output:
            raise UsageError("Choose a result first.")
        return self.shelf.result(output)

    def removed(self, output: str) -> tuple[Any, ...]:
        self.engine.outputs.remove(self.chosen(output)["output"])
        return self.look()

    def from_file(self, data: bytes | None) -> dict[str, Any]:
        """The request that a dropped file was made by."""
        import json

        if not data:
            raise RequestError("file", "nothing", "a PNG, MP4 or GIF that hasten made, a JSON file or a YAML recipe")
        asked: dict[str, Any] = json.loads(to_json(self.engine.restore(data)))
        return asked

    def _acting(self, act: Any) -> Any:
        def done(job: str) -> tuple[Any, ...]:
            if not job:
                raise UsageError("Choose a job of the list first.")
            act(job)
            return self.look()

        return done
