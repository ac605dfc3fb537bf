"""In which coordinate, and of what, is a skipped output forecast best? The numbers of docs/caching.md.

    python benchmarks/forecast_axes.py --model tiny-image --solver keep --samples 4

Every forecast on one schedule, on tuning prompts; prints the median and worst PSNR to the plain run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import warnings

from hasten import metrics
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Spread
from hasten.forecast import Forecast, Hold, LeaveOneOut, Polynomial
from hasten.pipelines.candidates import ours
from hasten.pipelines.recipes.network import sada, seacache
from hasten.pipelines.shots import Sample, shoot
from hasten.pipelines.solver import other_scheduler
from hasten.pipelines.tiny_models import call_defaults, load
from hasten.recipe import Recipe

PROMPTS = {
    "tiny-video": ["a two moving left, quickly", "a five moving up, slowly", "a eight moving down, quickly"],
    "tiny-image": ["a two", "a five", "a eight", "a zero", "a six", "a one"],
}
FORECASTS: list[Forecast] = [Hold(), Polynomial(order=1), Polynomial(order=2), LeaveOneOut(max_order=2)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny-image", choices=list(PROMPTS))
    parser.add_argument("--solver", default="keep")
    parser.add_argument("--share", type=float, default=0.22)
    parser.add_argument("--samples", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    pipe = load(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = other_scheduler(pipe.scheduler, arguments.solver)
    call = call_defaults(arguments.model)
    samples = [Sample(text, 100 + i) for i, text in enumerate(PROMPTS[arguments.model][: arguments.samples])]
    plain = [shoot(pipe, sample, call) for sample in samples]
    print(f"{arguments.model}, {type(pipe.scheduler).__name__}, {len(samples)} samples", flush=True)

    def score(label: str, recipe: Recipe) -> None:
        shots = [shoot(pipe, sample, call, ours("trial", recipe)) for sample in samples]
        found = [metrics.psnr(a.frames, b.frames) for a, b in zip(plain, shots, strict=True)]
        nfe = statistics.median(shot.nfe or 0 for shot in shots)
        print(f"  {statistics.median(found):5.1f} dB, worst {min(found):5.1f}, nfe {nfe:.0f}: {label}", flush=True)

    rule = Spread(share=arguments.share, ends=0.2, skew=1.3, until=0.91, by="step")
    for of, axis, forecast in itertools.product(("output", "data"), ("time", "log_snr"), FORECASTS):
        reuse = NetworkReuse(rule=rule, forecast=forecast, of=of, axis=axis)  # type: ignore[arg-type]
        score(f"{forecast!r} of {of} in {axis}", Recipe(name="trial", reuse=reuse))
    score("seacache", seacache())
    score("sada", sada())


if __name__ == "__main__":
    main()
