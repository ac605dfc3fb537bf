"""Plain against recipes, on the same noise: how much faster, how similar, what was skipped."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from hasten import metrics
from hasten.errors import HastenError, UsageError
from hasten.limits import Limits
from hasten.pipelines.accelerate import accelerate
from hasten.pipelines.generate import Prompt, Request, frames_of, plan
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.recipe import Recipe
from hasten.report import Report
from hasten.session import Attachment


@dataclass(frozen=True, slots=True)
class Sample:
    """One run. latents: what the autoencoder was given, where the pipeline has one."""

    recipe: str
    prompt: Prompt
    frames: NDArray[Any]
    latents: torch.Tensor | None
    seconds: float
    report: Report


@dataclass(slots=True)
class Score:
    """What was measured of one recipe, one entry per prompt and seed."""

    seconds: list[float] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    nfe: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    latent_error: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    num_bytes: int = 0

    def add(self, sample: Sample, reference: Sample) -> None:
        self.seconds.append(sample.seconds)
        self.computed.append(sample.report.computed_fraction)
        self.nfe.append(sample.report.nfe)
        self.num_bytes = max(self.num_bytes, sample.report.bytes_held)
        if sample is reference:
            return
        self.same.append(numpy.array_equal(sample.frames, reference.frames))
        self.psnr.append(metrics.psnr(sample.frames, reference.frames))
        if min(sample.frames.shape[1:3]) >= 11:  # the window of SSIM
            self.ssim.append(metrics.ssim(sample.frames, reference.frames))
        if sample.latents is not None and reference.latents is not None:
            self.latent_error.append(metrics.latent_error(sample.latents, reference.latents))

    def row(self, name: str, plain: Score) -> dict[str, Any]:
        """The keys that the design fixes, as far as they apply."""
        row: dict[str, Any] = {
            "recipe": name,
            "seconds": statistics.median(self.seconds),
            "speedup": statistics.median(p / s for p, s in zip(plain.seconds, self.seconds, strict=True)),
            "computed_fraction": statistics.median(self.computed),
            "nfe": statistics.median(self.nfe),
            "bytes_held": self.num_bytes,
            "n": len(self.seconds),
        }
        if self is plain:
            return row
        psnr = metrics.summary(self.psnr)
        row |= {"psnr_median": psnr["median"], "psnr_worst": psnr["worst"], "exact_match": all(self.same)}
        if self.ssim:
            row["ssim_median"] = statistics.median(self.ssim)
        if self.latent_error:
            row["latent_error"] = statistics.median(self.latent_error)
        return row


OnSample = Callable[[Sample], None]


def compare(
    pipe: Any,
    recipes: Sequence[str | Path | Recipe],
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    limits: Limits | None = None,
    repeats: int = 1,
    on_sample: OnSample | None = None,
    **call: Any,
) -> list[dict[str, Any]]:
    """Run `pipe` plain and with each recipe, for every prompt and seed, and give one row per recipe.

    recipes: names, `Recipe`s or YAML paths. call: further arguments of the pipeline, such as
    `num_inference_steps=50`. repeats: how often each run is timed, in turns; its time is their median. on_sample: is given every run as soon as it is done, plain ones included.
    The first row is the plain one. `seconds` is the median wall time of a call after a warm-up of its own, `speedup`
    the median of plain over accelerated for the same prompt and seed; quality is against the plain run
    with the same noise, on raw frames. Raises as `accelerate` does, and `UsageError` for arguments that
    the pipeline does not take, before anything is run.
    """
    chosen = [find_recipe(which) for which in recipes]
    names = [recipe.name or f"recipe-{number}" for number, recipe in enumerate(chosen, 1)]
    if len({"plain", *names}) <= len(names):
        raise UsageError(
            f"Each recipe needs a name of its own, and 'plain' is always compared; got {', '.join(names)}."
            " Leave out what is there twice."
        )
    todo = tuple(Prompt(text, seed, index) for index, (text, seed) in enumerate(_pairs(prompts, seeds)))
    arguments = plan(pipe, Request(todo, extra=call), limits)
    plain, scores = Score(), [Score() for _ in chosen]
    _warm_up(pipe, chosen, todo[0], arguments, limits)
    for prompt in todo:
        reference = _sample(pipe, find_recipe("plain"), "plain", prompt, arguments, limits)
        plain.add(reference, reference)
        if on_sample is not None:
            on_sample(reference)
        for recipe, name, score in zip(chosen, names, scores, strict=True):
            sample = _sample(pipe, recipe, name, prompt, arguments, limits)
            score.add(sample, reference)
            if on_sample is not None:
                on_sample(sample)
        turns = [(plain, find_recipe("plain"), "plain"), *zip(scores, chosen, names, strict=True)]
        _time_again(turns, repeats - 1, lambda recipe, name: _sample(pipe, recipe, name, prompt, arguments, limits).seconds)  # noqa: B023
    rows = [score.row(name, plain) for name, score in zip(names, scores, strict=True)]
    return [plain.row("plain", plain), *rows]


def _time_again(
    turns: list[tuple[Score, Recipe, str]], times: int, run: Callable[[Recipe, str], float]
) -> None:
    """Time every candidate `times` more, in turns so that a busy moment hits all of them, and keep the median."""
    seconds = [[score.seconds[-1]] for score, _, _ in turns]
    for _ in range(times):
        for found, (_, recipe, name) in zip(seconds, turns, strict=True):
            found.append(run(recipe, name))
    for found, (score, _, _) in zip(seconds, turns, strict=True):
        score.seconds[-1] = statistics.median(found)


def _pairs(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    return ((text, seed) for text in prompts for seed in seeds)


def _warm_up(pipe: Any, recipes: Sequence[Recipe], prompt: Prompt, arguments: dict[str, Any], limits: Limits | None) -> None:
    """Two steps plain and two with each recipe, so that no timed run pays for lazy initialisation or for shapes of its own."""
    short = arguments | {"num_inference_steps": min(2, int(arguments.get("num_inference_steps", 2)))}
    pipe(prompt=prompt.text, generator=torch.Generator("cpu").manual_seed(prompt.seed), **short)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two steps leave nothing to skip; what a session has to say is said of its timed run
        for recipe in recipes:
            with suppress(HastenError), accelerate(pipe, recipe, limits=limits):  # so is what is wrong with it
                pipe(prompt=prompt.text, generator=torch.Generator("cpu").manual_seed(prompt.seed), **short)


def _sample(
    pipe: Any, recipe: Recipe, name: str, prompt: Prompt, arguments: dict[str, Any], limits: Limits | None
) -> Sample:
    with _latents_of(pipe) as seen, accelerate(pipe, recipe, limits=limits) as session:
        generator = torch.Generator("cpu").manual_seed(prompt.seed)
        started = time.perf_counter()
        output = pipe(prompt=prompt.text, generator=generator, **arguments)
        _wait_for_device()
        seconds = time.perf_counter() - started
        return Sample(name, prompt, frames_of(output), seen[-1] if seen else None, seconds, session.report())


@contextmanager
def _latents_of(pipe: Any) -> Iterator[list[torch.Tensor]]:
    """What the autoencoder is given, kept aside; every pipeline passes its final latents there."""
    seen: list[torch.Tensor] = []
    vae = getattr(pipe, "vae", None)
    attachment = Attachment()
    if vae is not None and hasattr(vae, "decode"):
        decode = vae.decode

        def keep(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen[:] = [z.detach().float().cpu()]
            return decode(z, *args, **kwargs)

        attachment.replace(vae, "decode", keep)
    try:
        yield seen
    finally:
        attachment.restore()


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
