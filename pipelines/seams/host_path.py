"""The noise levels that a pipeline's scheduler would walk through, at any place in between.

Progress: 0 at the first level, 1 at no noise, even in the scheduler's own steps.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch

from hasten.errors import RefusedError
from hasten.level import Level
from hasten.scheduler import is_flow, solver_levels


class HostPath:
    """The path of `scheduler`, whose `set_timesteps` has been called."""

    def __init__(self, scheduler: Any) -> None:
        config = scheduler.config
        if config.get("invert_sigmas"):
            raise RefusedError(f"{type(scheduler).__name__} counts its noise backwards (invert_sigmas), which is not walked here.")
        self.scheduler, self.flow = scheduler, is_flow(scheduler)
        self.trained = int(config.get("num_train_timesteps", 1000))
        seen = torch.as_tensor(scheduler.sigmas if self.flow else scheduler.timesteps).flatten().tolist()
        nodes = [float(node) for node in dict.fromkeys(seen) if not self.flow or node > 0]
        self.nodes = (*nodes, 0.0)
        if not self.flow:
            cumulative = getattr(scheduler, "alphas_cumprod", None)
            if cumulative is None or len(cumulative) < max(nodes, default=0):
                raise RefusedError(f"{type(scheduler).__name__} does not say how noisy its times are (alphas_cumprod).")
            self._table: list[float] = cumulative.double().tolist()

    @property
    def steps(self) -> int:
        """Steps that the scheduler itself would take."""
        return len(self.nodes) - 1

    def at(self, progress: float, shift: float = 1.0) -> tuple[float, Level]:
        """(timestep for the network, level) of a place; shift: factor on sigma / alpha.

        Raises `RefusedError` where the scheduler does not say what the network's answer there means.
        """
        place = min(max(progress, 0.0), 1.0) * self.steps
        low = min(int(place), self.steps - 1)
        node = self.nodes[low] + (place - low) * (self.nodes[low + 1] - self.nodes[low])
        if self.flow:
            sigma = shift * node / (1 + (shift - 1) * node)
            return sigma * self.trained, self._known([sigma])
        t = self._shifted(round(node), shift)
        kept = self._table[t]
        return float(t), self._known([math.atan2(math.sqrt(1 - kept), math.sqrt(kept)) / (math.pi / 2)])

    def _shifted(self, t: int, shift: float) -> int:
        """The whole time whose noise is nearest to `shift` times that of t."""
        t = min(max(t, 0), len(self._table) - 1)
        if shift == 1:
            return t
        odds = [kept / (1 - kept) if kept < 1 else math.inf for kept in self._table]
        wanted = odds[t] / shift**2
        return min(bisect_left([-each for each in odds], -wanted), len(odds) - 1)

    def _known(self, times: Sequence[float]) -> Level:
        level = solver_levels(self.scheduler, times, flow=self.flow)[0]
        if level is None or level.data is None:
            raise RefusedError(
                f"{type(self.scheduler).__name__} does not say what its network predicts at noise {times[0]:.3g}, so that the"
                " data cannot be estimated there. Take a scheduler with epsilon, v or flow prediction and some signal at its end."
            )
        return level
