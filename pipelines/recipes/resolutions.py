"""Recipes about how much of a picture or clip the network sees at once: lower resolutions, windows in time, drafts."""

from __future__ import annotations

from typing import Literal

from hasten.recipe import Recipe
from hasten.samplers.bottleneck import Bottleneck, Stage


def bottleneck(
    scale: float = 0.5, first: float = 0.1, last: float = 0.7, back: float = 0.1, steps: float = 0.7,
    noise: Literal["fresh", "kept"] = "fresh",
) -> Recipe:  # fmt: skip
    """Bottleneck Sampling: full resolution at the beginning and the end, a lower one in between. Experimental.

    scale: of height and width in between, which begins after the share `first` of the run and ends at `last`; from there the
    run goes `back` and ends at full size. steps: share of the steps asked for. Tian et al. claim 3x on images and 2.5x on
    videos; it needs a model that knows the lower resolution. On the bundled models, which know one, fewer steps are better:
    docs/samplers.md.
    """
    return Recipe(
        sampler=Bottleneck(
            noise=noise,
            stages=(
                Stage(steps=round(steps * first, 4), until=first),
                Stage(steps=round(steps * (last - first), 4), begin=round(max(0.0, first - back / 2), 4), until=last, scale=scale),
                Stage(steps=round(steps * (1 - last + back), 4), begin=round(last - back, 4)),
            ),
        ),
        paper="Bottleneck Sampling, arXiv 2503.18940",
        models=("denoisers that see the size of their input, and FLUX.1",),
    )
