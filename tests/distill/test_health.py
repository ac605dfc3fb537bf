"""What a training says of itself: alarms once, rows for trackers, optimisers that are there or refused."""

from __future__ import annotations

import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.distill.loop.health import Health
from hasten.distill.loop.log import Log
from hasten.distill.loop.optimizers import check_optimizer
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.methods.pairs import Pairs
from hasten.errors import UsageError
from tests.distill.test_trainer import same, weights
from tests.distill.toys import trainer


def _alarms(rows: list[dict[str, float]], earlier: list[dict[str, float]] | None = None) -> dict[str, int]:
    """Alarm -> the step at which it was raised, with the warnings counted."""
    health, found = Health(earlier or []), {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for row in rows:
            found |= {name: int(row["step"]) for name in health.look(int(row["step"]), row)}
    assert len(said) == len(found)
    return found


def _rows(**numbers: list[float]) -> list[dict[str, float]]:
    return [{"step": step, **dict(zip(numbers, values, strict=True))} for step, values in enumerate(zip(*numbers.values(), strict=True))]


def test_alarms_are_raised_once_and_not_again_after_a_resume() -> None:
    rows = _rows(loss=[1.0] * 150 + [30.0] * 150, gap=[1.0] * 200 + [9.0] * 100)
    found = _alarms(rows)
    assert set(found) == {"alarm.loss", "alarm.gap"}
    assert 150 < found["alarm.loss"] < 170 and 200 < found["alarm.gap"] < 215
    before = rows[:250] + [{"step": 250, "alarm.loss": 1.0, "alarm.gap": 1.0}]
    assert _alarms(rows[250:], before) == {}
    assert _alarms(rows[152:], rows[:152]) == found, "a resumed training says what it would have said"


def test_falling_and_noisy_numbers_raise_none() -> None:
    torch.manual_seed(0)
    noise = torch.rand(400).tolist()
    assert _alarms(_rows(loss=[(1 + n) * 0.99**k for k, n in enumerate(noise)], gap=[1 + 2 * n for n in noise])) == {}


def test_a_loss_that_is_let_in_slowly_is_not_lost() -> None:
    torch.manual_seed(0)
    let_in = [0.05 * min(1, (k + 1) / 40) * (1 + 9 * n) for k, n in enumerate(torch.rand(300).tolist())]
    assert _alarms(_rows(loss=let_in)) == {}
    found = _alarms(_rows(loss=[*let_in, *[20 * value for value in let_in]]))
    assert 300 < found["alarm.loss"] < 350


def test_a_tangent_as_large_as_nothing_real() -> None:
    assert _alarms(_rows(tangent=[3.0] * 300)) == {}
    # 1 + 99 (1 - 0.9^k) passes 10 at once; the average of the first ten steps begins at 0.
    found = _alarms(_rows(tangent=[1.0] * 50 + [100.0] * 10))
    assert found == {"alarm.tangent": 50}
    assert _alarms(_rows(tangent=[11.0] * 40)) == {"alarm.tangent": 22}


def test_samples_that_become_alike_are_seen() -> None:
    rows: list[dict[str, float]] = [{"step": step, "recall": r} for step, r in enumerate([0.1, 0.5, 0.7, 0.6, 0.3, 0.2])]
    assert _alarms(rows) == {"alarm.recall": 4}


def test_trackers_get_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake: Any = types.ModuleType("trackio")
    fake.__spec__ = types.SimpleNamespace(name="trackio")
    fake.init = lambda **given: calls.append(given["name"])
    fake.log = lambda row, step: calls.append((step, sorted(row)))
    fake.finish = lambda: calls.append("end")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    trainer(Pairs(), tmp_path / "run", steps=2, report_to="trackio").fit()
    assert calls == ["run", (0, ["gradient", "loss"]), (1, ["gradient", "loss"]), "end"]
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, tracker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.distill.loop.log.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"train.report_to = {tracker} needs the package {tracker}"):
        Log(tmp_path / "log.jsonl", 0, tracker)


class Eight(torch.optim.SGD):
    """Keeps a count as a plain number and momentum, as bitsandbytes' optimisers do."""

    def __init__(self, weights: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(weights, lr, betas[0], weight_decay=weight_decay)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for state in self.state.values():
            state["step"] = state.get("step", 0) + 1
            assert isinstance(state["step"], int)


def test_eight_bit_optimisers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="adamw8bit needs the package bitsandbytes"):
        trainer(Pairs(), tmp_path / "a", optimizer="AdamW8bit")
    fake: Any = types.ModuleType("bitsandbytes.optim")
    fake.AdamW8bit = Eight
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", fake)
    monkeypatch.setattr("hasten.distill.loop.optimizers.find_spec", lambda name: True)
    trainer(Pairs(), tmp_path / "whole", optimizer="adamw8bit", lr=1e-3).fit()
    trainer(Pairs(), tmp_path / "cut", optimizer="adamw8bit", lr=1e-3).fit(stop_after=3)
    trainer(Pairs(), tmp_path / "cut", optimizer="adamw8bit", lr=1e-3).fit(resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    with pytest.raises(UsageError, match="which train.shard cannot cut"):
        check_optimizer(TrainSettings(optimizer="adamw8bit", shard=True))


def test_schedules() -> None:
    def rates(schedule: str) -> list[float]:
        settings = TrainSettings(steps=10, warmup=2, schedule=schedule)
        return [settings.factor(step) for step in range(10)]

    assert rates("constant_with_warmup") == rates("Constant") == [0.5] + [1.0] * 9
    assert rates("linear")[:3] == [0.5, 1.0, 1.0] and rates("linear")[-1] == pytest.approx(1 / 8)
    assert rates("cosine")[6] == pytest.approx(0.5) and rates("cosine")[-1] > 0
    assert rates("plateau")[:8] == [0.5] + [1.0] * 7 and rates("plateau")[-1] == pytest.approx(1 / 3)
    assert TrainSettings(precision=False).precision == "no"  # what YAML makes of no


def test_checkpoints_every_so_many_steps(tmp_path: Path) -> None:
    made = trainer(Pairs(), tmp_path / "a", checkpoint_every=2)
    seen: list[int] = []
    made.save = seen.append  # type: ignore[method-assign]
    made.fit()
    assert seen == [2, 4, 6]


def test_a_training_that_is_told_to_end_ends_behind_its_step(tmp_path: Path) -> None:
    made = trainer(Pairs(), tmp_path / "a")
    asked = iter([False, False, True])
    made.ended = lambda: next(asked)
    assert made.fit() == 3
    assert json.loads((tmp_path / "a" / "latest" / "state.json").read_text())["step"] == 3
    assert trainer(Pairs(), tmp_path / "a").fit(resume=True) == 6
    trainer(Pairs(), tmp_path / "whole").fit()
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "a"))


def test_the_average_plays_for_a_while(tmp_path: Path) -> None:
    made = trainer(Pairs(), tmp_path / "a", average=0.5)
    made.fit()
    player = made.players["student"]
    before = {name: value.clone() for name, value in player.current().items()}
    with player.averaged():
        assert all(torch.equal(value, player.average[name]) for name, value in player.current().items())
        assert not same(before, player.current())
    assert same(before, player.current())
