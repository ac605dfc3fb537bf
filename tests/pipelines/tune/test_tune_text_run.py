"""Tuning texts on a small random model: what is measured, what is given up or refused, and what comes of it in the end."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hasten
from hasten.errors import RefusedError, ResumeError, UsageError
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.tune import study as study_module
from hasten.pipelines.tune import text_run, text_verify
from hasten.pipelines.tune.text_goal import TextGoal
from hasten.pipelines.tune.text_result import TextTuned
from hasten.pipelines.tune.text_run import tune_text
from hasten.pipelines.tune.text_study import TextTrial, text_front
from hasten.pipelines.tune.text_trials import TextBench, TextMeasured, TextOutcome
from hasten.pipelines.tune.text_verify import (
    TextVerdict,
    is_fewer,
    is_single,
    losses,
    text_finalists,
    text_verified,
)
from hasten.recipe import Recipe
from tests.pipelines.text_pipes import pipe

RNG = random.Random(3)
PROMPTS = [" ".join(f"w{RNG.randrange(90)}" for _ in range(RNG.randint(2, 6))) for _ in range(24)]
CALL = {"max_new_tokens": 5, "temperature": 0.0}
NEVER = TextGoal(0.01)


class Ticks:
    """A clock that is a second on whenever it is asked: how much is run does not depend on the machine."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture(scope="module")
def bench() -> TextBench:
    return TextBench(pipe(), PROMPTS[:6], CALL, 4, lambda prompt, answer: "w1" in answer)


def measured(name: str, same: int, total: int, speedup: float, work: float = 0.5) -> TextMeasured:
    each = [TextOutcome(number < same, speedup, 1 / speedup, 3, work * 100, 100.0, None, None) for number in range(total)]
    return TextMeasured(name, tuple(each))


def trial(number: int, same: int, total: int, speedup: float, recipe: Recipe | None = None, work: float = 0.5) -> TextTrial:
    return TextTrial(number, {}, recipe or Recipe(name=f"r{number}"), measured(f"r{number}", same, total, speedup, work))


# --- what a recipe costs and keeps ------------------------------------------------------------------


def test_sequential_decoding_is_all_of_itself(bench: TextBench) -> None:
    found = bench.measure("sequential", find_recipe("sequential"))
    assert found.whole and found.share == 1 and found.work == 1
    assert [each.nfe for each in found.outcomes] == [5] * 6
    assert found.accuracy is not None and found.accuracy[0] == found.accuracy[1]
    assert TextMeasured.of("sequential", [each.to_dict() for each in found.outcomes]) == found
    assert bench.floor() == 1


def test_drafts_and_exact_caches_change_no_text_and_cost_what_they_cost(bench: TextBench) -> None:
    found = bench.measure("drafts", find_recipe("freedave"))
    assert found.share == 1 and found.work > 1


def test_what_writes_all_at_once_is_cheap_and_wrong(bench: TextBench) -> None:
    found = bench.measure("one", find_recipe("llada:steps=1"))
    assert found.whole and found.share < 1 and found.work == pytest.approx(0.2)
    assert [each.nfe for each in found.outcomes] == [1] * 6


def test_what_has_certainly_lost_too_much_is_given_up(bench: TextBench) -> None:
    found = bench.measure("one", find_recipe("llada:steps=1"), TextGoal(0.99))
    assert not found.whole and len(found.outcomes) == 4 and "given up after 4 prompts" in found.why
    values = found.values(TextGoal(0.99))
    assert values is not None and values[0] > 1 and values[1] == pytest.approx(1.2) and values[2] > 0.5
    assert bench.measure("one", find_recipe("llada:steps=1"), NEVER).whole


def test_what_does_not_go_together_is_refused_with_the_reason(bench: TextBench) -> None:
    found = bench.measure("both", find_recipe("freedave+echo-cache"))
    assert "refused" in found.why and "drafts" in found.why and found.values(NEVER) is None


def test_a_reviser_that_the_pipeline_leaves_out_is_refused(bench: TextBench) -> None:
    repeats = bench.pipe.host.repeats
    bench.pipe.host.repeats = 0.1
    try:
        found = bench.measure("remask", find_recipe("remask"))
    finally:
        bench.pipe.host.repeats = repeats
    assert "refused" in found.why and not found.outcomes


def test_a_crash_is_a_reason_too(bench: TextBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.pipe, "generate", lambda **_: 1 / 0)
    assert "crashed: ZeroDivisionError" in bench.measure("x", find_recipe("sequential")).why


# --- what held-out prompts say ----------------------------------------------------------------------


def test_looks_widen_the_interval_and_thirty_prompts_show_nothing() -> None:
    goal, few, many = TextGoal(0.99), trial(0, 30, 30, 5.0), trial(1, 400, 400, 5.0)
    assert TextVerdict(few, few.measured).holds(goal) and not TextVerdict(few, few.measured).shown(goal)
    first, fourth = TextVerdict(many, many.measured, 1), TextVerdict(many, many.measured, 4)
    assert first.shown(goal) and not fourth.shown(goal)
    assert fourth.interval[0] < first.interval[0] and first.interval == many.measured.interval()


def test_finalists_save_time_and_keep_the_budget() -> None:
    trials = [
        trial(0, 99, 100, 3.0), trial(1, 98, 100, 9.0), trial(2, 100, 100, 4.0), trial(3, 100, 100, 0.9), trial(4, 100, 100, 1.05, work=1.0),
        trial(5, 100, 100, 1.5, work=1.2),
    ]  # fmt: skip
    assert [each.number for each in text_finalists(trials, TextGoal(0.99))] == [2, 0, 5]
    assert [each.number for each in text_front(trials)] == [2, 1]  # 4.0x with all, 9.0x with 98


def test_held_out_prompts_are_asked_until_enough_keep_the_budget() -> None:
    class Toy:
        def measure(self, name: str, recipe: Recipe, goal: Any = None, again: int = 0) -> TextMeasured:
            return measured(name, {"r0": 90, "r1": 100}.get(name, 99), 100, 3.0)

    trials = [trial(number, 100, 100, 5.0 - number) for number in range(4)]
    told: list[TextVerdict] = []
    found = text_verified(Toy(), trials, TextGoal(0.99), lambda: False, 2, told.append)  # type: ignore[arg-type]
    assert [(each.trial.number, each.looks) for each in found] == [(0, 1), (1, 2), (2, 3)] and told == found
    assert len(text_verified(Toy(), trials, TextGoal(0.99), lambda: True, 2)) == 1  # type: ignore[arg-type]


def test_controls_are_known_by_their_axes() -> None:
    assert is_fewer(find_recipe("llada:steps=4").model_copy(update={"blocks": None}))
    assert not is_fewer(find_recipe("threshold").model_copy(update={"blocks": None}))
    assert is_single(find_recipe("echo-cache")) and not is_single(find_recipe("threshold+echo-cache"))


def test_axes_lose_alone_and_together(bench: TextBench) -> None:
    recipe = find_recipe("llada:steps=1").model_copy(update={"blocks": None}) | find_recipe("prefix-cache")
    (pair,) = losses(bench, recipe, lambda: False)
    assert pair.axes == ("kv", "commit") and pair.prompts == 6
    assert pair.alone[1] > 0 and pair.together > 0 and "of 6 texts" in str(pair)
    assert losses(bench, find_recipe("echo-cache"), lambda: False) == []


# --- from prompts to a recipe -----------------------------------------------------------------------


def tuned(folder: Path, monkeypatch: pytest.MonkeyPatch, budget: str = "10%", **more: Any) -> tuple[TextTuned, list[str]]:
    """A tuning of some ten trials, and what it said."""
    ticks, said = Ticks(), []
    monkeypatch.setattr(study_module, "time", ticks)
    monkeypatch.setattr(text_run, "time", ticks)
    monkeypatch.setattr(TextVerdict, "holds", lambda self, goal: self.measured.whole and goal.met(self.measured.share))
    given = {"seconds": 60.0, "study": folder / "study", "out": folder / "r.yaml", "call": {"max_new_tokens": 5}, "say": said.append}
    found = hasten.tune(pipe(), PROMPTS, budget, **(given | more))
    return found, said


def test_from_prompts_to_a_recipe_with_a_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, said = tuned(tmp_path, monkeypatch)
    assert found.best is not None and found.recipe is not None and found.recipe.tuned is not None
    stamp = found.recipe.tuned
    assert stamp.length == 5 and stamp.tokenizer and stamp.prompts == 16 and stamp.budget == "exact_match >= 10 %"
    assert stamp.kept is not None and stamp.kept >= 0.1 and stamp.worst is not None and stamp.worst < stamp.kept
    assert found.trials and found.floor == 1
    text = " ".join(found.sentences())
    assert "held-out texts are sequential decoding's" in text and "surest k slots" in text and "noise floor" in text
    assert {row["where"] for row in found.rows()} == {"tuning", "held out"}
    assert any("8 tuning prompts; 16 others are held out" in line for line in said)
    _says_where_it_was_tuned(tmp_path / "r.yaml")
    again, more = tuned(tmp_path, monkeypatch)
    before = {line.split(". ")[0] for line in said if line.split(". ")[0].isdigit()}
    assert not before & {line.split(". ")[0] for line in more if line.split(". ")[0].isdigit()}, "a trial ran twice"
    assert {each.number for each in found.trials} <= {each.number for each in again.trials}
    with pytest.raises(ResumeError, match="another budget"):
        tuned(tmp_path, monkeypatch, budget="20%")


def _says_where_it_was_tuned(file: Path) -> None:
    prompt = PROMPTS[0]
    here = pipe().generate(prompts=prompt, max_new_tokens=5, recipe=file)
    assert not any("tuned" in note for note in here.report.notes)
    longer = pipe().generate(prompts=prompt, max_new_tokens=6, recipe=file)
    assert any("another number of tokens (5 there, 6 here)" in note for note in longer.report.notes)
    with hasten.accelerate(pipe(seed=1), file) as run:
        run.host.generate(prompts=prompt, max_new_tokens=5)
    assert "another weights" in str(run.report())


def test_a_budget_that_nothing_keeps_gives_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_verify, "CERTAIN", float("inf"))  # clocks err; only less work counts
    found, _ = tuned(tmp_path, monkeypatch, budget="100%")
    assert found.recipe is None and not (tmp_path / "r.yaml").exists()
    assert any("Allow more time" in why for why in found.why)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompts": PROMPTS[:11]}, "12 different prompts"), ({"prompts": PROMPTS[:4] * 6}, "got 4"), ({"budget": "psnr>=30"}, "exact_match>=0.99"),
        ({"call": {"max_new_tokens": 5, "threshold": 0.5}}, "threshold"), ({"call": {}}, "Say how long"), ({"call": {"gen_length": 0}}, "at least 1"),
        ({"batch": 0}, "batch"), ({"seconds": 1e-4}, "too short"),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned_is_said_before_it_is_tried(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"prompts": PROMPTS, "budget": "90%", "study": tmp_path, "call": {"max_new_tokens": 5}, "seconds": 5.0} | more
    with pytest.raises(UsageError, match=message):
        tune_text(pipe(), given.pop("prompts"), given.pop("budget"), **given)


def test_other_hosts_and_arguments_of_pictures_are_refused() -> None:
    with pytest.raises(UsageError, match="for pictures"):
        hasten.tune(pipe(), PROMPTS, "99%", peers=True)
    with pytest.raises(RefusedError, match=r"TextDiffusionPipeline\(model, tokenizer\)"):
        hasten.tune(pipe().model, PROMPTS, "99%")
    with pytest.raises(RefusedError, match="SimpleNamespace"):
        tune_text(SimpleNamespace(), PROMPTS, "99%")  # type: ignore[arg-type]
