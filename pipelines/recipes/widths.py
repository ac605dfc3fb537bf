"""Recipes that run a part of the width: some of the tokens, of the attention heads, of the feed-forward channels."""

from __future__ import annotations

from hasten.caching.rules import Every
from hasten.caching.stack import StackReuse
from hasten.caching.stack_stability import PathStability, UnstableTokens
from hasten.caching.width import StraightWidth, WidthReuse
from hasten.drift import Drift
from hasten.forecast import Hold, Polynomial
from hasten.recipe import Recipe


def sada_tokens(share: float = 0.25, max_skips: int = 1, warmup: float = 0.2) -> Recipe:
    """SADA, token-wise mode: stable steps run no blocks, unstable ones the least stable tokens.

    Experimental. Jiang et al.: tokens whose own criterion is not negative are computed at unstable steps, the others reuse. Differs:
    the criterion is read off the stream that enters the blocks, a fixed `share` of the tokens is taken, and they are chosen at the last
    full step. Acts on networks with one stream of tokens; elsewhere whole blocks are left out, and the report says so.
    """
    return Recipe(
        reuse=StackReuse(
            lead=0,
            signal=PathStability(),
            # No cosine reaches 2: steps are full in the warm-up, the tail and after `max_skips` others.
            rule=Drift(limit=2.0, accumulate=False, max_skips=max_skips, warmup=warmup, tail=0.06),
            forecast=Hold(),
            tokens=UnstableTokens(share=share, when="unstable"),
        ),
        paper="SADA, arXiv 2507.17135, token-wise mode",
    )


def dydit(early: float = 0.75, late: float = 1.0, heads: bool = True, channels: bool = True) -> Recipe:
    """DyDiT's timestep-dependent width: fewer heads and channels at early steps, the least important left out.

    Experimental. Zhao et al. train the router and the weights; without that, quality is lost. The place for a trained router is
    `reuse.width`: a table, or a class of your own. Differs: importance as measured at the first evaluation of the session, the same
    share for all blocks.
    """
    width = StraightWidth(early=early, late=late, heads=heads, channels=channels)
    return Recipe(
        reuse=WidthReuse(width=width, order="measured"),
        paper="DyDiT, arXiv 2410.03456",
    )


def dydit_forecast(share: float = 0.5, interval: int = 2, order: int = 1) -> Recipe:
    """The most important heads and channels run at every step; what the rest adds is forecast between full steps.

    Experimental. DyDiT's width (Zhao et al.) without training: what is not run is extrapolated, not dropped.
    """
    return Recipe(
        reuse=WidthReuse(
            width=StraightWidth(early=share, late=share),
            order="measured",
            rule=Every(interval=interval),
            forecast=Polynomial(order=order),
        ),
        paper="after DyDiT, arXiv 2410.03456",
    )
