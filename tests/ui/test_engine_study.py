"""Studies and trainings: seen while they run, stopped cleanly, and gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import hasten
from hasten.errors import UsageError
from hasten.ui.engine import Engine, read
from hasten.ui.engine.work.study import folder_of
from hasten.ui.engine.work.train import POINTS, thinned
from tests.ui.engines import IMAGE, done, until

pytestmark = pytest.mark.timeout(900)  # a process takes a while to start where others are at work

TUNE = {
    "kind": "tune", "model": "tiny-image", "prompts": ["a one", "a two", "a three", "a four"], "steps": 8, "budget": "psnr>=15", "seconds": 40.0,
}  # fmt: skip
TRAIN: dict[str, Any] = {
    "kind": "train", "method": "pairs", "model": "tiny-image", "prompts": ["a one", "a two"], "minutes": 10.0,
    "settings": {"train.steps": 4000, "train.batch": 2, "data.count": 2, "student.rank": 2, "data.call.num_inference_steps": 2,
                 "train.samples_every": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HASTEN_HOME", str(home))  # where tuned recipes are kept
        with Engine() as found:
            assert found.place.home == home
            yield found


@pytest.mark.long
def test_a_study_shows_its_trials_and_is_gone_on_with(engine: Engine) -> None:
    seen = list(engine.follow(engine.submit(TUNE).id))
    job = engine.job(seen[-1].job)
    assert job.state == "done", job.error
    counts = [len(snapshot.data.get("trials", [])) for snapshot in seen if snapshot.state == "running"]
    assert counts[0] == 0 and counts[-1] >= 1, "they are seen while it runs"
    assert counts == sorted(counts)
    trials = job.result["trials"]
    assert {"number", "name", "speedup", "worst", "kept", "recipe", "front"} <= set(trials[0]) and any(trial["front"] for trial in trials)
    assert all(hasten.ui.engine.recipes.recipe_of(trial["recipe"]).axes is not None for trial in trials)
    again = engine.submit(TUNE | {"seconds": 60.0})
    first = next(snapshot for snapshot in engine.follow(again.id) if snapshot.data.get("trials") or snapshot.state == "done")
    assert first.data["trials"], "what the first study has tried is there at once"
    engine.cancel(again.id)
    assert engine.wait(again.id).state in ("cancelled", "done")


def test_a_training_is_seen_stopped_and_gone_on_with(engine: Engine) -> None:
    job = engine.submit(TRAIN)
    snapshot = until(engine.follow(job.id), "Training", 20)
    loss = snapshot.data["loss"]
    assert len(loss) >= 10 and loss[0][0] == 0 and snapshot.steps == 4000
    engine.cancel(job.id)
    assert engine.wait(job.id).state == "cancelled"
    folder = folder_of(engine.place, read(TRAIN))
    assert (folder / "latest" / "state.json").is_file()
    again = engine.submit(TRAIN | {"minutes": 0.01})  # out of time soon after it has begun
    found = engine.wait(again.id)
    assert found.state == "done" and not found.result["finished"] and found.result["recipe"] is None
    assert found.result["step"] > loss[-1][0] and len(found.result["loss"]) <= POINTS


def test_a_finished_student_is_a_recipe_from_then_on(engine: Engine) -> None:
    short = TRAIN | {"settings": TRAIN["settings"] | {"train.steps": 3, "train.samples_every": 2}}
    job = engine.submit(short)
    found = engine.wait(job.id)
    assert found.state == "done", found.error
    assert found.result["finished"] and found.result["recipe"] == f"trained:{found.result['output']}"
    for name in found.result["samples"]:
        assert engine.outputs.file(found.result["output"], name).read_bytes().startswith(b"\x89PNG")
    assert engine.sample(job.id, "000002.png").is_file()
    with pytest.raises(UsageError, match="no sample"):
        engine.sample(job.id, "../config.json")
    made = done(engine, IMAGE | {"recipe": found.result["recipe"]})
    assert made.result["row"]["nfe"] == 1


def test_curves_are_thinned_to_means() -> None:
    points = [[float(step), float(step)] for step in range(1000)]
    found = thinned(points)
    assert len(found) <= POINTS and found[0] == [2.0, 1.0] and found[-1][0] == 999 and thinned(points[:5]) == points[:5]


def test_folders_follow_from_what_is_asked_not_from_its_time(engine: Engine) -> None:
    place = engine.place
    assert folder_of(place, read(TUNE)) == folder_of(place, read(TUNE | {"seconds": 99.0}))
    assert folder_of(place, read(TUNE)) != folder_of(place, read(TUNE | {"budget": "psnr>=31"}))
    with pytest.raises(UsageError, match="nothing to go on"):
        folder_of(place, read(IMAGE))
