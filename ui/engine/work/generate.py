"""A picture or a clip: the service behind `hasten generate`, on a pipeline that is kept warm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hasten.errors import UsageError
from hasten.ui.engine.desk import Desk
from hasten.ui.engine.preview import Previews
from hasten.ui.engine.report import Report
from hasten.ui.engine.request import Generate, Picture

if TYPE_CHECKING:
    from hasten.pipelines.generate import Progress
    from hasten.pipelines.generate import Request as Call
    from hasten.recipe import Recipe

FPS = 8
"""Of clips of few frames (the bundled models), which would be over in a moment at the usual rate."""

USUAL_FPS = 16
LONG = 33
"""Frames from which a clip has the usual rate."""


def generate(ask: Generate, desk: Desk, report: Report) -> dict[str, Any]:
    """Result: {"output", "media", "thumb", "trace", "row", "warnings", "seconds"}; `row` has the design's keys."""
    from hasten.pipelines import generate as service
    from hasten.pipelines.accelerate import accelerate

    recipe, call = desk.recipe(ask.recipe), call_of(ask)
    with desk.pipeline(ask.model, ask.lora, report) as pipe:
        check_pictures(pipe, ask.model)
        steps = int(service.plan(pipe, call, desk.limits).get("num_inference_steps", 0))
        seen = Previews(pipe, ask, desk.place, report)
        with _told(), accelerate(pipe, recipe, limits=desk.limits) as session, seen.watching(session):
            used = service.plan(pipe, call, desk.limits)  # a student has steps and guidance of its own
            report.phase("Denoising", steps)
            [made] = service.generate(pipe, session, call, limits=desk.limits, on_progress=lambda where: _step(where, report))
            seen.learn(made.frames)
        account = session.report()
    report.phase("Saving")
    frames, height, width, _ = made.frames.shape
    row = {
        "model": ask.model, "recipe": recipe.name or "custom", "seconds": made.seconds, "computed_fraction": account.computed_fraction,
        "nfe": account.nfe, "bytes_held": account.bytes_held, "frames": frames, "height": height, "width": width, "seed": ask.seed,
    }  # fmt: skip
    about = facts(ask, recipe, used)
    with desk.outputs.making(ask) as out:
        name = out.media("result", made.frames, fps=rate(frames), about=about)
        thumb = out.thumb(made.frames)
        trace = out.json("trace.json", account.to_dict())
        out.facts = {"media": name, "thumb": thumb, "trace": trace, "row": row, "warnings": account.warnings, "fps": rate(frames)}
    return {"output": out.id, **out.facts, "seconds": made.seconds}


def call_of(ask: Picture) -> Call:
    """What the service behind `hasten generate` is asked."""
    from hasten.pipelines.generate import Prompt, Request

    return Request(
        (Prompt(ask.prompt, ask.seed),), negative_prompt=ask.negative or None, steps=ask.steps, height=ask.height, width=ask.width,
        frames=ask.frames, guidance=ask.guidance,
    )  # fmt: skip


def facts(ask: Picture, recipe: Recipe, call: dict[str, Any]) -> dict[str, Any]:
    """What stands in a file's metadata, in the words that other programs read."""
    from hasten.report_forms import installed_versions

    return {
        "prompt": ask.prompt, "negative_prompt": ask.negative or None, "seed": ask.seed, "model": ask.model, "recipe": recipe,
        "steps": call.get("num_inference_steps"), "guidance_scale": call.get("guidance_scale"), "versions": installed_versions(),
    }  # fmt: skip


def check_pictures(pipe: Any, model: str) -> None:
    """Raise `UsageError` for a model that makes something else."""
    if not hasattr(pipe, "scheduler"):
        raise UsageError(f"{model} is a {type(pipe).__name__}, which makes no pictures by denoising. Choose an image or video model.")


def rate(frames: int) -> int:
    """Frames per second."""
    return USUAL_FPS if frames >= LONG else FPS


def _step(where: Progress, report: Report) -> None:
    report.step(where.step, where.steps, skipped=where.skipped)
    if where.step >= where.steps:
        report.phase("Decoding")


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Warnings of the session stand in its report, which the page shows."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="hasten: ")
        yield
