"""In which coordinate, and of what, is a skipped output forecast best? The numbers of docs/caching.md.

    python benchmarks/forecast_axes.py --model tiny-image --solver keep --samples 4

Every forecast on one schedule, on tuning prompts; prints the median and worst PSNR to the plain run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import warnings

from tune_presets import TUNING  # beside this file, where Python looks first

from hasten import metrics
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Spread
from hasten.forecast import Forecast, Hold, LeaveOneOut, Polynomial
from hasten.pipelines.bench.candidates import ours
from hasten.pipelines.bench.shots import shoot
from hasten.pipelines.recipes.network import sada, seacache
from hasten.pipelines.solver import other_scheduler
from hasten.pipelines.tiny_models import call_defaults, load
from hasten.recipe import Recipe

FORECASTS: list[Forecast] = [
    Hold(), Polynomial(order=1), Polynomial(order=2), LeaveOneOut(max_order=2), Polynomial(order=1, damp=0.75),
    LeaveOneOut(min_order=1, max_order=2, damp=0.75, memory=0.5),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny-image", choices=list(TUNING))
    parser.add_argument("--solver", default="keep")
    parser.add_argument("--share", type=float, default=0.22)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--correct", type=int, default=0, help="degree of the correction; then only outputs are forecast")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    pipe = load(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = other_scheduler(pipe.scheduler, arguments.solver)
    call = call_defaults(arguments.model)
    samples = TUNING[arguments.model][: arguments.samples]
    plain = [shoot(pipe, sample, call) for sample in samples]
    print(f"{arguments.model}, {type(pipe.scheduler).__name__}, {len(samples)} samples", flush=True)

    def score(label: str, recipe: Recipe) -> None:
        shots = [shoot(pipe, sample, call, ours("trial", recipe)) for sample in samples]
        found = [metrics.psnr(a.frames, b.frames) for a, b in zip(plain, shots, strict=True)]
        nfe = statistics.median(shot.nfe or 0 for shot in shots)
        off = statistics.geometric_mean(
            metrics.latent_error(shot.latents, p.latents)
            for p, shot in zip(plain, shots, strict=True)
            if p.latents is not None and shot.latents is not None
        )
        print(
            f"  {statistics.median(found):5.1f} dB, worst {min(found):5.1f}, latent error {off:.4f}, nfe {nfe:.0f}: {label}",
            flush=True,
        )

    rule = Spread(share=arguments.share, ends=0.2, skew=1.3, until=0.91, by="step")
    targets = ("output",) if arguments.correct else ("output", "data")
    for of, axis, forecast in itertools.product(targets, ("time", "log_snr"), FORECASTS):
        reuse = NetworkReuse(rule=rule, forecast=forecast, of=of, axis=axis, correct=arguments.correct)  # type: ignore[arg-type]
        score(f"{forecast!r} of {of} in {axis}", Recipe(name="trial", reuse=reuse))
    if not arguments.correct:
        score("seacache", seacache())
        score("sada", sada())


if __name__ == "__main__":
    main()
