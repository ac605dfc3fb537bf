"""`hasten tune` on a masked language model: what it prints, writes and ends with."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.pipelines.tune import study as study_module
from hasten.pipelines.tune import text_run, text_trials
from hasten.pipelines.tune.text_verify import TextVerdict
from tests.cli.conftest import Ran
from tests.pipelines.text_pipes import saved

RNG = random.Random(5)
PROMPTS = [" ".join(f"w{RNG.randrange(90)}" for _ in range(RNG.randint(2, 6))) for _ in range(18)]


class Ticks:
    """A clock that is a second on whenever it is asked: how much is run does not depend on the machine."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder: Path = saved(tmp_path / "model")
    return folder


def test_a_recipe_for_texts_is_found_and_written(
    hasten: Callable[..., Ran], model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = Ticks()
    monkeypatch.setattr(study_module, "time", ticks)
    monkeypatch.setattr(text_run, "time", ticks)
    monkeypatch.setattr(TextVerdict, "holds", lambda self, goal: self.measured.whole and goal.met(self.measured.share))
    beside = text_trials._beside
    monkeypatch.setattr(text_trials, "_beside", lambda text, base, speedup: beside(text, base, base.nfe / text.nfe))  # no clock
    given = ["--model", model, "--prompts", prompts, "--time", "90s", "--out", "r.yaml", "--call", "max_new_tokens=5"]
    ran = hasten("tune", *given, "--budget", "exact_match>=0.1", "--json", "r.json")
    assert ran.code == 0, ran.err
    assert "On held-out prompts" in ran.out and "The recipe is in r.yaml" in ran.out and "sequential decoding's" in ran.out
    document = json.loads(Path("r.json").read_text())
    assert document["budget"] == "exact_match >= 10 %" and document["best"] and document["needed"] == 2
    assert {row["where"] for row in document["rows"]} == {"tuning", "held out"} and all("agreement" in row for row in document["rows"])
    assert Path("r.study/journal.log").is_file(), "the study is beside the recipe"
    written = hasten("generate", model, "--prompt", PROMPTS[0], "--recipe", "r.yaml", "--call", "max_new_tokens=5")
    assert written.code == 0, written.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--budget", "psnr>=30"], "exact_match>=0.99"), (["--steps", "8"], "--steps is for images"), (["--peers"], "--peers is for images"),
        (["--call", "threshold=0.5"], "threshold"), ([], "Say how long"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_for_texts_is_refused(hasten: Callable[..., Ran], model: Path, prompts: Path, more: list[str], said: str) -> None:
    budget = [] if "--budget" in more else ["--budget", "99%"]
    ran = hasten("tune", "--model", model, "--prompts", prompts, *budget, *more, "--out", "r.yaml")
    assert ran.code == 2 and said in ran.err and "Traceback" not in ran.err
    if not more:
        assert "only shown by 368" in ran.err and "12 of these prompts are held out" in ran.err
