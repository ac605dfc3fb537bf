"""Work in a process of its own: models from a folder, cancelling, a crash, and the next job after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from hasten.ui.engine import Engine
from tests.ui.engines import done, models_folder, until

pytestmark = pytest.mark.timeout(900)  # a process takes a while to start where others are at work

CLIP = {"kind": "generate", "model": "folder:wan", "prompt": "a seven", "recipe": "balanced"}
STILL = {"kind": "generate", "model": "folder:sets/pixart", "prompt": "a cat", "recipe": "balanced", "preview": False}
LONG = CLIP | {"steps": 200, "recipe": "plain"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    models = models_folder(tmp_path_factory.mktemp("models"))
    with Engine(tmp_path_factory.mktemp("home"), models=models, offline=True) as found:
        yield found


def test_a_model_of_a_folder_gets_a_process_that_stays(engine: Engine) -> None:
    first = done(engine, STILL)
    pid = engine._worker.pid
    assert pid is not None and pid != os.getpid()
    again = done(engine, STILL | {"preview": True})
    pictures = [np.asarray(Image.open(engine.outputs.file(job.result["output"], "result.png"))) for job in (first, again)]
    assert np.array_equal(*pictures) and first.result["row"]["nfe"] == again.result["row"]["nfe"]
    assert done(engine, CLIP).result["media"] == "result.mp4" and engine._worker.pid == pid  # another model, the same process


def test_it_stops_when_told_and_does_the_next_job(engine: Engine) -> None:
    job = engine.submit(LONG)
    seen = until(engine.follow(job.id), "Denoising", 1)
    assert seen.steps == 200
    pid = engine._worker.pid
    engine.cancel(job.id)
    assert engine.wait(job.id).state == "cancelled"
    assert done(engine, CLIP).result["row"]["frames"] == 5 and engine._worker.pid == pid  # no new process was needed


def test_a_crashed_process_is_said_and_replaced(engine: Engine) -> None:
    job = engine.submit(LONG)
    until(engine.follow(job.id), "Denoising", 1)
    pid = engine._worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    failed = engine.wait(job.id)
    assert failed.state == "failed" and failed.error["kind"] == "crash" and "SIGKILL" in failed.error["sentence"]
    assert failed.error["remedies"][0]["request"] == failed.asked
    assert done(engine, CLIP).state == "done" and engine._worker.pid not in (None, pid)


def test_failures_come_back_in_words_with_the_queue_going_on(engine: Engine) -> None:
    job = engine.wait(engine.submit(CLIP | {"width": 40}).id)
    assert job.state == "failed" and job.error["kind"] == "refused" and "divisible" in job.error["sentence"]
    assert done(engine, CLIP).state == "done"


def test_the_process_ends_with_the_engine(engine: Engine) -> None:
    job = engine.submit(LONG)
    until(engine.follow(job.id), "Denoising", 1)
    pid = engine._worker.pid
    assert pid is not None
    engine.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert engine._worker.pid is None and engine.job(job.id).state == "interrupted"
    assert engine.retry(job.id).asked == job.asked
