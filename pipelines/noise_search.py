"""`hasten.search_noise`: several noises on an unmodified pipeline, and the result that a verifier likes best.

It is spent on quality, not saved: a search costs as many evaluations as it has candidates times steps, and says so. The
strategies are `hasten.samplers.noise_search`; this is the loop that makes pictures of them.

Shapes: B candidates of one call, each a row of the latents [B, ...]; frames [F, H, W, C].
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.errors import RefusedError, UsageError, nearest
from hasten.part import parse
from hasten.pipelines.solver import segment
from hasten.pipelines.travel import alpha_sigma
from hasten.pipelines.verifiers import Verifier, verifier_of
from hasten.samplers.noise_search import NoiseSearch, Paths, Proposal, Rounds
from hasten.samplers.travel import noisier
from hasten.session import Attachment

Frames = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One noise that was tried. seed: of its noise; parent: number of the candidate that it started from, None for none.

    level: share of the run at which it was looked at; 1 for a whole run.
    """

    number: int
    seed: int
    score: float
    parent: int | None = None
    level: float = 1.0


@dataclass(slots=True)
class Searched:
    """What a search came to. frames: [F, H, W, C] in [0, 1] of `best`. nfe: evaluations spent, a guided one counting once."""

    frames: Frames
    best: Candidate
    nfe: int
    candidates: list[Candidate] = field(default_factory=list)


def search_noise(
    pipe: Any, prompt: str, verifier: str | Verifier = "digits", *, how: str | NoiseSearch = "random",
    budget: int | None = None, seed: int = 0, batch: int = 4, **call: Any,
) -> Searched:  # fmt: skip
    """Generate `prompt` from several noises and keep the result with the highest score.

    how: "random", "zero-order" or "paths" (arXiv 2501.09732), which then is as large as `budget` allows, or a part of
    `hasten.samplers.noise_search`. budget: most evaluations in all; a guided one counts once. verifier: a name of
    `hasten.pipelines.verifiers`, or a function of (frames, prompt). batch: candidates in one call of the pipeline. call: its
    other arguments. The first candidate is what `generator=torch.Generator().manual_seed(seed)` gives; random candidates
    are those of the seeds that follow, so that each can be had again. A session that is open on `pipe` acts on all of them;
    "paths" has a solver of its own, DPM-Solver++ on even levels.

    Raises `UsageError` for a budget that is too small, a verifier that is not a number, or an unknown strategy;
    `RefusedError` for a pipeline that takes no latents.
    """
    judge = verifier_of(verifier)
    loop = _Loop(pipe, prompt, judge, seed, max(1, batch), dict(call))
    part = strategy(how, budget, loop.steps)
    if isinstance(part, Paths):
        return loop.paths(part)
    assert isinstance(part, Rounds)
    return loop.rounds(part)


def strategy(how: str | NoiseSearch, budget: int | None, n: int) -> NoiseSearch:
    """The search that is meant, on runs of n steps. Raises `UsageError` where it is unknown or does not fit the budget."""
    if isinstance(how, str):
        known = NoiseSearch.members()
        if how not in known:
            raise UsageError(f"There is no search {how!r}; allowed: {', '.join(known)}.{nearest(how, known)}")
        kind = known[how]
        assert issubclass(kind, NoiseSearch)
        return parse(NoiseSearch, {"kind": how}, "how") if budget is None else kind.within(budget, n)
    if budget is not None and how.evaluations(n) > budget:
        raise UsageError(f"This {how.kind} search takes {how.evaluations(n)} evaluations, above the budget of {budget}. Raise one.")
    return how


def steps_of(pipe: Any, call: Mapping[str, Any]) -> int:
    """Steps of a run of `pipe` called so: those of the call, or the pipeline's own. Raises `UsageError` where there are none."""
    known = inspect.signature(type(pipe).__call__).parameters
    default = known["num_inference_steps"].default if "num_inference_steps" in known else None
    steps = call.get("num_inference_steps", default)
    if not isinstance(steps, int) or steps < 1:
        raise UsageError(f"A search needs num_inference_steps, at least 1, got {steps!r}.")
    return steps


@dataclass(slots=True)
class _Loop:
    """One search: what has been tried, and how the pipeline is called. mu: the shift that the pipeline tells its scheduler."""

    pipe: Any
    prompt: str
    verifier: Verifier
    seed: int
    batch: int
    call: dict[str, Any]
    nfe: int = 0
    mu: float | None = None
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return steps_of(self.pipe, self.call)

    # --- whole runs -------------------------------------------------------------------------------

    def rounds(self, policy: Rounds) -> Searched:
        """Ask the policy for noises, run and score them, until it asks for no more."""
        state, noises, best = policy.start(self.seed), list[Tensor](), None
        while proposals := state.ask():
            scores: list[float] = []
            for some in _in_parts(proposals, self.batch):
                frames, started = self._whole(some, noises)
                noises += list(started)
                for proposal, picture in zip(some, frames, strict=True):
                    made = self._score(picture, proposal.seed, proposal.parent)
                    scores.append(made.score)
                    if best is None or made.score > best[1].score:
                        best = (picture, made)
            state.tell(scores)
        assert best is not None
        return Searched(*best, self.nfe, self.candidates)

    def _whole(self, proposals: Sequence[Proposal], noises: Sequence[Tensor]) -> tuple[list[Frames], Tensor]:
        """(frames of each, the noises that they started from [B, ...])."""
        if all(proposal.parent is None for proposal in proposals):
            drawn = [torch.Generator().manual_seed(proposal.seed) for proposal in proposals]
            return self._run(len(proposals), generator=drawn)
        mixed = []
        for proposal in proposals:
            assert proposal.parent is not None
            old = noises[proposal.parent]
            fresh = _drawn(old, proposal.seed)
            mixed.append(math.sqrt(1 - proposal.radius**2) * old + proposal.radius * fresh)
        return self._run(len(proposals), latents=torch.stack(mixed))

    def _run(self, rows: int, **given: Any) -> tuple[list[Frames], Tensor]:
        """One call of the pipeline as it stands."""
        first: list[Tensor] = []
        attachment, scheduler = Attachment(), self.pipe.scheduler
        step = scheduler.step

        @functools.wraps(step)
        def seen(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not first:
                first.append(sample.detach() / float(getattr(scheduler, "init_noise_sigma", 1.0)))
            self.nfe += len(sample)
            return step(model_output, timestep, sample, *args, **kwargs)

        attachment.replace(scheduler, "step", seen)
        try:
            output = self._called(rows, output_type="np", **given)
        finally:
            attachment.restore()
        return rows_of(output), first[0]

    def _called(self, rows: int, **given: Any) -> Any:
        if "latents" in given and "latents" not in inspect.signature(type(self.pipe).__call__).parameters:
            raise RefusedError(f"{type(self.pipe).__name__} takes no latents, so noises cannot be given to it. Search how='random'.")
        call = {**self.call, **given, "prompt": [self.prompt] * rows}
        if isinstance(call.get("negative_prompt"), str):
            call["negative_prompt"] = [call["negative_prompt"]] * rows
        return self.pipe(**call)

    def _score(self, picture: Frames, seed: int, parent: int | None, level: float = 1.0) -> Candidate:
        score = float(self.verifier(picture, self.prompt))
        if not math.isfinite(score):
            raise UsageError(f"The verifier gave {score} for seed {seed}; it has to give a finite number. Look at that result.")
        made = Candidate(len(self.candidates), seed, score, parent, level)
        self.candidates.append(made)
        return made

    # --- paths ------------------------------------------------------------------------------------

    def paths(self, policy: Paths) -> Searched:
        """Walk several runs, branch each on the way, go on with the best."""
        n, looks = self.steps, policy.looks(self.steps)
        here = looks[0] if looks else n
        seeds = [self.seed + number for number in range(policy.paths)]
        owners: list[tuple[int, int | None]] = [(seed, None) for seed in seeds]
        x = self._run_first(seeds, here)
        for level in looks:
            x, owners = self._branched(policy, x, owners, level)
        last = looks[-1] + policy.ahead if looks else here
        pictures = [rows_of(self._walk(part, last, n, output_type="np")) for part in torch.split(x, self.batch)]
        done = [p for part in pictures for p in part]
        made = [self._score(p, seed, parent) for p, (seed, parent) in zip(done, owners, strict=True)]
        best = max(made, key=lambda one: (one.score, -one.number))
        return Searched(done[made.index(best)], best, self.nfe, self.candidates)

    def _run_first(self, seeds: Sequence[int], stop: int) -> Tensor:
        """[B, ...]: runs of these seeds down to level `stop`."""
        found = []
        for some in _in_parts(seeds, self.batch):
            noises = [torch.Generator().manual_seed(seed) for seed in some]
            found.append(self._walk(None, 0, stop, generator=noises, rows=len(some), output_type="latent")[0])
        return torch.cat(found)

    def _branched(
        self, policy: Paths, x: Tensor, owners: Sequence[tuple[int, int | None]], level: int
    ) -> tuple[Tensor, list[tuple[int, int | None]]]:
        """The best of what the paths x [N, ...] at `level` branch into, and who they are, `ahead` levels on."""
        n, first = self.steps, len(self.candidates)
        at, to = self._shares(level), self._shares(level - policy.back)
        seeds = [self.seed + 1_000 * (first + 1) + number for number in range(len(x) * policy.branches)]
        rows = [row for row in x for _ in range(policy.branches)]
        whose = [owner for owner in owners for _ in range(policy.branches)]
        noisy = torch.stack([noisier(row, at, to, _drawn(row, seed)) for row, seed in zip(rows, seeds, strict=True)])
        ends, made = [], list[Candidate]()
        for part in torch.split(noisy, self.batch):
            end = self._walk(part, level - policy.back, level + policy.ahead, output_type="latent")[0]
            ends.append(end)
            for picture in self._look(end, level + policy.ahead):
                number = len(made)
                made.append(self._score(picture, seeds[number], whose[number][1], (level + policy.ahead) / n))
        order = sorted(range(len(made)), key=lambda number: (-made[number].score, number))[: policy.paths]
        return torch.cat(ends)[order], [(whose[number][0], made[number].number) for number in order]

    def _look(self, x: Tensor, level: int) -> list[Frames]:
        """The data that the network sees in x [B, ...], decoded by the pipeline: one step from `level` to no noise."""
        return rows_of(self._walk(x, level, self.steps, output_type="np", straight=True))

    def _walk(
        self, x: Tensor | None, start: int, stop: int, *, rows: int | None = None, straight: bool = False, **given: Any
    ) -> Any:
        """The pipeline from level `start` to `stop` of n. straight: in one step."""
        attachment, rows = Attachment(), rows if x is None else len(x)
        assert rows is not None
        made = segment(self.pipe.scheduler, self.steps, start, stop, straight=straight)
        asked = made.set_timesteps

        @functools.wraps(asked)
        def heard(*args: Any, mu: float | None = None, **kwargs: Any) -> None:
            self.mu = mu
            asked(*args, mu=mu, **kwargs)

        made.set_timesteps = heard
        attachment.replace(self.pipe, "scheduler", made)
        try:
            output = self._called(rows, **({} if x is None else {"latents": x}), **given)
        finally:
            attachment.restore()
        self.nfe += rows * (1 if straight else stop - start)
        return output

    def _shares(self, level: int) -> tuple[float, float]:
        """alpha and sigma of a level."""
        made = segment(self.pipe.scheduler, self.steps, 0, self.steps)
        made.set_timesteps(self.steps, mu=self.mu)
        return alpha_sigma(made, float(made.sigmas[level]))


def rows_of(output: Any) -> list[Frames]:
    """[F, H, W, C] of each picture or clip of a pipeline's output."""
    values = np.asarray(output.frames if hasattr(output, "frames") else output.images, dtype=np.float64)
    return [row if row.ndim == 4 else row[None] for row in values]


def _drawn(like: Tensor, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=g).to(like.device, like.dtype)


def _in_parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
