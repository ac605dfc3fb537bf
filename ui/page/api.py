"""Named endpoints for `gradio_client`: ids go in and come out, and files only as files that the page serves.

    client = Client("http://127.0.0.1:7860")
    job = client.predict(prompt="a seven moving left", recipe="balanced", api_name="/generate")
    client.predict(job=job, api_name="/status")            # until its state is "done"
    facts, files = client.predict(job, api_name="/result")
"""

from __future__ import annotations

from typing import Any, cast

import gradio as gr
from gradio.events import api

from hasten.ui.engine import Engine
from hasten.ui.engine.jobs import Where
from hasten.ui.page.results import own_files
from hasten.ui.page.watch import in_words


def publish(engine: Engine) -> None:
    """Put the endpoints into the page that is being built."""
    for name, function in _asking(engine).items():
        api(in_words(function), api_name=name, concurrency_limit=None)

    def status(job: str) -> dict:  # type: ignore[type-arg]
        """Where a job stands: state, phase, step, steps, seconds_left, memory, skipped."""
        return _told(engine, job)

    def cancel(job: str) -> dict:  # type: ignore[type-arg]
        """Tell a job to stop; it has when its state is "cancelled"."""
        engine.cancel(job)
        return _told(engine, job)

    def queue() -> dict:  # type: ignore[type-arg]
        """Whether the queue is paused, and the ids of the jobs that wait, the next one first."""
        return {"paused": engine.jobs.paused, "waiting": [job.id for job in engine.jobs.queue()]}

    def pause() -> dict:  # type: ignore[type-arg]
        """Begin nothing more until /resume, also after a restart; what runs goes on. Gives what /queue gives."""
        engine.pause()
        return queue()

    def resume() -> dict:  # type: ignore[type-arg]
        """Go on with what waits. Gives what /queue gives."""
        engine.resume()
        return queue()

    def move(job: str, to: str) -> dict:  # type: ignore[type-arg]
        """Another turn for a job that waits. to: first, up, down or last. Gives what /queue gives."""
        engine.move(job, cast(Where, to))
        return queue()

    for each in (queue, pause, resume, move):
        api(in_words(each), api_name=each.__name__, concurrency_limit=None)
    api(in_words(status), api_name="status", concurrency_limit=None)
    api(in_words(cancel), api_name="cancel", concurrency_limit=None)
    _result(engine)


def _asking(engine: Engine) -> dict[str, Any]:
    """Endpoints that put a job into the queue and give its id. What is None is left to the model."""

    def submit(**values: Any) -> str:
        return engine.submit({key: value for key, value in values.items() if value is not None}).id

    def generate(
        prompt: str, model: str = "tiny-video", recipe: str = "balanced", seed: int = 0, negative: str = "", steps: int | None = None,
        guidance: float | None = None, width: int | None = None, height: int | None = None, frames: int | None = None, lora: str | None = None,
    ) -> str:  # fmt: skip
        """One picture or clip. recipe: a name or YAML. Gives the job's id."""
        return submit(
            kind="generate", prompt=prompt, model=model, recipe=recipe, seed=seed, negative=negative, steps=steps, guidance=guidance,
            width=width, height=height, frames=frames, lora=lora,
        )  # fmt: skip

    def compare(
        prompt: str, model: str = "tiny-video", recipes: list[str] | None = None, seed: int = 0, steps: int | None = None,
        width: int | None = None, height: int | None = None, frames: int | None = None,
    ) -> str:  # fmt: skip
        """The same noise plain and with each recipe (balanced and fast where none is named). Gives the job's id."""
        return submit(
            kind="compare", prompt=prompt, model=model, recipes=recipes, seed=seed, steps=steps, width=width, height=height, frames=frames
        )

    def text(prompt: str, model: str = "tiny-dllm", recipe: str = "text-balanced", length: int | None = None, seed: int = 0) -> str:
        """A text of a masked language model. length: new tokens. Gives the job's id."""
        return submit(kind="text", prompt=prompt, model=model, recipe=recipe, length=length, seed=seed)

    def decode(
        prompt: str, model: str = "tiny-lm", recipe: str = "look-up", length: int = 96, temperature: float = 0.0, top_k: int | None = None,
        seed: int = 0,
    ) -> str:  # fmt: skip
        """A prompt that a causal language model goes on with, drafted by a recipe. Gives the job's id."""
        return submit(
            kind="decode", prompt=prompt, model=model, recipe=recipe, length=length, temperature=float(temperature), top_k=top_k, seed=seed
        )

    def tune(model: str, prompts: list[str], budget: str = "psnr>=30", seconds: float = 120.0, seed: int = 0, steps: int | None = None) -> str:
        """The fastest recipe that keeps a budget on four or more prompts. Gives the job's id."""
        return submit(kind="tune", model=model, prompts=prompts, budget=budget, seconds=float(seconds), seed=seed, steps=steps)

    return {"generate": generate, "compare": compare, "text": text, "decode": decode, "tune": tune}


def _result(engine: Engine) -> None:
    """`/result` has components, because files are served by them."""
    job, facts, files = gr.Textbox(visible=False), gr.JSON(visible=False), gr.Files(visible=False)

    def result(job: str) -> tuple[dict[str, Any], list[str]]:
        """What a job gave, and its files; state and error where it gave nothing."""
        found = engine.job(job)
        output = found.result.get("output")
        names = own_files(engine.outputs.get(output)) if output else []
        told = {"job": found.id, "kind": found.kind, "state": found.state, "result": found.result, "error": _error(found.error)}
        return told, [str(engine.outputs.file(str(output), name)) for name in names]

    trigger = gr.Button(visible=False)
    trigger.click(in_words(result), [job], [facts, files], api_name="result", concurrency_limit=None, show_progress="hidden")


def _told(engine: Engine, job: str) -> dict[str, Any]:
    """A job's standing, without what only pages need."""
    found = engine.snapshot(job).to_dict()
    error = _error(engine.job(job).error)
    return {key: value for key, value in found.items() if key not in ("data", "preview", "number")} | ({"error": error} if error else {})


def _error(error: dict[str, Any]) -> dict[str, Any]:
    """Without its traceback, which has paths of this machine in it."""
    return {key: error[key] for key in ("kind", "sentence") if key in error}
