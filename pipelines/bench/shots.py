"""One generation, timed; and the row of a table that many of them make."""

from __future__ import annotations

import contextlib
import inspect
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hasten import metrics
from hasten.errors import UsageError
from hasten.pipelines.bench.candidates import Candidate
from hasten.session import Attachment
from hasten.trace import Trace

Frames = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with one seed."""

    prompt: str
    seed: int


@dataclass(slots=True)
class Shot:
    """One generation. frames: (F, H, W, C) in [0, 1]. latents: final latents. seconds: wall time of the call. busy: processor
    seconds of this process in it.

    density, rho: means over the attention calls of a recipe of sparse attention, its dense ones included, of the share of
    pairs that was read and of the estimated share of the mass; None without such a recipe, or where rho is not known.
    """

    frames: Frames
    latents: torch.Tensor | None
    seconds: float
    computed_fraction: float | None = None
    nfe: float | None = None
    bytes_held: int | None = None
    density: float | None = None
    rho: float | None = None
    warnings: tuple[str, ...] = ()
    busy: float = 0.0


@dataclass(slots=True)
class Column:
    """All shots of one candidate, in the order of the samples; and the neighbouring plain times."""

    candidate: Candidate
    shots: list[Shot] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    nfe: int = 0


def shoot(
    pipe: Any, sample: Sample, call: dict[str, Any], candidate: Candidate | None = None, decoded: bool = True
) -> Shot:
    """Generate one sample, with `candidate` applied.

    Latents are kept where the pipeline reports them, else as its autoencoder is given them. decoded: make frames of them too; a
    pipeline that does not report them decodes in any case.
    """
    latents: list[torch.Tensor] = []
    attachment = Attachment()

    def keep(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents[:] = [values["latents"]]
        return values

    frames = True
    arguments = {**call, "prompt": sample.prompt, "generator": torch.Generator().manual_seed(sample.seed)}
    if "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:
        arguments["callback_on_step_end"] = keep
        frames = decoded
    elif hasattr(getattr(pipe, "vae", None), "decode"):
        decode = pipe.vae.decode

        def kept(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            latents[:] = [z]
            return decode(z, *args, **kwargs)

        attachment.replace(pipe.vae, "decode", kept)
    if candidate is not None and candidate.steps is not None:
        arguments["num_inference_steps"] = candidate.steps
    try:
        with candidate.apply(pipe) if candidate is not None else contextlib.nullcontext() as session:
            began, worked = time.perf_counter(), time.process_time()
            output = pipe(**arguments, output_type="np" if frames else "latent")
            seconds, busy = time.perf_counter() - began, time.process_time() - worked
    finally:
        attachment.restore()
    shot = Shot(frames_of(output) if frames else np.empty(0), latents[0] if latents else None, seconds, busy=busy)
    if session is not None:
        report = session.report()
        shot.computed_fraction, shot.nfe, shot.bytes_held = (
            report.computed_fraction,
            report.nfe,
            report.bytes_held,
        )
        shot.warnings = tuple(report.warnings)
        shot.density, shot.rho = _attention(session.trace)
    return shot


def _attention(trace: Trace) -> tuple[float | None, float | None]:
    """Mean density and recall of the last run's attention calls."""
    calls = list(trace.attended(trace.runs[-1].index)) if trace.runs else []
    recalls = [1.0 if not call.sparse else call.recall for call in calls]
    known = [recall for recall in recalls if recall is not None]
    return (
        statistics.fmean(call.density for call in calls) if calls else None,
        statistics.fmean(known) if calls and len(known) == len(calls) else None,
    )


def frames_of(output: Any) -> Frames:
    """(F, H, W, C) float64 in [0, 1] of a pipeline's first video or image."""
    first = output.frames[0] if hasattr(output, "frames") else output.images[0]
    array = np.asarray(first, dtype=np.float64)
    return array if array.ndim == 4 else array[None]


def row_of(
    model: str, column: Column, plain: Column, samples: Sequence[Sample], exact: Sequence[Frames] = ()
) -> dict[str, Any]:
    """One row with the keys of the design. exact: frames of converged runs of the first samples, where they were made."""
    shots = column.shots
    similarity = metrics.summary(
        [metrics.psnr(p.frames, s.frames) for p, s in zip(plain.shots, shots, strict=False)]
    )
    to_exact = [metrics.psnr(e, s.frames) for e, s in zip(exact, shots, strict=False)]
    ratios = [p / s.seconds for p, s in zip(column.plain_seconds, shots, strict=True)]
    latents = [
        metrics.latent_error(s.latents, p.latents)
        for p, s in zip(plain.shots, shots, strict=False)
        if p.latents is not None and s.latents is not None
    ]
    row: dict[str, Any] = {
        "model": model,
        "recipe": column.candidate.recipe,
        "control": column.candidate.control or None,
        "n": len(shots),
        "seconds": statistics.median(s.seconds for s in shots),
        "speedup": statistics.median(ratios),
        "computed_fraction": median(s.computed_fraction for s in shots),
        "nfe": median(s.nfe for s in shots),
        "psnr_median": similarity["median"],
        "psnr_worst": similarity["worst"],
        "psnr_converged": metrics.summary(to_exact)["median"] if to_exact else None,
        "n_converged": len(to_exact),
        "ssim_median": statistics.median(
            metrics.ssim(p.frames, s.frames) for p, s in zip(plain.shots, shots, strict=False)
        ),
        "latent_error": statistics.median(latents) if latents else None,
        "bytes_held": median(s.bytes_held for s in shots),
    }
    if any(s.density is not None for s in shots):
        row |= {"density": median(s.density for s in shots), "rho": median(s.rho for s in shots)}
    if plain.shots is shots:  # the reference row: similarity to itself says nothing
        row["psnr_median"] = row["psnr_worst"] = row["ssim_median"] = row["latent_error"] = None
        row["nfe"], row["computed_fraction"] = float(plain.nfe), 1.0
    elif similarity["identical"] == len(shots):
        row["exact_match"] = True
    return row | judged([s.frames for s in shots], samples[: len(shots)])


def judged(videos: Sequence[Frames], samples: Sequence[Sample]) -> dict[str, Any]:
    """What the judge reads: share of prompts drawn as asked, Frechet distance and recall of its features.

    Empty for prompts that name no digit. The Frechet distance needs 2 runs, recall needs 4; None for fewer.
    """
    from hasten.pipelines.judge import Judge, parse_prompt, recall

    try:
        for sample in samples:
            parse_prompt(sample.prompt)
    except UsageError:
        return {}
    judge = Judge.load()
    kind = "video" if videos[0].shape[0] > 1 else "image"
    features = judge.features(videos)
    return {
        "prompt_accuracy": judge.prompt_accuracy(videos, [sample.prompt for sample in samples])["all"],
        "frechet": judge.frechet_to_real(features, kind) if len(videos) > 1 else None,
        "recall": recall(judge.reference_features(kind), features) if len(videos) > 3 else None,
    }


def other_seed(model: str, plain: Column, samples: Sequence[Sample]) -> dict[str, Any]:
    """The noise ceiling: how far apart two plain runs of one prompt with different seeds are."""
    by_prompt: dict[str, list[Shot]] = {}
    for sample, shot in zip(samples, plain.shots, strict=True):
        by_prompt.setdefault(sample.prompt, []).append(shot)
    pairs = [(shots[0], shots[1]) for shots in by_prompt.values() if len(shots) > 1]
    found = metrics.summary([metrics.psnr(a.frames, b.frames) for a, b in pairs]) if pairs else None
    return {
        "model": model, "recipe": "plain, another seed", "control": "other_seed", "n": len(pairs), "speedup": 1.0,
        "psnr_median": found["median"] if found else None, "psnr_worst": found["worst"] if found else None,
    }  # fmt: skip


def median(values: Iterable[float | None]) -> float | None:
    """The median of the known values; None when nothing is known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
