"""Recipes for denoisers: image and video diffusion and flow matching."""

from __future__ import annotations

from hasten.budget import Budget
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every, Listed
from hasten.caching.signals import OutputChange
from hasten.caching.stack import StackReuse
from hasten.drift import Drift
from hasten.forecast import Hold, LeaveOneOut, Polynomial
from hasten.ledger import Ledger
from hasten.recipe import Adapter, Recipe
from hasten.samplers.chunk_calls import ChunkCalls  # noqa: F401  # no recipe of a name has it; files name its kind
from hasten.samplers.few_calls import FewCalls  # noqa: F401  # no recipe of a name has it; files name its kind
from hasten.samplers.guidance import AdaptiveGuidance, AffineGuidance, GuidanceInterval, HeldGuidance
from hasten.samplers.guidance_ledger import LedgerGuidance  # noqa: F401  # no recipe of a name has it; files name its kind
from hasten.samplers.solver import Solver


def plain() -> Recipe:
    """Nothing enabled: the host as it is, only watched. Bit-identical to not using hasten."""
    return Recipe()


def balanced() -> Recipe:
    """About a quarter of the evaluations; damped linear forecasts, each gap put right when it ends.

    The positions were chosen at 50 steps on tuning prompts, see `benchmarks/tune_presets.py`.
    """
    at = (0.0, 0.082, 0.122, 0.163, 0.224, 0.286, 0.367, 0.469, 0.571, 0.694, 0.837, 0.939)
    return Recipe(
        reuse=NetworkReuse(rule=Listed(at=at, share=0.24), forecast=Polynomial(order=1, damp=0.75), correct=2),
        models=("any denoiser with an Euler or DDIM solver",),
    )


def fast(student: bool = True) -> Recipe:
    """Four calls of a distilled student where hasten has one for the model; else about a sixth of the evaluations.

    A student draws as well as its teacher, but not the same pictures (docs/distill-bench.md). Without one (student=false, or
    a model that none comes for): damped linear forecasts, each gap put right when it ends, at positions that were chosen at
    50 steps on tuning prompts by a search, see `benchmarks/tune_presets.py`.
    """
    at = (0.0, 0.102, 0.163, 0.224, 0.367, 0.551, 0.776, 0.918)
    return Recipe(
        reuse=NetworkReuse(rule=Listed(at=at, share=0.16), forecast=Polynomial(order=1, damp=0.75), correct=2),
        adapter=Adapter(calls=4) if student else None,
        models=("any denoiser with an Euler or DDIM solver",),
    )


def fastest() -> Recipe:
    """One call of a distilled student, where hasten has one for the model; refused elsewhere."""
    return Recipe(adapter=Adapter(calls=1), models=("tiny-image", "tiny-video"))


def auto(latent_error: float | None = None, psnr: float | None = None, quality: float | None = None) -> Recipe:
    """No threshold: skip as long as the measured errors of the forecasts stay within a budget.

    At most one of latent_error (default 0.05), psnr (in dB) and quality (0 to 1), as in `hasten.Budget`, which may be
    passed in place of a recipe.
    """
    given = {"latent_error": latent_error, "psnr": psnr, "quality": quality}
    chosen = {name: value for name, value in given.items() if value is not None} or {"latent_error": 0.05}
    forecast = LeaveOneOut(min_order=1, max_order=2, damp=0.75, memory=0.5)
    return Recipe(
        reuse=NetworkReuse(rule=Ledger(tolerance=Budget(**chosen).tolerance), forecast=forecast, correct=2),
        models=("any denoiser",),
    )


def easycache(limit: float = 0.05, warmup: float = 0.2) -> Recipe:
    """EasyCache: skip while the predicted change of the output adds up to less than a limit.

    Zhou et al. Official code: 10 of 50 steps of warm-up on Wan, the last step computed, decided on the
    conditional branch. Differs: decided on the first branch of each step, whichever that is.
    """
    return Recipe(
        reuse=NetworkReuse(
            rule=Drift(limit=limit, accumulate=True, warmup=warmup), signal=OutputChange(), forecast=Hold(), of="residual"
        ),
        paper="EasyCache, arXiv 2507.02860",
    )


def easycache_forecast(limit: float = 0.05, warmup: float = 0.1) -> Recipe:
    """EasyCache's rule with corrected polynomial forecasts in place of its input shift."""
    return Recipe(
        reuse=NetworkReuse(
            rule=Drift(limit=limit, accumulate=True, warmup=warmup),
            signal=OutputChange(),
            forecast=LeaveOneOut(max_order=2),
            correct=2,
        ),
        paper="EasyCache, arXiv 2507.02860, rule only",
    )


def first_block_cache(limit: float = 0.08, lead: int = 1) -> Recipe:
    """First-block caching: run the first block, skip the others while its residual has hardly moved.

    ParaAttention; `lead` > 1 is FnB0 of DBCache. Differs: injections between blocks (ControlNet, VACE) apply on
    skipped steps, and one decision is made per step for all branches.
    """
    return Recipe(
        reuse=StackReuse(lead=lead, rule=Drift(limit=limit, accumulate=False, warmup=0.06), forecast=Hold()),
        paper="First-block caching, ParaAttention",
    )


def first_block_forecast(limit: float = 0.15, lead: int = 1, order: int = 1) -> Recipe:
    """First-block caching whose skipped residual is extrapolated on the real time grid instead of held."""
    return Recipe(
        reuse=StackReuse(
            lead=lead, rule=Drift(limit=limit, accumulate=False, warmup=0.06, max_skips=4), forecast=Polynomial(order=order)
        ),
        paper="First-block caching, ParaAttention; forecasts after TaylorSeer, arXiv 2503.06923",
    )


def every_other(interval: int = 2) -> Recipe:
    """Compute every second step and hold the output in between: the simplest cache, a larger Euler step."""
    return Recipe(reuse=NetworkReuse(rule=Every(interval=interval), forecast=Hold()), paper="FORA, arXiv 2407.01425")


def adaptive_guidance(agreement: float = 0.9999, after: float = 0.2) -> Recipe:
    """Adaptive Guidance: drop the unconditional branch for good once both branches agree."""
    return Recipe(guidance=AdaptiveGuidance(agreement=agreement, after=after), paper="Adaptive Guidance, arXiv 2312.12487")


def linear_ag(every: int = 2) -> Recipe:
    """LinearAG: an affine combination of earlier outputs stands in for every second unconditional one."""
    return Recipe(guidance=AffineGuidance(every=every), paper="LinearAG, arXiv 2312.12487")


def held_guidance(after: float = 0.3, every: int = 2) -> Recipe:
    """Keep the guidance difference c - u and refresh it at every second evaluated step."""
    return Recipe(guidance=HeldGuidance(after=after, every=every), paper="Guidance reuse, as in FasterCache 2410.19355")


def guidance_interval(low: float = 0.1, high: float = 0.9) -> Recipe:
    """Guide only in the middle of the noise levels."""
    return Recipe(guidance=GuidanceInterval(low=low, high=high), paper="Guidance interval, arXiv 2404.07724")


def fewer_steps(share: float = 0.25) -> Recipe:
    """The control every cache must beat: a second-order solver (UniPC) on a share of the steps."""
    return Recipe(sampler=Solver(name="unipc", steps=share), paper="UniPC, arXiv 2302.04867")


def listed(at: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)) -> Recipe:
    """Compute at the listed shares of the run and forecast in between: for schedules found by a search."""
    return Recipe(reuse=NetworkReuse(rule=Listed(at=at), forecast=Polynomial(order=2), correct=2))
