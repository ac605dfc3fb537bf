"""Where a generation loop stands."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.level import Level


@dataclass(frozen=True, slots=True)
class Step:
    """One evaluation of the denoiser within a run. Policies read it and never write it.

    index: 0-based position in the solver's list of timesteps (a Heun-type solver has two per step).
    total: length of that list.
    time: coordinate in which the output is smooth: sigma in [0, 1] for flow matching; for the
        variance-preserving solvers the angle atan(sigma / alpha) scaled to [0, 1]. It falls towards 0.
    branch: 0 for the first conditioning the loop evaluates, 1 for the next, and so on. Which of them
        is "cond" is measured by the guidance seam, never assumed.
    weight: factor with which this output enters the latents (the solver's step length) when the solver
        is first-order and linear in it, else None.
    level: how noisy the input is and what the output says about the data, where the solver says so.
    """

    index: int
    total: int
    time: float
    branch: int = 0
    weight: float | None = None
    level: Level | None = None

    @property
    def last(self) -> bool:
        """True for the final evaluation of the run."""
        return self.index >= self.total - 1
