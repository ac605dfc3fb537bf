"""How the numbers in `balanced` and `fast` were chosen: a closed-loop search on tuning prompts.

Prompts and seeds are never those of `hasten bench recipes` (a test holds that).

    PYTHONPATH=. python benchmarks/tune_presets.py --model tiny-video --computed 12 8
    PYTHONPATH=. python benchmarks/tune_presets.py --model tiny-video --computed 12 8 --search 300

First the forecast on an even schedule, then the schedule with the best forecast. With `--search SECONDS` single
positions of the schedule are moved as long as really run generations get nearer to the plain ones. Prints every
configuration tried.

The positions of `fast` come from such a search of five minutes (with the latent error in place of the PSNR). Those of
`balanced` were the best of nine schedules of twelve steps that were shaped like it or came from the family.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from hasten import metrics
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Listed, Schedule, Spread
from hasten.forecast import Forecast, Hold, Polynomial
from hasten.pipelines.bench.candidates import fewer_steps, ours
from hasten.pipelines.bench.shots import Sample, Shot, shoot
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

Setting = tuple[Forecast, int, Schedule, Guidance | None]
Score = Callable[[str, Any], float]
FORECASTS: list[tuple[Forecast, int]] = [
    (Hold(), 1), (Polynomial(order=1, damp=0.75), 2), (Polynomial(order=1), 1), (Polynomial(order=1), 2),
    (Polynomial(order=1), 0), (Polynomial(order=2), 2),
]  # fmt: skip


def recipe(setting: Setting) -> Recipe:
    forecast, correct, rule, guidance = setting
    return Recipe(name="trial", reuse=NetworkReuse(rule=rule, forecast=forecast, correct=correct), guidance=guidance)


def scorer(pipe: Any, call: dict[str, Any], samples: list[Sample]) -> Score:
    """A function that runs a candidate on all samples, prints and returns its median plus its worst PSNR."""
    plain = [shoot(pipe, sample, call) for sample in samples]
    print(f"plain {statistics.median(shot.seconds for shot in plain):.2f} s", flush=True)

    def score(label: str, candidate: Any) -> float:
        shots: list[Shot] = [shoot(pipe, sample, call, candidate) for sample in samples]
        values = [metrics.psnr(a.frames, b.frames) for a, b in zip(plain, shots, strict=True)]
        seconds = statistics.median(a.seconds / b.seconds for a, b in zip(plain, shots, strict=True))
        print(
            f"  {statistics.median(values):5.1f} dB, worst {min(values):5.1f}, mean {statistics.mean(values):5.2f},"
            f" {seconds:4.2f} x, nfe {shots[0].nfe}: {label}",
            flush=True,
        )
        return statistics.mean(values)

    return score


def family(num: int, steps: int, score: Score) -> None:
    """The forecast on one schedule, then schedules of the `Spread` family with the best forecast, then guidance."""
    for solver in ("unipc", "dpm++"):
        score(f"control: {solver} {num} steps", fewer_steps(solver, num))
    even = Spread(share=num / steps, by="step", until=(num - 1) / num, skew=1.2, ends=0.4)
    best = max(FORECASTS, key=lambda f: score(f"{f[0]!r}, correct {f[1]}", ours("x", recipe((*f, even, None)))))
    rules = [
        Spread(share=num / steps, by="step", until=until, skew=skew, ends=ends)
        for until, skew, ends in itertools.product((round((num - 1) / num, 3), 0.97), (1.1, 1.3, 1.5), (0.2, 0.5, 0.8))
    ]
    rule = max(rules, key=lambda r: score(repr(r), ours("x", recipe((*best, r, None)))))
    print(f"best: {best} {rule!r}")
    more = rule.model_copy(update={"share": round(num * 1.25) / steps})
    for order in (0, 1):
        held = HeldGuidance(after=0.25, every=2, order=order)
        score(f"with {held!r} and {round(num * 1.25)} steps", ours("x", recipe((*best, more, held))))


def moves(at: tuple[int, ...], steps: int) -> Iterator[tuple[int, ...]]:
    """The schedules that differ in one position by one or two steps."""
    for place, by in itertools.product(range(1, len(at)), (2, -2, 1, -1)):
        moved = (*at[:place], at[place] + by, *at[place + 1 :])
        if moved[-1] < steps and all(a < b for a, b in itertools.pairwise(moved)):
            yield moved


def search(num: int, steps: int, score: Score, seconds: float) -> None:
    """Coordinate search from a schedule dense at the start, damped linear forecasts; prints what it takes."""
    forecast = Polynomial(order=1, damp=0.75)

    def run(at: tuple[int, ...]) -> float:
        rule = Listed(at=tuple(round(i / (steps - 1), 4) for i in at))
        return score(f"at {at}", ours("x", recipe((forecast, 2, rule, None))))

    start = Spread(share=num / steps, ends=0.2, skew=1.5, until=(num - 1) / num, by="step")
    best = tuple(sorted(start.computed(steps)))
    value, seen, deadline = run(best), {best}, time.monotonic() + seconds
    while time.monotonic() < deadline:
        for moved in moves(best, steps):
            if moved in seen or time.monotonic() > deadline:
                continue
            seen.add(moved)
            found = run(moved)
            if found > value:
                best, value = moved, found
                break
        else:
            break
    print(f"best: {best}, mean {value:.2f} dB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny-video")
    parser.add_argument("--computed", type=int, nargs="+", default=[12, 8])
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--search", type=float, default=0.0, metavar="SECONDS", help="move single positions that long")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    pipe = load(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    call = call_defaults(arguments.model)
    score = scorer(pipe, call, TUNING[arguments.model][: arguments.samples])
    for num in arguments.computed:
        print(f"{num} computed steps")
        if arguments.search:
            search(num, call["num_inference_steps"], score, arguments.search)
        else:
            family(num, call["num_inference_steps"], score)


if __name__ == "__main__":
    main()
