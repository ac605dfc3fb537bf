"""Recipes that walk other noise levels, or walk them again."""

from __future__ import annotations

from typing import Literal

from hasten.caching.spans_listed import Timetable  # noqa: F401  # no recipe of a name has it; files name its kind
from hasten.recipe import Recipe
from hasten.samplers.solver import Solver
from hasten.samplers.travel import TimeTravel


def autodiffusion(times: tuple[float, ...] = (1.0, 0.8167, 0.6667, 0.5, 0.3333, 0.1667)) -> Recipe:
    """AutoDiffusion: DPM-Solver++(2M) at noise levels that a search found for one model, whatever steps are asked for.

    Li et al. The default was searched for six calls of tiny-image on six tuning prompts; on others it was no better than even
    times (docs/samplers.md). `hasten.pipelines.autodiffusion` searches lists, and which blocks run, for another model.
    Differs: judged by the distance to an own fine run, not by Frechet distances; searched in minutes.
    """
    return Recipe(
        sampler=Solver(name="dpm++", times=tuple(times)), paper="AutoDiffusion, arXiv 2309.10438", models=("tiny-image",)
    )


def time_travel(
    begin: float = 0.3, end: float = 0.7, back: int = 2, again: int = 1, solver: Literal["ddim", "euler", "dpm++"] = "dpm++"
) -> Recipe:
    """Time travel: walk the middle of the run again from fresh noise. Costs evaluations; meant for quality, not speed.

    RePaint's resampling without a mask; Yume's TTS-SDE goes back in time in the sampler, too. Differs from both: on the levels of any
    model's own run, with noise that a row's seed decides.
    """
    travel = TimeTravel(name=solver, begin=begin, end=end, back=back, again=again)
    return Recipe(sampler=travel, paper="RePaint, arXiv 2201.09865; TTS-SDE of Yume, arXiv 2507.17744")
