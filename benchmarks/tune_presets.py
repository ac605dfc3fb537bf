"""How the numbers in `balanced` and `fast` were chosen: a closed-loop search on tuning prompts.

Prompts and seeds are never those of `hasten bench recipes` (a test holds that).

    python benchmarks/tune_presets.py --model tiny-video --computed 12 8

First the forecast on an even schedule, then the schedule with the best forecast. Prints every configuration tried.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from typing import Any

from hasten import metrics
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Spread
from hasten.forecast import Forecast, Hold, Polynomial
from hasten.pipelines.candidates import fewer_steps, ours
from hasten.pipelines.shots import Sample, Shot, shoot
from hasten.pipelines.tiny_models import call_defaults, load
from hasten.recipe import Guidance, Recipe
from hasten.samplers.guidance import HeldGuidance

TUNING = {
    "tiny-video": [
        Sample("a two moving left, slowly", 100),
        Sample("a five moving up, slowly", 101),
        Sample("a eight moving down, quickly", 102),
        Sample("a zero moving right, slowly", 103),
        Sample("a six moving up, quickly", 104),
        Sample("a one moving down, slowly", 105),
    ],
    "tiny-image": [
        Sample("a two at the top right", 100),
        Sample("a five at the top left", 101),
        Sample("a eight at the bottom right", 102),
        Sample("a zero at the top right", 103),
        Sample("a six at the bottom left", 104),
        Sample("a one at the top left", 105),
    ],
}

Setting = tuple[Forecast, int, Spread, Guidance | None]


def recipe(setting: Setting) -> Recipe:
    forecast, correct, rule, guidance = setting
    return Recipe(name="trial", reuse=NetworkReuse(rule=rule, forecast=forecast, correct=correct), guidance=guidance)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny-video")
    parser.add_argument("--computed", type=int, nargs="+", default=[12, 8])
    parser.add_argument("--samples", type=int, default=4)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    pipe = load(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    call, samples = call_defaults(arguments.model), TUNING[arguments.model][: arguments.samples]
    steps = call["num_inference_steps"]
    plain = [shoot(pipe, sample, call) for sample in samples]
    print(f"plain {statistics.median(shot.seconds for shot in plain):.2f} s", flush=True)

    def score(label: str, candidate: Any) -> float:
        shots: list[Shot] = [shoot(pipe, sample, call, candidate) for sample in samples]
        values = [metrics.psnr(a.frames, b.frames) for a, b in zip(plain, shots, strict=True)]
        seconds = statistics.median(a.seconds / b.seconds for a, b in zip(plain, shots, strict=True))
        print(
            f"  {statistics.median(values):5.1f} dB, worst {min(values):5.1f}, {seconds:4.2f} x, nfe {shots[0].nfe}: {label}",
            flush=True,
        )
        return statistics.median(values) + min(values)

    for num in arguments.computed:
        print(f"{num} computed steps")
        for solver in ("unipc", "dpm++"):
            score(f"control: {solver} {num} steps", fewer_steps(solver, num))
        even = Spread(share=num / steps, by="step", until=(num - 1) / num, skew=1.2, ends=0.4)
        forecasts: list[tuple[Forecast, int]] = [
            (Hold(), 1), (Polynomial(order=1, damp=0.75), 2), (Polynomial(order=1), 1), (Polynomial(order=1), 2),
            (Polynomial(order=1), 0), (Polynomial(order=2), 2),
        ]  # fmt: skip
        best = max(forecasts, key=lambda f: score(f"{f[0]!r}, correct {f[1]}, first schedule", ours("x", recipe((*f, even, None)))))
        rules = [
            Spread(share=num / steps, by="step", until=until, skew=skew, ends=ends)
            for until in (round((num - 1) / num, 3), 0.97)
            for skew in (1.1, 1.3, 1.5)
            for ends in (0.2, 0.5, 0.8)
        ]
        rule = max(rules, key=lambda r: score(repr(r), ours("x", recipe((*best, r, None)))))
        print(f"best: {best} {rule!r}")
        more = rule.model_copy(update={"share": round(num * 1.25) / steps})
        for order in (0, 1):
            held = HeldGuidance(after=0.25, every=2, order=order)
            score(f"with {held!r} and {round(num * 1.25)} steps", ours("x", recipe((*best, more, held))))


if __name__ == "__main__":
    main()
