"""Speed and similarity of recipes against the plain run, with the controls, the oracle and the peers beside them.

All runs share one process, one set of weights and, per sample, one initial noise. A sample is a prompt and a
seed; every candidate runs on every sample right after the plain run on it, so that speed-ups are ratios of
neighbours and drift of the machine cancels.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hasten import metrics
from hasten.caching.network import NetworkReuse
from hasten.pipelines.accelerate import accelerate
from hasten.pipelines.candidates import Candidate, fewer_steps, ours, peers
from hasten.pipelines.oracle import Recording, as_rule, record, search
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.recipe import Recipe

Frames = NDArray[np.float64]
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with one seed."""

    prompt: str
    seed: int


@dataclass(slots=True)
class Shot:
    """One generation. frames: (F, H, W, C) in [0, 1]. latents: final latents. seconds: wall time of the call."""

    frames: Frames
    latents: torch.Tensor | None
    seconds: float
    computed_fraction: float | None = None
    nfe: float | None = None
    bytes_held: int | None = None


@dataclass(slots=True)
class Column:
    """All shots of one candidate, in the order of the samples; and the neighbouring plain times."""

    candidate: Candidate
    shots: list[Shot] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    nfe: int = 0


def shoot(pipe: Any, sample: Sample, call: dict[str, Any], candidate: Candidate | None = None) -> Shot:
    """Generate one sample, with `candidate` applied; latents are kept where the pipeline reports them."""
    latents: list[torch.Tensor] = []

    def keep(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents[:] = [values["latents"]]
        return values

    arguments = {**call, "prompt": sample.prompt, "generator": torch.Generator().manual_seed(sample.seed)}
    if "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:
        arguments["callback_on_step_end"] = keep
    if candidate is not None and candidate.steps is not None:
        arguments["num_inference_steps"] = candidate.steps
    if candidate is None:
        began = time.perf_counter()
        output = pipe(**arguments, output_type="np")
        return Shot(frames_of(output), latents[0] if latents else None, time.perf_counter() - began)
    with candidate.apply(pipe) as session:
        began = time.perf_counter()
        output = pipe(**arguments, output_type="np")
        seconds = time.perf_counter() - began
    shot = Shot(frames_of(output), latents[0] if latents else None, seconds)
    if session is not None:
        report = session.report()
        shot.computed_fraction, shot.nfe, shot.bytes_held = report.computed_fraction, report.nfe, report.bytes_held
    return shot


def frames_of(output: Any) -> Frames:
    """(F, H, W, C) float64 in [0, 1] of a pipeline's first video or image."""
    first = output.frames[0] if hasattr(output, "frames") else output.images[0]
    array = np.asarray(first, dtype=np.float64)
    return array if array.ndim == 4 else array[None]


def bench_recipes(
    pipe: Any,
    call: dict[str, Any],
    samples: Sequence[Sample],
    recipes: Sequence[str] = ("balanced", "fast"),
    *,
    model: str = "",
    converged_steps: int = 200,
    with_oracle: bool = True,
    with_peers: bool = True,
    tell: Tell = lambda _: None,
) -> list[dict[str, Any]]:
    """Rows with the keys of the design: the plain run, `recipes`, both controls, the oracle and the peers.

    converged_steps: plain steps of the run that stands for the exact solution, which every row's distance to is given.
    That run, the oracle and the peers are made for one seed per prompt (`n`, `n_converged` say so), the rest for all.
    """
    samples = sorted(samples, key=lambda sample: sample.seed)
    few = samples[: len({sample.prompt for sample in samples})]
    chosen = {name: find_recipe(name) for name in recipes}
    candidates = [ours(name, recipe) for name, recipe in chosen.items()]
    tell("warm-up")
    warm = {**call, "num_inference_steps": min(6, call["num_inference_steps"])}
    shoot(pipe, samples[0], warm, ours("plain", "plain"))
    branches = _branches(pipe, call)
    budgets = sorted({round((shoot(pipe, samples[0], call, c).nfe or 0) / branches) for c in candidates[:2]})
    candidates += [fewer_steps(solver, steps) for steps in budgets for solver in ("euler", "unipc", "dpm++")]
    plain, columns = Column(ours("plain", "plain")), [Column(candidate) for candidate in candidates]
    plain.nfe = branches * call["num_inference_steps"]
    recordings = _main_phase(pipe, call, samples, plain, columns, tell)
    if with_oracle:
        columns += _oracle_phase(pipe, call, few, recordings, chosen, plain, tell)
    if with_peers:
        columns += _peer_phase(pipe, call, few, tell)
    exact = []
    for number, sample in enumerate(few):
        tell(f"converged run {number + 1}")
        exact.append(shoot(pipe, sample, {**call, "num_inference_steps": converged_steps}).frames)
    rows = [_row(model, plain, plain, samples, exact), _other_seed(model, plain, samples)]
    return rows + [_row(model, column, plain, samples, exact) for column in columns]


def _branches(pipe: Any, call: dict[str, Any]) -> int:
    """Evaluations per step of the plain run."""
    with accelerate(pipe, "plain") as run:
        shoot(pipe, Sample("a", 0), {**call, "num_inference_steps": 2})
    return max(1, round(run.report().nfe / 2))


def _main_phase(
    pipe: Any, call: dict[str, Any], samples: Sequence[Sample], plain: Column, columns: list[Column], tell: Tell
) -> list[Recording]:
    recordings: list[Recording] = []
    for number, sample in enumerate(samples):
        tell(f"sample {number + 1} of {len(samples)}: {sample.prompt}, seed {sample.seed}")
        with record(pipe.scheduler) as recorded:
            plain.shots.append(shoot(pipe, sample, call))
        recordings += recorded
        plain.plain_seconds.append(plain.shots[-1].seconds)
        for column in columns:
            column.shots.append(shoot(pipe, sample, call, column.candidate))
            column.plain_seconds.append(plain.shots[-1].seconds)
    return recordings


def _oracle_phase(
    pipe: Any,
    call: dict[str, Any],
    samples: Sequence[Sample],
    recordings: list[Recording],
    chosen: dict[str, Recipe],
    plain: Column,
    tell: Tell,
) -> list[Column]:
    """For each schedule-based recipe: the best schedule per sample, found on that sample's own recorded run."""
    columns = []
    for name, recipe in chosen.items():
        policy = recipe.reuse
        if not isinstance(policy, NetworkReuse) or not hasattr(policy.rule, "computed"):
            continue
        tell(f"oracle of {name}")
        computed = policy.rule.computed(call["num_inference_steps"], recordings[0].times)
        column = Column(Candidate(f"{name}, oracle schedule", lambda _: None, "oracle"))  # type: ignore[arg-type,return-value]
        for sample, recording, shot in zip(samples, recordings, plain.shots, strict=False):
            best = search(policy, [recording], len(computed), starts=1, rounds=2)
            rule = as_rule(best, len(recording.times))
            own = Recipe(name=name, reuse=policy.model_copy(update={"rule": rule}))
            column.shots.append(shoot(pipe, sample, call, ours(name, own)))
            column.plain_seconds.append(shot.seconds)
        columns.append(column)
    return columns


def _peer_phase(pipe: Any, call: dict[str, Any], samples: Sequence[Sample], tell: Tell) -> list[Column]:
    """Other libraries, each enabled once and disabled again; plain runs are timed again beside them."""
    columns = [Column(candidate) for candidate in peers()]
    again = statistics.median(shoot(pipe, sample, call).seconds for sample in samples[:5])
    for column in columns:
        tell(column.candidate.recipe)
        shoot(pipe, samples[0], {**call, "num_inference_steps": 6}, column.candidate)
        for sample in samples:
            column.shots.append(shoot(pipe, sample, call, column.candidate))
            column.plain_seconds.append(again)
    return columns


def _row(
    model: str, column: Column, plain: Column, samples: Sequence[Sample], exact: list[Frames]
) -> dict[str, Any]:
    shots = column.shots
    similarity = metrics.summary([metrics.psnr(p.frames, s.frames) for p, s in zip(plain.shots, shots, strict=False)])
    to_exact = [metrics.psnr(e, s.frames) for e, s in zip(exact, shots, strict=False)]
    ratios = [p / s.seconds for p, s in zip(column.plain_seconds, shots, strict=True)]
    latents = [
        metrics.latent_error(p.latents, s.latents)
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
        "computed_fraction": _median(s.computed_fraction for s in shots),
        "nfe": _median(s.nfe for s in shots),
        "psnr_median": similarity["median"],
        "psnr_worst": similarity["worst"],
        "psnr_converged": metrics.summary(to_exact)["median"] if to_exact else None,
        "n_converged": len(to_exact),
        "ssim_median": statistics.median(metrics.ssim(p.frames, s.frames) for p, s in zip(plain.shots, shots, strict=False)),
        "latent_error": statistics.median(latents) if latents else None,
        "bytes_held": _median(s.bytes_held for s in shots),
    }
    if plain.shots is shots:  # the reference row: similarity to itself says nothing
        row["psnr_median"] = row["psnr_worst"] = row["ssim_median"] = row["latent_error"] = None
        row["nfe"], row["computed_fraction"] = float(plain.nfe), 1.0
    return row | _judged([s.frames for s in shots], samples[: len(shots)])


def _judged(videos: list[Frames], samples: Sequence[Sample]) -> dict[str, Any]:
    """What the judge reads: share of prompts drawn as asked, Frechet distance and recall of its features."""
    from hasten.pipelines.judge import Judge, recall

    judge = Judge.load()
    kind = "video" if videos[0].shape[0] > 1 else "image"
    features = judge.features(videos)
    return {
        "prompt_accuracy": judge.prompt_accuracy(videos, [sample.prompt for sample in samples])["all"],
        "frechet": judge.frechet_to_real(features, kind),
        "recall": recall(judge.reference_features(kind), features),
    }


def _other_seed(model: str, plain: Column, samples: Sequence[Sample]) -> dict[str, Any]:
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


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
