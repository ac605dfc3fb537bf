"""Recipes about how much of a picture or clip the network sees at once: lower resolutions, windows in time, drafts."""

from __future__ import annotations

from typing import Literal

from hasten.recipe import Recipe
from hasten.samplers.bottleneck import Bottleneck, Stage
from hasten.samplers.draft import Draft
from hasten.samplers.windows import Windows


def bottleneck(
    scale: float = 0.5, first: float = 0.1, last: float = 0.7, back: float = 0.1, steps: float = 0.7,
    noise: Literal["fresh", "kept"] = "fresh",
) -> Recipe:  # fmt: skip
    """Bottleneck Sampling: full resolution at the beginning and the end, a lower one in between. Experimental.

    scale: of height and width in between, which begins after the share `first` of the run and ends at `last`; from there the
    run goes `back` and ends at full size. steps: share of the steps asked for. Tian et al. claim 3x on images and 2.5x on
    videos; it needs a model that knows the lower resolution. Where they know one, fewer steps are better by far:
    docs/resolutions.md.
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


def windows(
    frames: int = 9, overlap: int = 4, blend: Literal["linear", "flat", "cosine"] = "linear",
    noise: Literal["own", "shuffled"] = "own",
) -> Recipe:  # fmt: skip
    """Windows of latent frames, blended, for clips longer than those that a model was trained on. Experimental.

    frames: latent frames of a window, of which `overlap` are shared with the next. Magic 1-For-1 moves its window along the
    clip, one after the other; here all windows are evaluated at each step and averaged, as MultiDiffusion does with places.
    """
    return Recipe(
        sampler=Windows(frames=frames, overlap=overlap, blend=blend, noise=noise),
        paper="MultiDiffusion, arXiv 2302.08113; FreeNoise, arXiv 2310.15169; Magic 1-For-1, arXiv 2502.07701",
        models=("Wan, HunyuanVideo, Mochi",),
    )


def draft(recipe: str = "fast", steps: int | None = None, share: float = 0.5) -> Recipe:
    """Start from a cheap draft: it is given noise again, and only the last part of the run is walked by the full model.

    recipe: of the draft, asked for `steps`; '' for a draft that the caller passes as `latents=`. share: of the steps asked
    for that are walked after it. CAT-DM's draft is a GAN's; ours is any recipe's, a student's calls for example.
    """
    return Recipe(
        sampler=Draft(recipe=recipe, steps=steps, share=share),
        paper="CAT-DM, arXiv 2311.18405; SDEdit, arXiv 2108.01073",
        models=("any pipeline that takes latents",),
    )
