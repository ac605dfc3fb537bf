"""A picture or a clip: the service behind `hasten generate`, on a pipeline that is kept warm."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hasten.errors import UsageError
from hasten.report_forms import strict
from hasten.ui.engine.desk import Desk
from hasten.ui.engine.latents import Kept, keeping, tiled
from hasten.ui.engine.preview import Previews
from hasten.ui.engine.recipes import named
from hasten.ui.engine.report import Report
from hasten.ui.engine.request import Generate, Picture, to_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hasten.pipelines.generate import Progress
    from hasten.pipelines.generate import Request as Call
    from hasten.recipe import Recipe

FPS = 8
"""Of clips of few frames (the bundled models), which would be over in a moment at the usual rate."""

USUAL_FPS = 16
LONG = 33
"""Frames from which a clip has the usual rate."""


def generate(ask: Generate, desk: Desk, report: Report) -> dict[str, Any]:
    """Result: {"output", "media", "thumb", "trace", "row", "steps", "usual_steps", "warnings", "seconds"}; `row` has the design's
    keys. usual_steps: of the same run without the recipe; a student makes fewer.

    What was denoised is kept until the result is whole (`latents`); the engine forgets it then."""
    from hasten.pipelines import generate as service
    from hasten.pipelines.accelerate import accelerate

    if ask.latents is not None:
        return _decoded_again(ask, ask.latents, desk, report)
    recipe, call = desk.recipe(ask.recipe), call_of(ask)
    with desk.pipeline(ask.model, ask.lora, report) as pipe, tiled(pipe, ask.decoding == "tiles"):
        check_pictures(pipe, ask.model)
        steps = int(service.plan(pipe, call, desk.limits).get("num_inference_steps", 0))
        seen = Previews(pipe, ask, desk.place, report)
        with _told(), accelerate(pipe, recipe, limits=desk.limits) as session, seen.watching(session):
            used = service.plan(pipe, call, desk.limits)  # a student has steps and guidance of its own
            report.phase("Denoising", steps)
            began = time.perf_counter()
            with keeping(pipe, desk.place, report.now.job, lambda: _account(ask, session.report(), used, steps, time.perf_counter() - began)):
                [made] = service.generate(pipe, session, call, limits=desk.limits, on_progress=lambda where: _step(where, report))
            seen.learn(made.frames)
        told = _account(ask, session.report(), used, steps, made.seconds)
    return _kept(ask, desk, report, told, made.frames)


def _decoded_again(ask: Generate, job: str, desk: Desk, report: Report) -> dict[str, Any]:
    """The result of a run that failed behind its loop, from what it had denoised. Raises `UsageError` for that of another request."""
    kept = Kept.read(desk.place, job)
    if kept.facts["request"] != _plainly(ask):
        raise UsageError(f"Job {job} had denoised something else. Ask for the same as it did, or leave latents out.")
    with desk.pipeline(ask.model, ask.lora, report) as pipe, tiled(pipe, ask.decoding == "tiles"):
        report.phase("Decoding")
        began = time.perf_counter()
        frames = kept.decoded(pipe)
    row = {**kept.facts["row"], "seconds": kept.facts["row"]["seconds"] + time.perf_counter() - began}
    return _kept(ask, desk, report, {**kept.facts, "row": row}, frames)


def _account(ask: Generate, report: Any, used: dict[str, Any], usual: int, seconds: float) -> dict[str, Any]:
    """What is told of a run beside its frames, as plain JSON values."""
    row = {
        "model": ask.model, "recipe": named(ask.recipe), "seconds": seconds, "computed_fraction": report.computed_fraction,
        "nfe": report.nfe, "bytes_held": report.bytes_held, "seed": ask.seed,
    }  # fmt: skip
    call = {key: used.get(key) for key in ("num_inference_steps", "guidance_scale")}
    return {
        "request": _plainly(ask), "row": row, "call": call, "usual_steps": usual or None, "warnings": report.warnings, "trace": strict(report.to_dict()),
    }  # fmt: skip


def _kept(ask: Generate, desk: Desk, report: Report, told: dict[str, Any], frames: NDArray[Any]) -> dict[str, Any]:
    """The result, on the disk and as it is told. It names the request that makes it from the beginning."""
    report.phase("Saving")
    number, height, width, _ = frames.shape
    about = facts(ask, desk.recipe(ask.recipe), told["call"])
    with desk.outputs.making(ask.model_copy(update={"latents": None})) as out:
        out.facts = {
            "media": out.media("result", frames, fps=rate(number), about=about), "thumb": out.thumb(frames),
            "trace": out.json("trace.json", told["trace"]), "row": {**told["row"], "frames": number, "height": height, "width": width},
            "steps": told["call"]["num_inference_steps"], "usual_steps": told["usual_steps"], "warnings": told["warnings"], "fps": rate(number),
        }  # fmt: skip
    return {"output": out.id, **out.facts, "seconds": told["row"]["seconds"]}


def _plainly(ask: Generate) -> dict[str, Any]:
    """What was asked, without what decoding again may change."""
    asked: dict[str, Any] = json.loads(to_json(ask))
    return {key: value for key, value in asked.items() if key not in ("latents", "decoding", "preview")}


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
