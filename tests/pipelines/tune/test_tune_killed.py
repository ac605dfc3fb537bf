"""kill -9 in the middle of a study, and the same command again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from hasten.errors import ResumeError
from hasten.pipelines.tune.run import tune
from hasten.pipelines.tune.trials import Bench
from tests.hosts import UNET_CALL, small_unet
from tests.pipelines.tune.killed import LAST, PROMPTS

ROOT = Path(__file__).resolve().parents[3]


def test_a_killed_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.pipelines.tune.killed", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    before = [line.partition(". ")[2].rpartition(": ")[0] for line in ran.stdout.splitlines() if line[0].isdigit()]
    assert len(before) == LAST - 1, ran.stdout

    pipe = small_unet()
    for change in ({"model": "another"}, {"call": UNET_CALL | {"num_inference_steps": 8}}, {"budget": "psnr>=30"}, {"prompts": [*PROMPTS, "a dog"]}):
        arguments: dict[str, Any] = {"prompts": PROMPTS, "budget": "psnr>=25", "model": "small", "call": UNET_CALL} | change
        with pytest.raises(ResumeError, match=f"with another {next(iter(change))}; its trials would not be comparable"):
            tune(pipe, seconds=600, study=tmp_path, **arguments)

    measure, after = Bench.measure, []

    def counted(self: Bench, name: str, *args: Any, **kwargs: Any) -> Any:
        after.append(name)
        if len(after) == 3:
            raise KeyboardInterrupt
        return measure(self, name, *args, **kwargs)

    monkeypatch.setattr(Bench, "measure", counted)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        tune(pipe, PROMPTS, "psnr>=25", seconds=1200, study=tmp_path, model="small", call=UNET_CALL, say=said.append)
    assert len(after) == 3 and not set(before) & set(after), "what was run before the kill is not run again"
    told = next(line for line in said if line[0].isdigit())
    assert int(told.partition(".")[0]) > LAST, "the killed trial's number is not used again"
    states = [trial.state.name for trial in journal(tmp_path)]
    assert states.count("COMPLETE") + states.count("PRUNED") == LAST - 1 + 2 and "RUNNING" not in states
    killed = journal(tmp_path)[LAST - 1]
    assert killed.state.name == "FAIL"
    again = [t for t in journal(tmp_path) if t.state.name == "WAITING" and t.system_attrs["fixed_params"] == killed.params]
    assert len(again) == 1 and again[0].user_attrs["ended"] == 1, "what ran when it was killed is asked again"


def journal(folder: Path) -> list[Any]:
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "journal.log"))
    return optuna.load_study(study_name="hasten", storage=optuna.storages.JournalStorage(backend)).get_trials()
