"""Calibration of CacheQuant (arXiv 2503.01323): a schedule and a correction fitted on a few runs, as a recipe.

First the steps to compute: the exact minimum of the error of holding outputs, by dynamic programming. Then two
corrections, fitted apart because the paper found that fitting them together lets one error hide the other: what
quantised weights do to an output (where an unquantised network is given), and what holding an output does to it.
Differs: the whole network's output is held, not features inside a U-Net; errors are weighted by the length of the
step in `Step.time`; both errors are measured on the same inputs, those of the unquantised run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.caching.network import NetworkReuse
from hasten.caching.rules_partition import cheapest_groups, holding_cost
from hasten.errors import ModelError, UsageError
from hasten.forecast_affine import Affine, ChannelTable
from hasten.pipelines.accelerate import accelerate
from hasten.pipelines.bench.oracle import as_rule
from hasten.pipelines.host import Output, denoisers
from hasten.recipe import Recipe
from hasten.step import Step

Generate = Callable[[Any, int], Any]


def calibrate(
    pipe: Any, generate: Generate, computed: int, *, samples: int = 4, reference: Any = None, name: str = "cachequant"
) -> Recipe:
    """A recipe that computes `computed` steps of the run that `generate` makes, and corrects the others.

    pipe: a diffusers pipeline with one denoiser. generate: `generate(pipe, sample)` makes one run of a pipeline, with
    prompt and seed of sample number 0 ... samples - 1 and always the same number of steps. reference: the same
    pipeline with unquantised weights, when `pipe`'s are quantised: its outputs are then what is aimed at, and `pipe`'s
    network is evaluated once more on each of its inputs. Takes `samples` runs, held in memory as float32 outputs.

    The recipe holds for this number of steps, this solver and these weights; elsewhere the report says that its
    corrections do not apply. Raises `UsageError` when `computed` does not fit the run or the runs differ in length,
    `ModelError` for a host with several denoisers.
    """
    trail = Trail()
    for sample in range(samples):
        with _watched(pipe if reference is None else reference, None if reference is None else pipe) as seen:
            generate(pipe if reference is None else reference, sample)
        trail.add(seen)
    if not trail.times:
        raise UsageError(f"Calibration needs at least one run, got samples={samples}.")
    chosen = cheapest_groups(holding_cost(trail.gram, trail.weights), computed)
    repair = None if reference is None else trail.fit({i: i for i in chosen})
    if repair is not None:
        trail.repair(repair, chosen)  # holding is fitted on what will be held
    held = {j: max(i for i in chosen if i <= j) for j in range(len(trail.times)) if j not in chosen}
    forecast = Affine(run=tuple(round(t, 6) for t in trail.times), table=trail.fit(held))
    reuse = NetworkReuse(rule=as_rule(set(chosen), len(trail.times)), forecast=forecast, repair=repair)
    return Recipe(name=name, paper="CacheQuant, arXiv 2503.01323", models=(type(pipe).__name__,), reuse=reuse)


# --- recording ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """One evaluation: where, what the watched network answered, and what the quantised one would have."""

    step: Step
    exact: Tensor
    given: Tensor


@contextlib.contextmanager
def _watched(pipe: Any, quantised: Any) -> Iterator[list[Seen]]:
    """Every evaluation of `pipe`'s denoiser while open, with that of `quantised` evaluated on the same arguments."""
    found: list[Seen] = []
    other = None if quantised is None else _only_denoiser(quantised)
    with accelerate(pipe, "plain") as session:

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            if session.step is None:
                return
            exact = Output(result).tensors[0].detach()
            given = exact if other is None else Output(other(*args, **kwargs)).tensors[0].detach()
            found.append(Seen(session.step, exact.clone(), given.clone()))

        handle = _only_denoiser(pipe).register_forward_hook(keep, with_kwargs=True)
        try:
            yield found
        finally:
            handle.remove()


def _only_denoiser(pipe: Any) -> nn.Module:
    models = denoisers(pipe)
    if len(models) != 1:
        raise ModelError(
            f"Calibration fits one denoiser, {type(pipe).__name__} has {len(models)}: {', '.join(models)}."
            " Pass a pipeline with one, or use a recipe without calibration."
        )
    return next(iter(models.values()))


class Trail:
    """What all calibration runs computed, per step.

    times, weights: `Step.time` of the steps and how far it falls in each. Not the solver's own weights: those of
    DDIM hold the first steps for a hundred times as important, whose errors the later steps in fact undo.
    exact, given: per step the outputs of all samples and branches, each as (C, M) float32: those of the reference,
    and those of the network that will run. gram: (N, N) inner products of the exact outputs, over all of them.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.weights: list[float] = []
        self.exact: list[list[Tensor]] = []
        self.given: list[list[Tensor]] = []
        self.gram = torch.zeros(0, 0, dtype=torch.float64)
        self.dim = 1

    def add(self, seen: list[Seen]) -> None:
        """Take in one run. Raises `UsageError` when its steps are not those of the first."""
        steps = {one.step.index: one.step for one in seen}
        times = [steps[i].time for i in sorted(steps)]
        if not seen or len(times) != seen[0].step.total:
            raise UsageError("generate() must run the pipeline it is given, once and to its end; no such run was seen.")
        if not self.times:
            self._begin(times, seen[0].exact.ndim)
        if times != self.times:
            raise UsageError(
                f"Calibration runs must have the same steps: the first had {len(self.times)}, another {len(times)} or"
                " other noise levels. Fix the number of steps in generate()."
            )
        branches: dict[int, list[Tensor]] = {}
        for one in seen:
            self.exact[one.step.index].append(_flat(one.exact, self.dim))
            self.given[one.step.index].append(_flat(one.given, self.dim))
            branches.setdefault(one.step.branch, []).append(self.exact[one.step.index][-1].flatten())
        for outputs in branches.values():
            if len(outputs) == len(times):  # a branch that is not evaluated at every step says nothing about holding
                values = torch.stack(outputs).double()
                self.gram += values @ values.T

    def _begin(self, times: list[float], ndim: int) -> None:
        self.times = times
        self.weights = [a - b for a, b in zip(times, [*times[1:], 0.0], strict=True)]
        self.exact, self.given = [[] for _ in times], [[] for _ in times]
        self.gram = torch.zeros(len(times), len(times), dtype=torch.float64)
        self.dim = 1 if ndim > 3 else -1  # latents have their channels at 1, tokens at the end

    def fit(self, pairs: dict[int, int]) -> ChannelTable:
        """Least squares per channel: exact outputs of step j from the given outputs of step pairs[j]."""
        rows = []
        for j in sorted(pairs, key=lambda j: self.times[j]):
            same = len(self.given[pairs[j]]) == len(self.exact[j])
            if not same:
                raise UsageError("Calibration needs runs that evaluate the same branches at every step; leave guidance alone.")
            a, b = least_squares(torch.cat(self.given[pairs[j]], 1), torch.cat(self.exact[j], 1))
            rows.append((round(self.times[j], 6), _digits(a), _digits(b)))
        times, scale, shift = ([row[k] for row in rows] for k in range(3))
        return ChannelTable(times=tuple(times), scale=tuple(scale), shift=tuple(shift), dim=self.dim)

    def repair(self, table: ChannelTable, steps: Sequence[int]) -> None:
        """Apply `table` to the given outputs of `steps`."""
        for i in steps:
            row = table.row(self.times[i])
            assert row is not None
            scale, shift = (torch.tensor(values[row])[:, None] for values in (table.scale, table.shift))
            self.given[i] = [scale * y + shift for y in self.given[i]]


def _flat(y: Tensor, dim: int) -> Tensor:
    return y.float().movedim(dim, 0).flatten(1).cpu()


def _digits(values: Tensor) -> tuple[float, ...]:
    """Five significant digits: a recipe is read by people, and its size is limited."""
    return tuple(float(f"{value:.5g}") for value in values.tolist())


def least_squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """a, b (C,) that minimise |a x + b - y|^2 for each row of x and y (C, M); a constant row of x keeps a = 1."""
    mean_x, mean_y = x.mean(1), y.mean(1)
    off_x, off_y = x - mean_x[:, None], y - mean_y[:, None]
    spread = off_x.square().mean(1)
    constant = spread <= 1e-12 * x.square().mean(1).clamp_min(1e-30)
    a = torch.where(constant, torch.ones_like(spread), (off_x * off_y).mean(1) / spread.clamp_min(1e-30))
    return a, mean_y - a * mean_x
