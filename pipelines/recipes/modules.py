"""Recipes that reuse what modules inside the network return."""

from __future__ import annotations

from hasten.caching.context import ContextReuse, TokensChanged
from hasten.caching.deep import DeepReuse
from hasten.caching.extrapolation import Dynamic, Taylor
from hasten.caching.modules import ModuleReuse
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every, Window
from hasten.drift import Drift
from hasten.forecast import Hold, Polynomial
from hasten.recipe import Recipe
from hasten.samplers.guidance_frequency import FrequencyGuidance


def pyramid_attention_broadcast(spatial: int = 2, temporal: int = 4, cross: int = 6) -> Recipe:
    """Pyramid attention broadcast: hold attention outputs in the middle of the run, cross-attention the longest.

    Zhao et al.; their intervals, and their timesteps 800 to 100 as shares of the run. Differs: each branch has its
    own history (with sequential guidance a shared one would make both branches equal).
    """
    return Recipe(
        reuse=ModuleReuse(
            self_attention=Window(interval=spatial),
            temporal_attention=Window(interval=temporal),
            cross_attention=Window(interval=cross),
        ),
        paper="Pyramid attention broadcast, arXiv 2408.12588",
    )


def taylor_seer(interval: int = 5, order: int = 1, warmup: int = 3) -> Recipe:
    """TaylorSeer: forecast every attention and feed-forward output between computed steps.

    Liu et al. Differs: the polynomial through the last values on the solver's real time grid, which is exact where
    backward differences are not. `taylor-seer-differences` is the paper's own series.
    """
    every = Every(interval=interval, warmup=warmup)
    return Recipe(
        reuse=ModuleReuse(
            self_attention=every,
            temporal_attention=every,
            cross_attention=every,
            feed_forward=every,
            forecast=Polynomial(order=order),
        ),
        paper="TaylorSeer, arXiv 2503.06923",
    )


def taylor_seer_differences(interval: int = 5, order: int = 1, warmup: int = 3) -> Recipe:
    """TaylorSeer as published: backward differences in the step index, for every attention and feed-forward output."""
    every = Every(interval=interval, warmup=warmup)
    return Recipe(
        reuse=ModuleReuse(
            self_attention=every,
            temporal_attention=every,
            cross_attention=every,
            feed_forward=every,
            forecast=Taylor(order=order),
            clock="step",
        ),
        paper="TaylorSeer, arXiv 2503.06923",
    )


def taylor_seer_lite(interval: int = 3, order: int = 1, warmup: int = 3) -> Recipe:
    """TaylorSeer of the network's output only: one forecast tensor per branch in place of one per module."""
    return Recipe(
        reuse=NetworkReuse(rule=Every(interval=interval, warmup=warmup), forecast=Polynomial(order=order)),
        paper="TaylorSeer, arXiv 2503.06923, output only",
    )


def faster_cache(interval: int = 2, after: float = 0.25, every: int = 5) -> Recipe:
    """FasterCache: attention outputs extrapolated by a growing weight, and u restored from c by frequency bands.

    Lv et al. Differs: branches have their own histories, and the gains of the bands do not compound. On pipelines
    that evaluate both branches in one batch, the half batch has to compute its attention before it can reuse it.
    """
    window = Window(interval=interval, begin=after, end=1.0)
    return Recipe(
        reuse=ModuleReuse(self_attention=window, temporal_attention=window, forecast=Dynamic()),
        guidance=FrequencyGuidance(after=max(after, 0.33), every=every),
        paper="FasterCache, arXiv 2410.19355",
    )


def deep_cache(interval: int = 3, branch: int = 0) -> Recipe:
    """DeepCache: between full evaluations of a U-Net only its outermost layers run.

    Ma et al.; their interval for Stable Diffusion. Differs: ControlNet residuals apply to what runs, and when guidance is
    evaluated branch by branch, each branch has its own deep feature.
    """
    return Recipe(
        reuse=DeepReuse(branch=branch, rule=Every(interval=interval)),
        models=("U-Nets: Stable Diffusion 1.x, 2.x, XL and video models of the same layout",),
        paper="DeepCache, arXiv 2312.00858",
    )


def recap(interval: int = 2) -> Recipe:
    """ReCAP for masked image models: on local steps decided tokens are context, kept as keys and values.

    Liu et al. Differs: tokens that were decided since the last evaluation are computed once more.
    """
    return Recipe(
        reuse=ContextReuse(rule=Every(interval=interval)),
        models=("masked image models with transformer layers: aMUSEd",),
        paper="ReCAP, arXiv 2505.19089",
    )


def token_change_cache(limit: float = 0.1) -> Recipe:
    """Masked image models: hold the logits until a share of the tokens has been decided anew."""
    return Recipe(
        reuse=NetworkReuse(rule=Drift(limit=limit, warmup=0.1), signal=TokensChanged(), forecast=Hold()),
        models=("masked image models",),
        paper="",
    )
