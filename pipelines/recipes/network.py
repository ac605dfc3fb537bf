"""Recipes that skip whole evaluations: one signal, one rule and one forecast each, on any denoiser."""

from __future__ import annotations

from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every
from hasten.caching.rules_phases import Phases
from hasten.caching.signals_spectral import SpectralChange
from hasten.caching.signals_stability import Stability
from hasten.drift import Drift
from hasten.forecast import LeaveOneOut, Polynomial
from hasten.recipe import Recipe


def seacache(limit: float = 0.25, max_skips: int = 2, power: float = 3.0) -> Recipe:
    """SeaCache: skip while the latents, filtered for what is data at this noise level, have hardly moved.

    Chung et al. Defaults of diffusers' SeaCacheConfig: limit 0.25, at most 2 skips in a row, the first and the last
    step computed, linear extrapolation. Differs: the whole network's output less its input is extrapolated, on the
    real time grid, in place of the residual of the blocks, so that any network works.
    """
    return Recipe(
        reuse=NetworkReuse(
            rule=Drift(limit=limit, accumulate=True, max_skips=max_skips, warmup=0.0, tail=0.0),
            signal=SpectralChange(power=power),
            forecast=Polynomial(order=1),
            of="residual",
        ),
        paper="SeaCache, arXiv 2602.18993",
    )


def sada(switch: float = 0.48, interval: int = 4, warmup: float = 0.2, max_skips: int = 4) -> Recipe:
    """SADA: skip where the path is getting straighter; from about the middle compute one step in a few.

    Jiang et al. Official settings at 50 steps: adaptive from step 10, at most 4 skips in a row, one step in 4 after
    step 24 with Lagrange interpolation of the data over 3 or 4 nodes. Differs: the number of nodes, up to 4, is the one
    that predicted the last computed value best (always 4 was 30 dB worse on tiny-image); the same interpolation
    stands in from the start, where the official code holds the noise; the token-wise mode is not part of this recipe.
    """
    return Recipe(
        reuse=NetworkReuse(
            rule=Phases(
                early=Drift(limit=0.0, accumulate=False, max_skips=max_skips, warmup=warmup, tail=0.06),
                late=Every(interval=interval),
                switch=switch,
            ),
            signal=Stability(),
            forecast=LeaveOneOut(max_order=3),
            of="data",
        ),
        paper="SADA, arXiv 2507.17135, step-wise and multistep-wise modes",
    )
