"""The journal: what a study remembers, and what becomes of processes that end, crash or join."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten.errors import OutputError, ResumeError, UsageError
from hasten.pipelines.tune.goal import Goal
from hasten.pipelines.tune.space import Space
from hasten.pipelines.tune.study import JOURNAL, Study, Trial
from hasten.pipelines.tune.trials import Measured, Outcome
from hasten.pipelines.tune.workers import Worker, mended
from hasten.recipe import Recipe

GOAL = Goal("psnr", 30)
IDENTITY = {"model": "toy", "prompts": [["a", 0], ["b", 1]]}
SPACE = Space(20, True, presets=("balanced",))


class Toy:
    """A bench without a model: faster is worse. ran: names in order. before: called with the number of the run."""

    def __init__(self, before: Callable[[int], None] = lambda number: None) -> None:
        self.ran: list[str] = []
        self.before = before

    def measure(self, name: str, recipe: Recipe, goal: Goal) -> Measured:
        self.ran.append(name)
        self.before(len(self.ran))
        speed = 1 + len(name) / 20
        return Measured(name, (Outcome(speed, 1 / speed, 60 - 10 * speed, None, 0.01, 10, 0),))


def searched(folder: Path, toy: Toy, trials: int, space: Space = SPACE, **more: Any) -> Study:
    """A study that is searched until so many trials were told."""
    study = Study(folder, GOAL, IDENTITY, **more)
    told: list[Trial] = []

    class Enough(Exception):
        pass

    def tell(trial: Trial) -> None:
        told.append(trial)
        if len(told) == trials:
            raise Enough

    with pytest.raises(Enough):
        study.search(toy, space, 60, tell)  # type: ignore[arg-type]
    study.close()
    return study


def test_a_study_goes_on_and_runs_nothing_twice(tmp_path: Path) -> None:
    first, second = Toy(), Toy()
    searched(tmp_path, first, 5)
    again = searched(tmp_path, second, 12)
    assert len(first.ran) == 5 and len(second.ran) == 12
    assert len(set(first.ran + second.ran)) == 17, "no composition ran twice"
    assert len(again.trials()) == 17 and again.given_up() == []
    assert [t.measured.speedup for t in again.trials()] == sorted(t.measured.speedup for t in again.trials())


def test_first_guesses_are_asked_once_each_whoever_is_first(tmp_path: Path) -> None:
    from hasten.pipelines.tune.space import first_guesses

    guesses = {SPACE.name(guess) for guess in first_guesses(SPACE, GOAL.tolerance)}
    one = Toy()
    searched(tmp_path, one, len(guesses))
    assert set(one.ran) == guesses


def test_time_that_was_spent_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr("hasten.pipelines.tune.study.time.monotonic", lambda: float(next(clock)))
    study = searched(tmp_path, Toy(), 3)
    assert 0 < study.spent <= 3
    toy = Toy()
    later = Study(tmp_path, GOAL, IDENTITY)
    later.search(toy, SPACE, study.spent)  # type: ignore[arg-type]
    assert toy.ran == [], "all of it was spent by the first process"


def test_what_a_killed_process_left_running_is_asked_again_once(tmp_path: Path) -> None:
    """A process that ends without a word: its lock is gone, its trial still says running."""
    names = []
    for death in range(2):
        study = Study(tmp_path, GOAL, IDENTITY)
        if death == 0:
            for guess in ({"family": "drift", "limit": 0.05, "both": 1.0}, {"family": "preset", "preset": "balanced"}):
                study.study.enqueue_trial(guess)
        asked = study.study.ask()
        asked.set_user_attr("worker", study.worker.name)
        names.append(SPACE.name(SPACE.ask(asked)))
        study.worker._file.close()  # as the system does for a process that is killed
        if death == 0:
            searched(tmp_path, Toy(), 1)
    waiting = Study(tmp_path, GOAL, IDENTITY)
    failed = [t for t in waiting.study.get_trials() if t.state.name == "FAIL"]
    assert names[0] == "drift: limit 0.05, both 1.0" and failed
    toy = Toy()
    waiting.close()
    searched(tmp_path, toy, 8)
    assert names[0] not in toy.ran or names[1] != names[0], "two processes ended in it: it is not asked a third time"


def test_ctrl_c_is_no_fault_of_the_composition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(number: int) -> None:
        raise KeyboardInterrupt

    guess = {"family": "ledger", "tolerance": 0.1, "both": 1.0}
    monkeypatch.setattr("hasten.pipelines.tune.study.first_guesses", lambda space, tolerance: [guess])
    for _ in range(3):
        study, toy = Study(tmp_path, GOAL, IDENTITY), Toy(interrupt)
        with pytest.raises(KeyboardInterrupt):
            study.search(toy, SPACE, 60)  # type: ignore[arg-type]
        study.close()
        assert toy.ran == [SPACE.name(guess)], "it is asked again, however often it was interrupted"
    calm = Toy()
    searched(tmp_path, calm, 1)
    assert calm.ran == [SPACE.name(guess)]


def test_a_crash_is_a_reason_and_not_the_end(tmp_path: Path) -> None:
    def crash(number: int) -> None:
        if number % 2:
            raise RuntimeError("out of ideas\nand more")

    toy = Toy(crash)
    study = searched(tmp_path, toy, 6)
    assert len(study.trials()) == 3
    assert [why for _, why in study.given_up()] == ["crashed: RuntimeError: out of ideas"] * 3


def test_recipes_that_do_not_join_are_reasons(tmp_path: Path) -> None:
    space = Space(20, True, presets=("balanced",))
    study = Study(tmp_path, GOAL, IDENTITY)
    study.study.enqueue_trial({"family": "preset", "preset": "balanced"})
    broken = Space(20, True, presets=("balanced",))
    broken._preset = lambda params: space._preset(params) | space._preset(params)  # type: ignore[method-assign]
    told: list[Trial] = []

    def tell(trial: Trial) -> None:
        told.append(trial)
        raise StopIteration

    with pytest.raises(StopIteration):
        study.search(Toy(), broken, 60, tell)  # type: ignore[arg-type]
    assert told[0].measured.why.startswith("refused: Both recipes set reuse")


@pytest.mark.parametrize("changed", ["model", "prompts"])
def test_a_study_of_something_else_is_refused(tmp_path: Path, changed: str) -> None:
    Study(tmp_path, GOAL, IDENTITY).close()
    with pytest.raises(ResumeError, match=f"holds a study with another {changed}.*Give --study another folder"):
        Study(tmp_path, GOAL, IDENTITY | {changed: "other"})
    Study(tmp_path, GOAL, IDENTITY).close()


def test_another_space_is_refused(tmp_path: Path) -> None:
    searched(tmp_path, Toy(), 1)
    with pytest.raises(ResumeError, match="another space"):
        Study(tmp_path, GOAL, IDENTITY).search(Toy(), Space(21, True), 60)  # type: ignore[arg-type]


def test_a_space_that_is_exhausted_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Space(20, False, presets=("balanced",))
    tiny.ask = lambda trial: {"family": trial.suggest_categorical("family", ["preset"]), "preset": trial.suggest_categorical("preset", ["balanced"])}  # type: ignore[method-assign]
    monkeypatch.setattr("hasten.pipelines.tune.study.first_guesses", lambda space, tolerance: [])
    study, toy = Study(tmp_path, GOAL, IDENTITY), Toy()
    study.search(toy, tiny, 60)  # type: ignore[arg-type]
    assert toy.ran == ["balanced"]


def test_two_processes_share_a_journal(tmp_path: Path) -> None:
    """Both live; neither takes the other's running trial for one that was broken off."""
    one, toy = Study(tmp_path, GOAL, IDENTITY), Toy()
    other: list[Study] = []

    def join(number: int) -> None:
        if number == 1:
            other.append(Study(tmp_path, GOAL, IDENTITY))
            theirs = Toy()
            other[0]._one(theirs, SPACE)  # type: ignore[arg-type]
            assert theirs.ran and theirs.ran[0] not in toy.ran
        if number == 3:
            raise KeyboardInterrupt

    toy.before = join
    with pytest.raises(KeyboardInterrupt):
        one.search(toy, SPACE, 60)  # type: ignore[arg-type]
    assert other[0].others == 1 and one.others == 0
    assert len(one.trials()) == 3, "two of ours and one of theirs"
    assert one.settled("samples", 5) == 5 and other[0].settled("samples", 7) == 5


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    searched(tmp_path, Toy(), 3)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"')
    toy = Toy()
    assert len(searched(tmp_path, toy, 2).trials()) == 5
    journal = tmp_path / "other.log"
    journal.write_bytes(b"torn")
    mended(journal)
    assert journal.read_bytes() == b""


def test_who_lives_is_known_by_locks(tmp_path: Path) -> None:
    one, two = Worker(tmp_path), Worker(tmp_path)
    assert one.lives(one.name) and one.lives(two.name) and one.others() == 1 and not one.lives("nobody")
    two._file.close()  # killed
    assert not one.lives(two.name) and one.others() == 0 and not list(tmp_path.glob(f"*{two.name}*"))
    one.leave()
    one.leave()
    assert not list(tmp_path.glob("worker-*"))


def test_without_optuna_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"^Tuning needs optuna. `pip install hasten\[tune\]`.$"):
        Study(tmp_path, GOAL, IDENTITY)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Give --study another folder"):
        Study(tmp_path / "file" / "study", GOAL, IDENTITY)
