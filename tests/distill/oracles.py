"""What oracles share: exact laws on every path, points of their trajectories, and losses of a method on exact roles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, MethodState
from hasten.distill.network.paths import Flow, NoisePath, VariancePreserving, turned
from tests.distill import gaussians
from tests.distill.gaussians import Gaussian, Law, Mixture, batch
from tests.distill.timed import TABLE

PATHS: dict[str, NoisePath] = {
    "flow": Flow(),
    "epsilon": VariancePreserving(TABLE),
    "v": VariancePreserving(TABLE, "v_prediction"),
}
LAWS: dict[str, Law] = {"gaussian": Gaussian(), "mixture": Mixture()}
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


def points(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(x, tau, mean) of seven rows where x may well be."""
    rows = batch(seed=seed)
    assert rows.x0 is not None and rows.z is not None
    tau = torch.linspace(0.15, 1.45, len(rows), dtype=torch.float64)
    x = turned(rows.x0, -rows.z, tau)
    return x, tau, rows.condition.tensors["encoder_hidden_states"]


def facts(made: Any, steps: int = 8) -> Facts:
    return Facts(made, steps, (gaussians.WIDTH,))


def rows_of(state: MethodState, rows: Batch, step: int = 5, seed: int = 0, kept: Mapping[str, Any] | None = None) -> Tensor:
    return state.loss("student", rows, Draw(seed, step, range(len(rows))), step, kept or {}).rows


class Halfway(Draw):
    """The step from the middle of any grid, which is one angle for all of them."""

    def below(self, purpose: str, high: int) -> Tensor:
        return torch.full((len(self.rows),), high // 2)


def hear(state: MethodState) -> None:
    """Make a hint tell the number itself: what `Exact` reads."""
    state.hint.module.forward = lambda number: number[:, None]  # type: ignore[attr-defined]


def mean_of(rows: Batch) -> Tensor:
    return rows.condition.tensors["encoder_hidden_states"]
