"""`hasten tune`: what it prints, writes and ends with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten.pipelines.tune import run as module
from hasten.pipelines.tune.study import Study
from hasten.pipelines.tune.trials import Bench
from tests.cli.conftest import Ran

PROMPTS = "a seven\na one\n# not this\n{\"prompt\": \"a seven\", \"seed\": 5}\nthe cat\n"


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    file = tmp_path / "prompts.txt"
    file.write_text(PROMPTS)
    return file


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three trials, however slow the machine is, and evaluations for seconds."""
    monkeypatch.setattr(Bench, "cost", lambda self, shot: float(shot.nfe) if shot.nfe and math.isfinite(shot.nfe) else 100.0)
    once = Study._one
    monkeypatch.setattr(module.Tuning, "_affordable", lambda self: 2)
    monkeypatch.setattr(module.Tuning, "_over", lambda self: True)
    monkeypatch.setattr(
        Study, "run", lambda self, bench, space, seconds, guesses, told: [once(self, bench, space) for _ in range(self_enqueued(self, guesses))]
    )


def self_enqueued(study: Study, guesses: Any) -> int:
    first = [guess for guess in guesses if guess["family"] in ("plan", "solver")][:3]
    for guess in first:
        study.study.enqueue_trial(dict(guess))
    return len(first)


def test_a_recipe_is_found_and_written(hasten: Callable[..., Ran], wan: Path, prompts: Path, quick: None) -> None:
    ran = hasten("tune", "--model", wan, "--prompts", prompts, "--budget", "psnr>=13", "--time", "10m", "--out", "r.yaml", "--json", "r.json")
    assert ran.code == 0, ran.err
    assert "Front, on the tuning prompts" in ran.out and "On held-out prompts" in ran.out and "The recipe is in r.yaml" in ran.out
    assert "noise floor" in ran.out and "keep psnr >= 13 dB" in ran.out
    document = json.loads(Path("r.json").read_text())
    assert document["command"] == "tune" and document["budget"] == "psnr >= 13 dB" and document["best"]
    assert all(row["model"] == str(wan) for row in document["rows"]) and {row["where"] for row in document["rows"]} == {"tuning", "held out"}
    assert Path("r.study/journal.log").is_file(), "the study is beside the recipe"
    shown = hasten("generate", wan, "--prompt", "a one", "--recipe", "r.yaml", "--output", "made")
    assert shown.code == 0 and "elsewhere" not in shown.err, shown.err


def test_peers_are_measured_on_the_held_out_prompts(
    hasten: Callable[..., Ran], wan: Path, prompts: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end: both libraries are put on and taken off, and what they came to is shown and written."""
    monkeypatch.setattr(module.Tuning, "_over", lambda self: False)
    monkeypatch.setattr(module.Tuning, "_affordable", lambda self: 1)
    ran = hasten("tune", "--model", wan, "--prompts", prompts, "--budget", "psnr>=13", "--time", "30m", "--peers", "--out", "r.yaml", "--json", "r.json")
    assert ran.code == 0, ran.err
    document = json.loads(Path("r.json").read_text())
    peers = [row for row in document["rows"] if (row.get("control") or "").startswith("peer:")]
    assert {row["control"] for row in peers} == {"peer:diffusers", "peer:cache-dit"} and all(row["where"] == "held out" for row in peers)
    families = {row["recipe"].partition(" @ ")[0] for row in peers}
    assert {"diffusers FirstBlockCache", "diffusers MagCache", "cache-dit DBCache F1B0"} <= families
    ran_whole = [row for row in peers if row["n"] and not row["note"]]
    assert {row["control"] for row in ran_whole} == {"peer:diffusers", "peer:cache-dit"}, [row["note"] for row in peers]
    assert "Peer: cache-dit DBCache F1B0" in ran.err and "settings of peers were not measured" not in ran.out
    ours = next(row for row in document["rows"] if row["recipe"] == document["best"] and row["where"] == "held out")
    faster = [row for row in ran_whole if row["kept"] >= 0.95 and row["speedup"] > ours["speedup"]]
    assert ("is faster than the tuned recipe" in ran.out) == bool(faster)


def test_nothing_that_keeps_the_budget_is_exit_1(hasten: Callable[..., Ran], wan: Path, prompts: Path, quick: None) -> None:
    ran = hasten("tune", "--model", wan, "--prompts", prompts, "--budget", "psnr>=90", "--out", "r.yaml", "--json", "-")
    assert ran.code == 1 and not Path("r.yaml").exists()
    assert "Allow more time, or a lower budget." in ran.err and ran.json["recipe"] is None and ran.json["best"] is None


def test_ctrl_c_keeps_the_study_and_says_how_to_go_on(
    hasten: Callable[..., Ran], wan: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Tuning, "_affordable", lambda self: 2)
    monkeypatch.setattr(Study, "run", interrupt)
    monkeypatch.setattr("sys.argv", ["hasten", "tune", "--budget", "psnr>=30"])
    ran = hasten("tune", "--model", wan, "--prompts", prompts, "--out", "r.yaml")
    assert ran.code == 130 and "The study is kept in r.study" in ran.err and "hasten tune --budget 'psnr>=30'" in ran.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "psnr<=30"], "asks for bad results"), (["--time", "soon"], "Write 10m, 90s or 1h30m"),
        (["--out", "r.png"], "a recipe is a .yaml file"), (["--steps", "3"], "leaves nothing to search"),
        (["--attention", "semantik"], "Did you mean 'semantic'"), (["--adapter", "none.yaml"], "Cannot read recipe none.yaml"),
        (["--steps", "0"], "steps"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_sentence(hasten: Callable[..., Ran], wan: Path, prompts: Path, arguments: list[str], said: str) -> None:
    ran = hasten("tune", "--model", wan, "--prompts", prompts, *arguments)
    assert ran.code == 2 and said in ran.sentence
    assert list(Path().iterdir()) == [], "nothing is left"


def test_one_prompt_is_too_few(hasten: Callable[..., Ran], wan: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a seven\n")
    ran = hasten("tune", "--model", wan, "--prompts", tmp_path / "one.txt")
    assert ran.code == 2 and "at least 4 prompts" in ran.sentence
