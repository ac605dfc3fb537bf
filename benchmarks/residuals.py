"""Do the errors of forecasts, measured during a run, say how far off its result will be? Why `auto` has a plan.

    python benchmarks/residuals.py --model tiny-image --samples 20

Runs one fixed schedule on tuning prompts and prints, for each computed step, the forecast's measured error and how its
logarithm correlates over the samples with that of the final latent error.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import hasten
from hasten import metrics
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Listed
from hasten.cli.bench import own_prompts
from hasten.forecast import Polynomial
from hasten.ledger import PATH
from hasten.pipelines.tiny_models import call_defaults
from hasten.recipe import Recipe
from hasten.step import Step

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WHERE = {
    False: ("at the top right", "at the top left", "at the bottom right", "at the bottom left"),
    True: ("moving left, slowly", "moving right, quickly", "moving up, slowly", "moving down, quickly"),
}


class Noted(Listed):
    """A schedule that is told the forecasts' errors, and writes them down."""

    kind: ClassVar[str] = "noted"
    needs_errors: ClassVar[bool] = True

    def start(self, times: Sequence[float] = ()) -> Any:
        return NotedState(super().start(times))


class NotedState:
    """errors: (index of the step, rms error) of the latest run."""

    errors: ClassVar[list[tuple[int, float]]] = []
    estimate = 0.0

    def __init__(self, schedule: Any) -> None:
        self.skip = schedule.skip
        self.errors.clear()

    def learn(self, step: Step, error: float | None) -> None:
        if error is not None:
            self.errors.append((step.index, error))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny-image")
    parser.add_argument("--samples", type=int, default=20)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    pipe = hasten.load(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {**call_defaults(arguments.model), "output_type": "latent"}
    video = arguments.model == "tiny-video"
    texts = [f"a {digit} {where}" for where, digit in itertools.product(WHERE[video], DIGITS)]
    prompts = [text for text in texts if text not in own_prompts(video)][: arguments.samples]
    reuse = NetworkReuse(rule=Noted(at=PATH[:-1]), forecast=Polynomial(order=1, damp=0.75), correct=2)

    def latents(prompt: str, seed: int) -> Tensor:
        return torch.as_tensor(pipe(prompt, generator=torch.Generator().manual_seed(seed), **call)[0])

    errors, final = [], []
    for seed, prompt in enumerate(prompts, 200):
        plain = latents(prompt, seed)
        with hasten.accelerate(pipe, Recipe(name="noted", reuse=reuse)):
            final.append(metrics.latent_error(latents(prompt, seed), plain))
        errors.append(dict(NotedState.errors))
    print(f"{arguments.model}, {len(final)} samples, latent error {statistics.geometric_mean(final):.4f}")
    logs = torch.tensor(final).log()
    for index in errors[0]:
        found = torch.tensor([noted[index] for noted in errors])
        correlation = float(torch.corrcoef(torch.stack([found.log(), logs]))[0, 1])
        print(f"  step {index:2d}: error {float(found.mean()):.3f}, correlation {correlation:5.2f}")


if __name__ == "__main__":
    main()
