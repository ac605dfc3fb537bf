"""Does it help to run some tokens, heads or channels of a step, in place of all or none? The numbers of docs/caching.md.

    python benchmarks/widths.py --part tokens
    python benchmarks/widths.py --part channels

Four prompts with two seeds each on tiny-image, none of them in the other benchmarks; prints the computed fraction and the
median and worst PSNR to the plain run.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Iterator

from hasten import metrics
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every
from hasten.caching.stack import StackReuse
from hasten.caching.stack_stability import PathStability, UnstableTokens
from hasten.caching.tokens import MovedTokens
from hasten.caching.width import StraightWidth, WidthReuse
from hasten.drift import Drift
from hasten.forecast import Hold, Polynomial
from hasten.forecast_adams import Adams
from hasten.pipelines.bench.candidates import ours
from hasten.pipelines.bench.shots import Sample, shoot
from hasten.pipelines.recipes.network import sada
from hasten.pipelines.tiny_models import call_defaults, load
from hasten.recipe import Recipe, ReusePolicy

PROMPTS = ("a two", "a five", "a eight", "a zero")
SEEDS = (100, 101)


def tokens() -> Iterator[tuple[str, ReusePolicy]]:
    """SADA's token-wise mode beside the same steps without it."""
    for forecast in (Hold(), Polynomial(order=1)):
        head = f"{forecast.kind}, every 2nd step full"
        rule = Drift(limit=2.0, accumulate=False, max_skips=1, warmup=0.2, tail=0.06)
        common = {"lead": 0, "signal": PathStability(), "rule": rule, "forecast": forecast}
        yield f"{head}, no tokens", StackReuse(**common)
        for when in ("unstable", "skipped"):
            chosen = UnstableTokens(share=0.25, when=when)  # type: ignore[arg-type]
            yield f"{head}, the least stable quarter at {when} steps", StackReuse(**common, tokens=chosen)
        yield f"{head}, the quarter that moved most", StackReuse(**common, tokens=MovedTokens(early=0.25, late=0.25))
    stable = Drift(limit=0.0, accumulate=False, max_skips=4, warmup=0.2, tail=0.06)
    yield "polynomial, stable steps left out", StackReuse(
        lead=0, signal=PathStability(), rule=stable, forecast=Polynomial(order=1)
    )
    reuse = sada().reuse
    assert reuse is not None
    yield "sada (step-wise and multistep-wise, whole network)", reuse


def channels() -> Iterator[tuple[str, ReusePolicy]]:
    """DyDiT's width without training, left out and held; and what else the same work buys."""
    for share in (0.9, 0.75, 0.5):
        for order in ("norm", "measured"):
            width = StraightWidth(early=share, late=share)
            yield f"{share:.0%} of heads and channels ({order})", WidthReuse(width=width, order=order)  # type: ignore[arg-type]
    only = StraightWidth(early=0.75, late=0.75, heads=False)
    yield "75% of the channels, all heads (measured)", WidthReuse(width=only, order="measured")
    half = StraightWidth(early=0.5, late=0.5)
    for interval in (2, 4):
        for forecast in (Hold(), Polynomial(order=1)):
            reuse = WidthReuse(width=half, order="measured", rule=Every(interval=interval), forecast=forecast)
            yield f"50%, the rest by {forecast.kind}, every {interval}. step full", reuse
        yield f"every {interval}. step computed, linear", NetworkReuse(rule=Every(interval=interval), forecast=Polynomial(order=1))
        yield f"every {interval}. step computed, adams", NetworkReuse(rule=Every(interval=interval), forecast=Adams(order=1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default="tokens", choices=["tokens", "channels"])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    pipe, call = load("tiny-image"), call_defaults("tiny-image")
    pipe.set_progress_bar_config(disable=True)
    samples = [Sample(prompt, seed) for prompt in PROMPTS for seed in SEEDS]
    plain = [shoot(pipe, sample, call) for sample in samples]
    print(f"tiny-image, {type(pipe.scheduler).__name__}, {len(samples)} samples", flush=True)
    for label, reuse in (tokens if arguments.part == "tokens" else channels)():
        shots = [shoot(pipe, sample, call, ours("trial", Recipe(reuse=reuse))) for sample in samples]
        found = [metrics.psnr(a.frames, b.frames) for a, b in zip(plain, shots, strict=True)]
        computed = statistics.median(shot.computed_fraction or 0.0 for shot in shots)
        print(f"  {statistics.median(found):5.1f} dB, worst {min(found):5.1f}, computed {computed:.2f}: {label}", flush=True)


if __name__ == "__main__":
    main()
