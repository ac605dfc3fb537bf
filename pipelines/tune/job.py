"""What is tuned for what; what cannot be is refused here, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hasten.errors import UsageError
from hasten.pipelines.bench.shots import Sample
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.tune.goal import Goal

LEAST_STEPS = 6
"""Steps of a plain run that is worth tuning: the shortest schedules have three."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is tuned for what. prompts: (text, seed) each, at least four, none twice; every third is held out. seconds: for
    everything, of this process and of earlier ones on the same study.

    peers: also measure the caches of diffusers and cache-dit on the held-out prompts. attention, adapters, presets: recipes
    that are searched besides.
    """

    goal: Goal
    prompts: tuple[tuple[str, int], ...]
    call: dict[str, Any]
    seconds: float
    model: str = ""
    peers: bool = False
    attention: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    presets: tuple[str, ...] = (
        "balanced", "fast:student=false", "auto:psnr=15", "auto:psnr=20", "auto:psnr=25", "auto:psnr=30", "auto", "autodiffusion",
        "easycache-forecast",
    )  # fmt: skip
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.prompts) < 4:
            raise UsageError(
                f"Tuning needs at least 4 prompts, of which every third is held out, got {len(self.prompts)}. The same prompt counts"
                ' again with another seed: {"prompt": "a cat", "seed": 1}.'
            )
        if twice := next((pair for pair in self.prompts if self.prompts.count(pair) > 1), None):
            raise UsageError(f"The prompt {twice[0]!r} stands twice with seed {twice[1]}; what is held out must be new. Change a seed.")
        steps = self.call.get("num_inference_steps")
        if steps is None:
            raise UsageError("Say with how many steps the plain run is made: call={'num_inference_steps': 50}, or --steps 50.")
        if steps < LEAST_STEPS:
            raise UsageError(f"A plain run of {steps} steps leaves nothing to search. Tune one of at least {LEAST_STEPS}.")
        for name in (*self.attention, *self.adapters, *self.presets):
            find_recipe(name)
        for name in self.attention:
            if (axes := list(find_recipe(name).axes)) != ["attention"]:
                raise UsageError(f"{name} is no recipe of attention alone (it sets {', '.join(axes) or 'nothing'}). Name one, such as semantic.")

    def samples(self, most: int) -> tuple[list[Sample], list[Sample]]:
        """(tuning samples, held-out ones), at most so many of each."""
        held = [Sample(*pair) for pair in self.prompts[2::3]]
        tuning = [Sample(*pair) for number, pair in enumerate(self.prompts) if number % 3 != 2]
        return tuning[:most], held[: max(3, most)]
