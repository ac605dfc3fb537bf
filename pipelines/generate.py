"""The service behind `hasten generate`: a request goes in, results come out one by one."""

from __future__ import annotations

import importlib.util
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from hasten.errors import ModelError, UsageError, nearest
from hasten.limits import Limits
from hasten.pipelines import sizes, tiny_models
from hasten.pipelines.generate_searched import NoiseChoice
from hasten.pipelines.noise_search import Searched
from hasten.pipelines.seams.few_calls import overruled_by
from hasten.pipelines.session import Session


@dataclass(frozen=True, slots=True)
class Prompt:
    """One thing to generate. index: its place in the whole request, kept when it is split over processes."""

    text: str
    seed: int = 0
    index: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate. None leaves a value to the model.

    extra: further keyword arguments of the pipeline's `__call__`, plain values only.
    """

    prompts: tuple[Prompt, ...]
    negative_prompt: str | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """One finished prompt. frames: float32 in [0, 1], frame x height x width x channel; an image is one frame.

    seconds: wall time of the pipeline's call. run: its index in the session's trace. searched: what the search over noises
    that chose it came to, whose runs are `runs` of the trace and all count in `seconds`.
    """

    prompt: Prompt
    frames: numpy.ndarray[Any, Any]
    seconds: float
    run: int
    searched: Searched | None = None
    runs: range = range(0)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a request stands after a solver step.

    done: prompts that are finished. step: solver steps done of this prompt. skipped: share of the block
    work left out so far.
    """

    done: int
    prompts: int
    step: int
    steps: int
    skipped: float


OnProgress = Callable[[Progress], None]

# What hasten sets itself, or what would change what comes back.
_RESERVED = {
    "prompt",
    "generator",
    "output_type",
    "return_dict",
    "latents",
    "num_images_per_prompt",
    "num_videos_per_prompt",
}
_NAMES = {
    "negative_prompt": "negative_prompt",
    "steps": "num_inference_steps",
    "height": "height",
    "width": "width",
    "frames": "num_frames",
    "guidance": "guidance_scale",
}


def makes_video(pipe: Any) -> bool:
    """Whether `pipe` makes several frames per prompt."""
    return "num_frames" in inspect.signature(pipe.__call__).parameters


def plan(pipe: Any, request: Request, limits: Limits | None = None) -> dict[str, Any]:
    """The keyword arguments `pipe` will be called with, all checked. Raises before any work is done."""
    known = inspect.signature(pipe.__call__).parameters
    name = type(pipe).__name__
    if "prompt" not in known:
        raise ModelError(
            f"{name} takes no prompt, so hasten generate cannot drive it. Use hasten.accelerate in Python."
        )
    call = tiny_models.call_defaults(pipe)
    call |= arguments_of(pipe, {own: getattr(request, own) for own in _NAMES}) | overruled_by(pipe)
    for key, value in request.extra.items():
        if key not in known or key in _RESERVED or key.startswith("callback"):
            allowed = sorted(own for own in set(known) - _RESERVED - {"kwargs"} if not own.startswith("callback"))
            meant = nearest(key, allowed) or f" It takes {', '.join(allowed)}."
            raise UsageError(f"{name} cannot be given {key!r} here.{meant}")
        call[key] = value
    _check(pipe, request, call, limits or Limits())
    if "use_resolution_binning" in known:
        # Binning would quietly make another size and stretch it.
        call.setdefault("use_resolution_binning", False)
    if "clean_caption" in known and importlib.util.find_spec("bs4") is None:
        call.setdefault("clean_caption", False)  # what the pipeline falls back to, with a page of warnings
    return call | {"output_type": "np"}


def arguments_of(pipe: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values under our names (steps, frames, guidance, ...) as keyword arguments of `pipe`; None is left out.

    Raises `UsageError` for a value that this pipeline has no argument for.
    """
    known = inspect.signature(pipe.__call__).parameters
    call = {}
    for own, value in values.items():
        if value is None:
            continue
        if _NAMES[own] not in known:
            raise UsageError(
                f"{type(pipe).__name__} has no {_NAMES[own]}, so {own} = {value!r} does not apply. Leave it out."
            )
        call[_NAMES[own]] = value
    return call


def _check(pipe: Any, request: Request, call: dict[str, Any], limits: Limits) -> None:
    texts = [prompt.text for prompt in request.prompts]
    limits.check(
        prompts=texts,
        height=call.get("height"),
        width=call.get("width"),
        num_frames=call.get("num_frames"),
        num_inference_steps=call.get("num_inference_steps"),
        guidance_scale=call.get("guidance_scale"),
    )
    if call.get("negative_prompt"):
        limits.check(prompts=[call["negative_prompt"]])
    for prompt in request.prompts:
        if not 0 <= prompt.seed < 2**63:
            raise UsageError(f"A seed must lie between 0 and 2**63 - 1, got {prompt.seed}.")
    sizes.check_size(pipe, call.get("height"), call.get("width"), call.get("num_frames"))


def generate(
    pipe: Any,
    session: Session,
    request: Request,
    *,
    limits: Limits | None = None,
    on_progress: OnProgress | None = None,
    search: NoiseChoice | None = None,
) -> Iterator[Result]:
    """Generate every prompt of `request` with `pipe` inside the open `session`, in order, one at a time.

    Noise is drawn on the CPU, so that a seed gives the same start on every device. search: try several noises for each prompt,
    from its seed on, and give the best.
    """
    call = plan(pipe, request, limits)
    total = len(request.prompts)
    for done, prompt in enumerate(request.prompts):
        before, started = len(session.trace.runs), time.perf_counter()
        with _watched(session, done, total, on_progress):
            if search is None:
                output = pipe(prompt=prompt.text, generator=torch.Generator("cpu").manual_seed(prompt.seed), **call)
                found = None
            else:
                found = search.best_of(pipe, prompt.text, prompt.seed, call)
        seconds = time.perf_counter() - started
        runs = range(before, len(session.trace.runs))
        if found is None:
            yield Result(prompt, frames_of(output), seconds, runs[-1] if runs else -1, runs=runs)
        else:
            whole = len(runs) == len(found.candidates)  # one run each, and none walked in parts
            best = runs[found.best.number] if whole else len(session.trace.runs) - 1
            yield Result(prompt, _finite(found.frames), seconds, best, found, runs)


def frames_of(output: Any) -> numpy.ndarray[Any, Any]:
    """The first video or image of a pipeline's output (`output_type="np"`) as frames; `ModelError` if neither."""
    batch = getattr(output, "frames", None)
    if batch is None:
        images = getattr(output, "images", None)
        if images is None:
            raise ModelError(
                f"{type(output).__name__} holds neither images nor frames; hasten cannot write it."
            )
        batch = numpy.asarray(images)[:, None]
    return _finite(batch[0])


def _finite(frames: Any) -> numpy.ndarray[Any, Any]:
    """As float32 in [0, 1]."""
    frames = numpy.asarray(frames, dtype=numpy.float32)
    if not numpy.isfinite(frames).all():
        raise ModelError(
            "The result is not finite (NaN or Inf). Try --dtype float32 or bfloat16, or fewer changes."
        )
    clipped: numpy.ndarray[Any, Any] = frames.clip(0.0, 1.0)
    return clipped


@contextmanager
def _watched(session: Session, done: int, total: int, on_progress: OnProgress | None) -> Iterator[None]:
    """Report solver steps, which the session's clock sees on any pipeline, whether it has callbacks or not."""
    if on_progress is None:
        yield
        return
    told = 0.0

    def tick(_: Any) -> None:
        nonlocal told
        step, now = session.step, time.perf_counter()
        # Counting what was skipped costs a millisecond, which fast steps should not pay each time.
        if step is not None and (now - told > 0.1 or step.last):
            told = now
            on_progress(Progress(done, total, step.index + 1, step.total, session.skipped))

    session.clock.on_tick.append(tick)
    try:
        yield
    finally:
        session.clock.on_tick.remove(tick)
