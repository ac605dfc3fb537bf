"""What is searched, and what is made of what was found."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import RecipeError, UsageError
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.tune.goal import Goal
from hasten.pipelines.tune.job import Job
from hasten.pipelines.tune.space import Space, first_guesses, parts_alone
from hasten.pipelines.tune.study import Trial, front
from hasten.pipelines.tune.trials import Measured, Outcome
from hasten.pipelines.tune.verify import (
    Interaction,
    fastest,
    finalists,
    interval,
    is_control,
    promising,
    verified,
)
from hasten.recipe import Recipe, from_yaml
from tests.pipelines.tune.test_tune_plan import recorded

PSNR = Goal("psnr", 30)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("judged", [True, False], ids=["first-order", "other solver"])
@pytest.mark.parametrize("tolerance", [0.003, 0.1, 1.0])
def test_every_first_guess_is_a_recipe_that_yaml_gives_back(guided: bool, judged: bool, tolerance: float) -> None:
    signals = [recorded(0, 12, guided)] if judged else []
    space = Space(12, guided, signals, presets=("balanced", "auto"), attention=("semantic",), adapters=("fastest",))
    guesses = first_guesses(space, tolerance)
    assert len({str(guess) for guess in guesses}) == len(guesses), "none twice"
    assert {guess["family"] for guess in guesses} == set(space.families)
    for guess in guesses:
        made = space.recipe(guess)
        assert from_yaml(made.to_yaml()) == made and made.axes and made.name == space.name(guess)
        assert made.attention is None and ("guidance" not in made.axes or guided or guess["family"] in ("preset", "student"))


class Asked:
    """An optuna trial that answers at random, within what it is asked for."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def suggest_categorical(self, name: str, choices: list[object]) -> object:
        return self.draw.choice(choices)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        assert low <= high
        return self.draw.randint(low, high)

    def suggest_float(self, name: str, low: float, high: float, **how: object) -> float:
        return self.draw.uniform(low, high)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(6, 14), st.booleans(), st.booleans())
def test_whatever_is_asked_is_a_recipe(seed: int, steps: int, guided: bool, judged: bool) -> None:
    space = Space(steps, guided, [recorded(1, steps, guided)] if judged else [], presets=("balanced",), attention=("semantic",))
    params = space.ask(Asked(seed))
    made = space.recipe(params)
    assert from_yaml(made.to_yaml()) == made
    assert ("attention" in made.axes) is bool(params.get("attention"))


def test_attention_joins_what_it_is_asked_with() -> None:
    space = Space(12, False, attention=("semantic",))
    made = space.recipe({"family": "ledger", "tolerance": 0.1, "attention": "semantic"})
    assert set(made.axes) == {"reuse", "attention"} and made.attention == find_recipe("semantic").attention


def test_students_are_found_where_their_recipe_was(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "own.safetensors").touch()
    (tmp_path / "own.yaml").write_text("version: 1\nadapter: {path: own.safetensors}\nsampler: {kind: few-calls, timesteps: [999]}\n")
    space = Space(12, False, adapters=(str(tmp_path / "own.yaml"),))
    made = space.recipe({"family": "student", "student": str(tmp_path / "own.yaml")})
    assert made.adapter is not None and from_yaml(made.to_yaml()).adapter.place == tmp_path / "own.safetensors"  # type: ignore[union-attr]


def run(speedup: float, *psnrs: float | None, number: int = 0, recipe: Recipe | None = None) -> Trial:
    outcomes = tuple(Outcome(speedup, 1 / speedup, psnr, None, None, 10, 0) for psnr in psnrs)
    return Trial(number, {}, recipe or Recipe(name=f"{speedup}"), Measured(f"{speedup}", outcomes))


def test_the_front_is_what_nothing_beats() -> None:
    trials = [run(1, None, None), run(2, 40, 45), run(3, 30, 50), run(2.5, 29, 60), run(4, 20, 20), run(3.5, 19, 70)]
    assert [trial.measured.speedup for trial in front(trials, PSNR)] == [1, 2, 3, 4]
    assert front([], PSNR) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 9), st.floats(10, 90)), max_size=12))
def test_every_trial_is_on_the_front_or_beaten(pairs: list[tuple[float, float]]) -> None:
    trials = [run(*pair) for pair in pairs]
    kept = front(trials, PSNR)
    for trial in trials:
        better = [k for k in kept if k.measured.speedup >= trial.measured.speedup and k.measured.worst(PSNR) >= trial.measured.worst(PSNR)]
        assert better
    speeds = [trial.measured.speedup for trial in kept]
    assert speeds == sorted(speeds)


def counted(speedup: float, nfe: float, psnr: float = 40, number: int = 0) -> Trial:
    outcomes = (Outcome(speedup, 1 / speedup, psnr, None, None, nfe, 0),)
    return Trial(number, {}, Recipe(name=f"r{number}"), Measured(f"r{number}", outcomes))


def test_what_makes_fewer_evaluations_is_measured_too_where_the_clock_may_be_wrong() -> None:
    """On held-out samples r1 is the fastest of those that keep the budget, though r0 seemed to be."""
    trials = [counted(8.8, 11, 32, 0), counted(8.4, 10, 35, 1), counted(8.0, 12, 39, 2), counted(6.0, 9, 41, 3), counted(7.5, 8, 31, 4)]
    held = {"r0": (6.4, 32.0), "r1": (8.1, 34.0), "r4": (9.0, 29.0)}
    asked = []

    class Toy:
        def measure(self, name: str, recipe: Recipe, again: bool) -> Measured:
            asked.append(name)
            speedup, psnr = held[name]
            return Measured(name, (Outcome(speedup, 1 / speedup, psnr, None, None, 10, 0),))

    found = verified(Toy(), trials, PSNR, lambda: False)  # type: ignore[arg-type]
    assert asked == ["r0", "r1", "r4"], "r2 makes more evaluations than r1, r3 is too slow for that to be the clock"
    best = fastest(found, PSNR)
    assert best is not None and best.trial.number == 1
    assert fastest(found[2:], PSNR) is None
    asked.clear()
    assert len(verified(Toy(), trials, PSNR, lambda: True)) == 1 and asked == ["r0"]  # type: ignore[arg-type]


def test_what_was_better_on_some_sample_than_all_that_failed_is_still_tried() -> None:
    failed = [run(6, 38, 36, 31), run(5, 33, 39, 33)]
    assert promising(run(4, 37, 37, 32), failed, PSNR), "better than the first on the second and third, than the second on the first"
    assert not promising(run(4, 38, 36, 30), failed, PSNR), "nowhere better than the first"
    assert promising(run(4, None, 36, 31), failed, PSNR), "None is identical"
    assert promising(run(4, 1, 1, 1), [], PSNR)


def test_finalists_keep_the_goal_on_all_samples_and_come_fastest_first() -> None:
    trials = [run(2, 31, 31), run(5, 31, 29), run(3, 30, None), run(4, 99, 29.99)]
    assert [trial.measured.speedup for trial in finalists(trials, PSNR)] == [3, 2]
    many = [run(2, *[31] * 6), run(3, *[31] * 5, 12), run(4, *[31] * 4, 12, 12), run(5, *[31] * 4, 12)]
    assert [trial.measured.speedup for trial in finalists(many, PSNR)] == [3, 2], "one of six or more may miss it"


def test_an_outcome_that_cannot_be_measured_is_the_worst() -> None:
    unknown = Measured("x", (Outcome(2, 1, 50, 0.9, None, 10, 0), Outcome(2, 1, 60, None, 0.1, 10, 0)))
    assert unknown.worst(Goal("latent_error", 0.5)) == math.inf and unknown.worst(Goal("ssim", 0.5)) == -math.inf
    assert unknown.kept(Goal("ssim", 0.5)) == 0.5 and unknown.worst(PSNR) == 50


def test_the_interval_is_that_of_the_median() -> None:
    values = [30.0 + k for k in range(21)]
    low, high = interval(values)  # type: ignore[misc]
    assert 33 <= low < statistics.median(values) < high <= 47
    assert interval(values) == (low, high), "resampled with a seed"
    assert interval([1.0, 2.0]) is None and interval([5.0] * 3) == (5.0, 5.0)


def test_only_steps_of_a_solver_are_the_control() -> None:
    space = Space(12, True)
    assert is_control(run(1, 1, recipe=space.recipe({"family": "solver", "solver": "unipc", "steps": 6, "order": 2, "unguided": 0})))
    assert not is_control(run(1, 1, recipe=space.recipe({"family": "solver", "solver": "unipc", "steps": 6, "order": 2, "unguided": 2})))
    assert not is_control(run(1, 1, recipe=find_recipe("balanced")))


def test_interactions_are_told_by_their_ratio() -> None:
    told = Interaction(("guidance", "reuse"), (0.01, 0.02), 0.042).told()
    assert told == "guidance and reuse together cost 1.4 times what they cost alone (squared latent error): super-additive."
    assert "sub-additive" in Interaction(("a", "b"), (0.01, 0.02), 0.02).told()


def test_a_composition_is_taken_apart_by_axis() -> None:
    made = Space(12, True).recipe({"family": "solver", "solver": "unipc", "steps": 6, "order": 2, "unguided": 2})
    parts = parts_alone(made)
    assert {axis: part.axes for axis, part in parts.items()} == {axis: {axis: part} for axis, part in made.axes.items()}
    with pytest.raises(RecipeError, match="no axes"):
        parts_alone(Recipe(name="nothing"))


CALL = {"num_inference_steps": 20}
FOUR = tuple((f"a {word}", 0) for word in ("one", "two", "three", "four"))


def test_every_third_prompt_is_held_out() -> None:
    job = Job(PSNR, tuple((str(k), k) for k in range(12)), CALL, 60)
    tuning, held = job.samples(8)
    assert [s.prompt for s in held] == ["2", "5", "8", "11"] and [s.seed for s in tuning] == [0, 1, 3, 4, 6, 7, 9, 10]
    assert [len(samples) for samples in job.samples(2)] == [2, 3]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": FOUR[:1]}, "at least 4 prompts, of which every third is held out, got 1. The same prompt counts"),
        ({"prompts": (*FOUR, FOUR[1])}, "'a two' stands twice with seed 0"),
        ({"call": {}}, "how many steps"),
        ({"call": {"num_inference_steps": 4}}, "leaves nothing to search"),
        ({"adapters": ("fastes",)}, "Did you mean 'fastest'"),
        ({"attention": ("balanced",)}, "no recipe of attention alone (it sets reuse"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_runs(change: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Job(**{"goal": PSNR, "prompts": FOUR, "call": CALL, "seconds": 60, **change})  # type: ignore[arg-type]
    assert said in str(caught.value)
