"""What is measured of samples: the bundled digit judge's features against those of unseen real pictures and clips.

Prompt accuracy alone misleads: a teacher's single step shows the mean of its class, which every classifier reads and which
has no variety. So the Frechet distance, a sliced Wasserstein distance, recall (is what is real reached?) and precision (is
what is made real?) stand beside it.

Shapes: N samples, R reference rows, D features (48 of a picture, 64 of a clip).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.pipelines.judge import Judge, accuracy, precision, recall

DIRECTIONS = 256
"""Of the sliced Wasserstein distance."""


def measures(pictures: Sequence[Any], prompts: Sequence[str], kind: str) -> dict[str, float]:
    """frechet, sliced, recall, precision, accuracy of N pictures or clips. kind: `image` or `video`."""
    judge = Judge.load()
    readings = judge.read_all(pictures)
    made, real = torch.stack([reading.features for reading in readings]), judge.reference_features(kind)
    return {
        "frechet": judge.frechet_to_real(made, kind),
        "sliced": sliced(made, real),
        "recall": recall(real, made),
        "precision": precision(real, made),
        "accuracy": accuracy(readings, prompts)["all"],
    }


def sliced(made: Tensor, real: Tensor) -> float:
    """Root of the mean squared 2-Wasserstein distance over random directions, in units of the real features' deviation;
    [N, D] and [R, D]. By quantiles, so that N and R may differ."""
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(made.shape[1], DIRECTIONS, generator=g)
    directions = directions / directions.norm(dim=0)
    scale = real.std(0).square().mean().sqrt()
    levels = (torch.arange(200) + 0.5) / 200
    one, two = (torch.quantile(each.float() @ directions, levels, dim=0) for each in (made, real))
    return float((one - two).square().mean().sqrt() / scale)
