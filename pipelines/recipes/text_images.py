"""Recipes of masked images on the loop of texts: `MaskedImagePipeline` takes them.

ReCAP has two recipes. `recap` is for diffusers' own masked image pipelines, whose loop stays theirs (aMUSEd); `recap-tokens`
is for images that this package's loop writes, where the commit rule says beforehand how many slots come next.
"""

from __future__ import annotations

from hasten.caching.kv_scattered import Groups
from hasten.recipe import Recipe
from hasten.samplers.commit import Unmask as _Unmask
from hasten.samplers.commit_images import Annealed, Curve
from hasten.samplers.text_blocks import InBlocks, Whole

_MODELS = ("masked image models: tiny-mask",)


def maskgit(steps: int = 12, temperature: float = 4.5, power: float | None = None) -> Recipe:
    """MaskGIT: a cosine (or 1 - r^power) of open slots, the surest first with noise that fades out, everything computed."""
    return Recipe(
        commit=_Unmask(rule=Curve(steps=steps, power=power), score=Annealed(steps=steps, temperature=temperature)),
        blocks=InBlocks(rule=Whole()),
        models=_MODELS,
        paper="MaskGIT, arXiv 2202.04200",
    )


def recap_tokens(
    steps: int = 16, temperature: float = 4.5, power: float | None = None, local: int = 1, full: int | None = None
) -> Recipe:
    """ReCAP on the loop of texts: behind the first `full` steps (half of them) only slots whose turn it is are computed.

    Liu et al. A step that computes everything chooses the slots of the `local` steps after it; those read the kept keys
    of all others. `local` 0 is `maskgit`. Differs: the curve is MaskGIT's cosine unless `power` is given (theirs: 2.5).
    """
    groups = Groups(local=local, full=steps // 2 if full is None else full)
    return maskgit(steps, temperature, power).model_copy(update={"kv": groups, "paper": "ReCAP, arXiv 2505.19089"})
