"""Recipes that leave blocks out: the inside of a denoiser's step, for transformers whose blocks form a chain."""

from __future__ import annotations

from hasten.caching.rules import Every
from hasten.caching.spans import BlockShare, Chosen, RearThenFront
from hasten.caching.stack import StackReuse
from hasten.caching.stack_signals import BlockInput, Magnitude
from hasten.caching.tokens import MovedTokens
from hasten.drift import Drift
from hasten.forecast import Hold, Polynomial
from hasten.recipe import Recipe


def db_cache(
    limit: float = 0.08, lead: int = 1, back: int = 1, warmup: float = 0.16, max_skips: int | None = None
) -> Recipe:
    """DBCache: the first blocks decide, the last ones repair, the middle is held.

    cache-dit's FnBn: n = `lead` and `back`. Its defaults are F8 B0 and 8 steps of warm-up, for networks of 40 to 60 blocks at
    50 steps; ours fit any depth. Differs: injections between blocks apply on skipped steps, one decision is made per step
    for all branches, and the last step is computed.
    """
    return Recipe(
        reuse=StackReuse(
            lead=lead,
            back=back,
            rule=Drift(limit=limit, accumulate=False, warmup=warmup, max_skips=max_skips),
            forecast=Hold(),
        ),
        paper="DBCache, cache-dit",
    )


def db_cache_forecast(
    limit: float = 0.12, lead: int = 1, back: int = 1, order: int = 1, warmup: float = 0.16, max_skips: int | None = 4
) -> Recipe:
    """DBCache with the middle's residual extrapolated on the real time grid.

    Differs from cache-dit's TaylorSeer calibrator: a polynomial through the computed values at their own times, which is
    exact on polynomials of its degree for any spacing.
    """
    return Recipe(
        reuse=StackReuse(
            lead=lead,
            back=back,
            rule=Drift(limit=limit, accumulate=False, warmup=warmup, max_skips=max_skips),
            forecast=Polynomial(order=order),
        ),
        paper="DBCache, cache-dit; forecasts after TaylorSeer, arXiv 2503.06923",
    )


def teacache(
    limit: float = 0.15,
    polynomial: tuple[float, ...] = (1.0, 0.0),
    domain: tuple[float, float] | None = None,
    warmup: float = 0.02,
) -> Recipe:
    """TeaCache: skip all blocks while the change of what the first one is called with adds up to little.

    Differs: the change is seen from outside the block (`BlockInput`), the polynomial is the identity until
    `hasten profile` has fitted one to the model, and one decision is made per step for all branches.
    """
    return Recipe(
        reuse=StackReuse(
            lead=0,
            signal=BlockInput(polynomial=polynomial, domain=domain),
            rule=Drift(limit=limit, accumulate=True, warmup=warmup),
            forecast=Hold(),
        ),
        paper="TeaCache, arXiv 2411.19108",
    )


def magcache(
    limit: float = 0.06, max_skips: int = 3, warmup: float = 0.2, ratios: tuple[float, ...] = ()
) -> Recipe:
    """MagCache: skip all blocks while the magnitude of what they add is expected to move little.

    Paper: limit 0.06, at most 3 skips in a row, 20 % of the steps as warm-up. Differs: without calibrated `ratios`
    (`hasten profile` records them) the ratio is measured at computed steps, and the report says so.
    """
    return Recipe(
        reuse=StackReuse(
            lead=0,
            signal=Magnitude(ratios=ratios),
            rule=Drift(limit=limit, accumulate=True, warmup=warmup, max_skips=max_skips),
            forecast=Hold(),
        ),
        paper="MagCache, arXiv 2506.09045",
    )


def delta_dit(share: float = 0.75, interval: int = 2, switch: float = 0.5) -> Recipe:
    """Delta-DiT: hold the rear blocks early in the run, the front blocks late.

    share: part of the blocks that is left out (the paper's N_c of N); interval: one full step in so many (its N);
    switch: share of the run at which it changes sides (its b). Differs: blocks are counted through all block lists.
    """
    return Recipe(
        reuse=StackReuse(
            lead=0, span=RearThenFront(share=share, switch=switch), rule=Every(interval=interval), forecast=Hold()
        ),
        paper="Delta-DiT, arXiv 2406.01125",
    )


def profiling_dit(blocks: tuple[int, ...] = (), interval: int = 3, warmup: int = 3) -> Recipe:
    """ProfilingDiT: hold the blocks that a profile of the model found to move least.

    blocks: their numbers, counted through all block lists; `hasten profile` writes them. Without any the middle half of
    the blocks is taken, and the report says that nothing was profiled.
    """
    return Recipe(
        reuse=StackReuse(
            lead=0,
            span=Chosen(blocks=blocks) if blocks else BlockShare(start=0.25, stop=0.75),
            rule=Every(interval=interval, warmup=warmup),
            forecast=Hold(),
        ),
        paper="ProfilingDiT, arXiv 2504.03140",
    )


def moved_tokens(early: float = 0.5, late: float = 0.25, interval: int = 2) -> Recipe:
    """Every second step runs only the tokens that have moved furthest; the others keep their held residual.

    Experimental. After SADA's token-wise mode and DyDiT's timestep-dependent width, without training. Acts on networks
    with one stream of tokens; elsewhere whole blocks are left out, and the report says so.
    """
    return Recipe(
        reuse=StackReuse(
            lead=0, rule=Every(interval=interval), forecast=Hold(), tokens=MovedTokens(early=early, late=late)
        ),
        paper="SADA, arXiv 2507.17135; DyDiT, arXiv 2410.03456",
    )
