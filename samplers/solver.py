"""The solver axis: walk the same path with another solver, at other noise levels."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hasten.errors import RecipeError
from hasten.recipe import Sampler
from hasten.samplers.levels import Spacing

ORDERED = ("dpm++", "unipc")
"""Solvers whose order can be chosen; the others have one of their own."""

FIRST_ORDER = ("euler", "ddim")
"""Solvers that `weights` may be given to."""


class Solver(Sampler):
    """Replace the host's scheduler by diffusers' `name`, keeping the host's noise schedule and prediction type.

    name: euler, heun, ddim, unipc, dpm++ or pndm; each has a flow-matching and a variance-preserving form, chosen from the
    host's scheduler, except ddim (on a flow it is euler) and pndm, which are variance preserving only. keep: the host's own.
    order: how many evaluations dpm++ and unipc look back on, None for what the host's scheduler says (2 where it says
    nothing); the others have orders of their own (euler and ddim 1, heun 2, pndm 4 after its first three steps).

    Where the network is evaluated is said by one of these, and by the host where none is given:
    steps: share of the steps the caller asks for, 1 for all of them.
    spacing: how that many noise levels are chosen (`hasten.samplers.levels`); keep: as diffusers' solver does.
    shift: flow matching only, sigma = shift u / (1 + (shift - 1) u) in place of the host's (SD3, arXiv 2403.03206, eq. 23).
    times: the levels themselves, falling from 1 and above 0, whatever number of steps is asked for: sigma in flow
    matching; else shares of the training time, (t + 1) / T (AutoDiffusion, arXiv 2309.10438, searches such lists).

    weights: a row for each of `times`: what the outputs of this evaluation and of those before it, newest first, weigh in
    what a first-order solver (euler, ddim) is given. A multistep solver of one's own, as in Bespoke Non-Stationary Solvers
    (arXiv 2403.01329); `hasten tune` fits it to plain runs of one model. Differs: outputs are mixed, inputs are not.
    """

    kind: ClassVar[str] = "solver"
    name: Literal["keep", "euler", "heun", "ddim", "unipc", "dpm++", "pndm"] = "unipc"
    steps: float = Field(1.0, gt=0, le=1)
    order: Literal[1, 2, 3] | None = None
    spacing: Literal["keep"] | Spacing = "keep"
    shift: float | None = Field(None, gt=0)
    times: tuple[float, ...] | None = None
    weights: tuple[tuple[float, ...], ...] | None = None

    @property
    def own_levels(self) -> bool:
        """Are the noise levels chosen here, and not by diffusers' solver?"""
        return self.spacing != "keep" or self.times is not None

    @model_validator(mode="after")
    def _agrees(self) -> Solver:
        if self.order is not None and self.name not in (*ORDERED, "keep"):
            raise RecipeError(f"sampler.order is for {' and '.join(ORDERED)}; {self.name} has one of its own. Leave it out")
        if self.name == "pndm" and self.own_levels:
            raise RecipeError(
                "pndm weighs its last evaluations for even steps, so it takes neither spacing nor times; dpm++ and unipc take both"
            )
        if self.times is not None:
            self._list_stands_alone(self.times)
        if self.weights is not None:
            self._rows_fit(self.weights)
        return self

    def _rows_fit(self, weights: tuple[tuple[float, ...], ...]) -> None:
        if self.name not in FIRST_ORDER:
            raise RecipeError(f"sampler.weights make a multistep solver of a first-order one ({', '.join(FIRST_ORDER)}), got {self.name}")
        if len(weights) != len(self.times or ()):
            raise RecipeError(f"sampler.weights need a row for each of sampler.times, got {len(weights)} for {len(self.times or ())}")
        if wrong := [k for k, row in enumerate(weights) if not 1 <= len(row) <= k + 1]:
            raise RecipeError(
                f"sampler.weights row {wrong[0]} weighs {len(weights[wrong[0]])} outputs; by then there are 1 to {wrong[0] + 1}"
            )

    def _list_stands_alone(self, times: tuple[float, ...]) -> None:
        others = {"steps": self.steps != 1, "spacing": self.spacing != "keep", "shift": self.shift is not None}
        if any(others.values()):
            told = ", ".join(name for name, given in others.items() if given)
            raise RecipeError(f"sampler.times already says where the network is evaluated; leave out {told}")
        falls = all(a > b for a, b in pairwise(times))
        if not times or times[0] != 1 or times[-1] <= 0 or not falls:
            raise RecipeError(f"sampler.times must fall from 1 and stay above 0, got {list(times)}")
