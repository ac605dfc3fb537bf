"""The contest: one set of prompts and noise, and everybody who can make samples of it.

A student that makes a video chunk after chunk is sampled by the calls that it was trained for and no others; its evaluations are
counted in whole clips, as each sees its chunk alone (and finished chunks are seen once more).

Shapes: N samples; z, x0 [N, ...] in the scale of the network's input, of a clip [N, C, F, H, W] with F latent frames.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hasten.distill.bench.judged import measures
from hasten.distill.data.encode import decode
from hasten.distill.network.chunks import Chunks
from hasten.distill.network.few_steps import FewSteps, sample
from hasten.distill.network.host_call import Condition, learn
from hasten.distill.trained import Trained
from hasten.errors import UsageError
from hasten.pipelines import loading, tiny_models
from hasten.pipelines.accelerate import accelerate
from hasten.pipelines.judge import DIGITS, DIRECTIONS, SPEEDS
from hasten.pipelines.solver import FLOW, VARIANCE_PRESERVING, other_scheduler
from hasten.recipe import Recipe
from hasten.samplers.chunk_calls import ChunkCalls, spans
from hasten.samplers.few_calls import FewCalls
from hasten.session import Attachment

SEED = 77_000
"""Of the noise; trainings draw theirs from seeds of their own."""

PLACES = ("top left", "top right", "bottom left", "bottom right", "center")

BATCH = 50


def prompts(kind: str, count: int) -> list[str]:
    """`count` prompts in turn over all that the tiny models know: 100 of pictures, 80 of clips."""
    if kind == "video":
        all_of = [f"a {d} moving {way}, {speed}" for speed in SPEEDS for way in DIRECTIONS for d in DIGITS]
    else:
        all_of = [f"a {stroke} {d} at the {place}" for stroke in ("thin", "thick") for place in PLACES for d in DIGITS]
    return [all_of[i % len(all_of)] for i in range(count)]


@dataclass(frozen=True)
class Made:
    """Finished latents, evaluations of a conditional or unconditional row per sample (of whole samples: a chunk is a part of
    one), and processor seconds per sample."""

    x0: Tensor
    evaluations: float
    seconds: float


@dataclass(frozen=True)
class Contest:
    """model: of the teacher. call: its arguments. z: the noise; condition: what students are told."""

    model: str
    kind: str
    pipe: Any
    call: dict[str, Any]
    prompts: tuple[str, ...]
    z: Tensor
    condition: Condition
    teachers: dict[int, Made] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, model: str, count: int, call: dict[str, Any] | None = None, seed: int = SEED) -> Contest:
        """`count` samples of a bundled model of digits. Raises `UsageError` for a model that the judge cannot read."""
        kind = tiny_models.card(model)["kind"] if model in tiny_models.names() else "?"
        if kind not in ("image", "video"):
            known = [name for name in tiny_models.names() if tiny_models.card(name)["kind"] in ("image", "video")]
            raise UsageError(f"The judge reads digits: a bundled model of {', '.join(known)} is needed, got {model!r}.")
        pipe = loading.open_pipeline(model, quiet=True)
        asked = tiny_models.call_defaults(pipe) | (call or {})
        told = prompts(kind, count)
        distinct = list(dict.fromkeys(told))
        host, conditions = learn(pipe, distinct, **asked)
        z = torch.randn(count, *host.shape, generator=torch.Generator().manual_seed(seed))
        rows = torch.tensor([distinct.index(prompt) for prompt in told])
        return cls(model, kind, pipe, asked, tuple(told), z, conditions.rows(rows))

    def solver(self, name: str, steps: int, guided: bool = True) -> Made:
        """The teacher's own pipeline by one of diffusers' solvers; `keep` is the model's own."""
        hold = Attachment()
        hold.replace(self.pipe, "scheduler", other_scheduler(self.pipe.scheduler, name))
        off = {} if guided else {arg: 1.0 for arg in ("true_cfg_scale", "guidance_scale") if arg in self.call}
        call = self.call | off | {"num_inference_steps": steps, "output_type": "latent"}
        try:
            with torch.no_grad():
                return self._timed((1 + guided) * steps, lambda rows: self._piped(call, rows))
        finally:
            hold.restore()

    def teacher(self, steps: int) -> Made:
        """The teacher with guidance by its own solver; made once for each number of steps."""
        if steps not in self.teachers:
            self.teachers[steps] = self.solver("keep", steps)
        return self.teachers[steps]

    def solvers(self) -> list[str]:
        """Solvers that diffusers has for this model, `heun` aside: it asks twice per step."""
        flow = "FlowMatch" in type(self.pipe.scheduler).__name__
        return [name for name in (FLOW if flow else VARIANCE_PRESERVING) if name != "heun"]

    def student(self, trained: Trained, calls: int) -> Made:
        """A student by this many calls, evenly in its network's time, in the way that it was trained for."""
        who, path = trained.student, trained.host.path
        if isinstance(who, Chunks):
            return self.chunks(who)
        steps = trained.steps if trained.steps is not None and len(trained.steps.angles) == calls else None
        if steps is None:
            steps = FewSteps.even(calls, path, trained.steps.how if trained.steps is not None else "ode")
        again = torch.Generator().manual_seed(SEED + 1)
        fresh = torch.randn(max(0, calls - 1), *self.z.shape, generator=again)

        def made(rows: slice) -> Tensor:
            told = self.condition.rows(torch.arange(len(self.prompts))[rows])
            return sample(who, self.z[rows], told, steps, lambda number, x: fresh[number][rows])

        with torch.no_grad():
            return self._timed(calls, made)

    def chunks(self, who: Chunks, given: Tensor | None = None) -> Made:
        """A student in chunks, by the calls that it was trained for. given [N, C, f, H, W]: frames that are there already, the
        first chunk or more of them."""
        last = len(who.steps.angles) - 1
        again = torch.Generator().manual_seed(SEED + 1)
        fresh = torch.randn(last, *self.z.shape, generator=again)

        def made(rows: slice) -> Tensor:
            told = self.condition.rows(torch.arange(len(self.prompts))[rows])
            first = None if given is None else given[rows]
            return who.made(self.z[rows], told, last, lambda number: fresh[number][rows], given=first)

        ready = 0 if given is None else given.shape[2]
        with torch.no_grad():
            return self._timed(whole_clips(who.spans(self.z.shape[2]), last + 1, ready), made)

    def recipe(self, recipe: Recipe) -> Made:
        """What a user gets: the pipeline under a recipe with a student in it."""
        sampler = recipe.sampler
        if not isinstance(sampler, FewCalls):
            raise UsageError(f"Recipe {recipe.name!r} has no student's sampler. Give a student's recipe.yaml.")
        pipe = loading.open_pipeline(self.model, quiet=True)
        call = self.call | {"output_type": "latent"}
        chunks = self.chunks_of(recipe)
        evaluations = sampler.calls if chunks is None else whole_clips(chunks, sampler.calls)
        with accelerate(pipe, recipe):
            return self._timed(evaluations, lambda rows: self._piped(call, rows, pipe))

    def chunks_of(self, recipe: Recipe) -> tuple[tuple[int, int], ...] | None:
        """Begin and end of each chunk of frames that this recipe makes, None where it makes samples whole."""
        sampler = recipe.sampler
        return spans(self.z.shape[2], sampler.chunk, sampler.first) if isinstance(sampler, ChunkCalls) else None

    def row(self, made: Made) -> dict[str, Any]:
        """What is measured of it."""
        return {"evaluations": made.evaluations, "seconds": made.seconds} | measures(self.pictures(made), self.prompts, self.kind)

    def pictures(self, made: Made) -> list[Any]:
        """Decoded by the pipeline itself: arrays [H, W, 3] or [T, H, W, 3] in [0, 1]."""
        return [picture for rows in self._slices() for picture in decode(self.pipe, made.x0[rows], self.call)]

    def _piped(self, call: dict[str, Any], rows: slice, pipe: Any = None) -> Tensor:
        given = dict(call)
        told = list(self.prompts[rows])
        if given.get("negative_prompt") is not None:
            given["negative_prompt"] = [given["negative_prompt"]] * len(told)
        return torch.as_tensor((pipe or self.pipe)(**given, prompt=told, latents=self.z[rows])[0])

    def _timed(self, evaluations: float, made: Callable[[slice], Tensor]) -> Made:
        started = time.process_time()
        x0 = torch.cat([made(rows).float() for rows in self._slices()])
        return Made(x0, evaluations, (time.process_time() - started) / len(x0))

    def _slices(self) -> Iterator[slice]:
        return (slice(start, start + BATCH) for start in range(0, len(self.prompts), BATCH))


def whole_clips(chunks: Sequence[tuple[int, int]], calls: int, ready: int = 0) -> float:
    """Evaluations of a clip in chunks, in those of whole clips: frames that are seen, by frames that there are. Each chunk is
    evaluated `calls` times, and all but the last once more for those after it; of the first `ready` frames, only the latter."""
    seen = sum((calls * (end > ready) + (end < chunks[-1][1])) * (end - begin) for begin, end in chunks)
    return seen / chunks[-1][1]
