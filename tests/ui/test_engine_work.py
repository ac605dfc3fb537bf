"""Jobs from being submitted to their results: what they tell on the way, what they leave, and what happens when one fails."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import hasten
from hasten.errors import ModelError
from hasten.pipelines.generate import frames_of
from hasten.ui.engine import Engine, RequestError, Snapshot, read
from hasten.ui.page.results import compared
from hasten.ui.page.tabs.text import PROMPT
from tests.ui.engines import IMAGE, TEXT, VIDEO, done, until


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tmp_path_factory.mktemp("home"), offline=True) as found:
        yield found


def test_a_clip_is_what_the_library_makes(engine: Engine) -> None:
    job = done(engine, VIDEO)
    pipe = hasten.load("tiny-video")
    with hasten.accelerate(pipe, "balanced") as run:
        call = hasten.pipelines.tiny_models.call_defaults(pipe) | {"num_inference_steps": 6}
        output = pipe(prompt=VIDEO["prompt"], generator=torch.Generator("cpu").manual_seed(0), output_type="np", **call)
    found = job.result
    assert found["media"] == "result.mp4" and found["row"]["computed_fraction"] == run.report().computed_fraction
    trace = json.loads(engine.outputs.file(found["output"], found["trace"]).read_text())
    assert trace["nfe"] == found["row"]["nfe"] and trace["events"] and trace["recipe"]["name"] == "balanced"
    assert engine.outputs.file(found["output"], found["thumb"]).read_bytes().startswith(b"\x89PNG")
    assert engine.outputs.get(found["output"])["request"] == job.asked
    frames = frames_of(output)
    from hasten.pipelines.frames import frames as decoded

    shown = np.stack([np.asarray(frame) for frame in decoded(engine.outputs.file(found["output"], "result.mp4"))])
    assert shown.shape == frames.shape and np.abs(shown / 255.0 - frames).mean() < 0.05


def test_snapshots_rise_and_end_with_the_state(engine: Engine) -> None:
    seen = list(engine.follow(engine.submit(IMAGE | {"recipe": "balanced", "steps": 20}).id))
    numbers = [snapshot.number for snapshot in seen if snapshot.state == "running"]
    assert numbers == sorted(set(numbers)) and seen[-1].state == "done"
    steps = [snapshot for snapshot in seen if snapshot.phase == "Denoising"]
    assert steps and all(snapshot.steps == 20 and snapshot.memory for snapshot in steps)
    assert seen[-1].skipped and seen[-1].skipped > 0


def test_followers_of_one_job_in_many_threads_all_see_its_end(engine: Engine) -> None:
    name = engine.submit(IMAGE | {"steps": 20}).id
    ends: list[Snapshot] = []
    threads = [threading.Thread(target=lambda: ends.append(list(engine.follow(name))[-1])) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(280)
    assert [end.state for end in ends] == ["done"] * 5
    assert list(engine.follow(name))[-1].state == "done"  # who comes late sees the end at once


def test_another_engine_of_the_same_home_follows_and_cancels(engine: Engine) -> None:
    other = Engine(engine.place.home)  # not started: it only looks
    try:
        name = engine.submit(IMAGE | {"steps": 200}).id
        assert until(other.follow(name), "Denoising", 1).steps == 200
        other.cancel(name)
        assert engine.wait(name, 60).state == "cancelled" and other.job(name).state == "cancelled"
    finally:
        other.close()


def test_cancel_then_run_again_at_once_does_not_overlap(engine: Engine) -> None:
    first = engine.submit(IMAGE | {"steps": 200})
    until(engine.follow(first.id), "Denoising", 2)
    told = time.time()
    engine.cancel(first.id)
    second = engine.submit(IMAGE)
    a, b = engine.wait(first.id), engine.wait(second.id)
    assert (a.state, b.state) == ("cancelled", "done") and a.ended <= b.began  # type: ignore[operator]
    assert a.ended - told < 30  # type: ignore[operator]
    assert not [out for out in engine.outputs.list(500) if out["request"].get("steps") == 200]  # nothing is left of it


def test_a_failing_job_does_not_stop_the_queue(engine: Engine) -> None:
    bad = engine.submit(IMAGE | {"width": 12, "height": 40})  # no multiple of what the model needs
    good = engine.submit(IMAGE)
    failed = engine.wait(bad.id)
    assert failed.state == "failed" and failed.error["kind"] == "refused" and "divisible" in failed.error["sentence"]
    assert engine.wait(good.id).state == "done"
    assert engine.retry(bad.id).again_of == bad.id


def test_comparisons_keep_every_run(engine: Engine) -> None:
    job = done(engine, {"kind": "compare", "model": "tiny-image", "prompt": "a three", "steps": 8, "recipes": ["balanced", "fast"]})
    runs = job.result["runs"]
    assert [run["recipe"] for run in runs] == ["plain", "balanced", "fast"]
    assert runs[0]["row"]["speedup"] == 1.0 and runs[1]["row"]["psnr_median"] > job.result["noise_floor"]
    assert len(runs[1]["psnr"]) == 1 and not runs[0]["psnr"]
    for run in runs:
        assert engine.outputs.file(job.result["output"], run["media"]).stat().st_size > 100
        assert json.loads(engine.outputs.file(job.result["output"], run["trace"]).read_text())["events"]


def test_every_run_of_a_comparison_is_warm_and_timed_as_often_as_asked(engine: Engine) -> None:
    done(engine, IMAGE)
    network, counted = engine._worker._desk._warm["tiny-image", None].transformer, [0]

    def count(*_: Any) -> None:
        counted[0] += 1

    with network.register_forward_pre_hook(count):
        job = done(engine, {"kind": "compare", "model": "tiny-image", "prompt": "a three", "steps": 4, "recipes": ["fastest"], "repeats": 3})
    plain, floor, student, warm = 3 * 4, 4, 3 * 1, 2 + 1
    assert counted[0] == plain + floor + student + warm, "two steps of the plain run and the student's own call come before the clock"
    found = job.result | {"request": job.asked}
    assert job.result["repeats"] == 3 and "timed 3 times after a warm-up" in compared(found, "a three")
    assert "timed once" in compared(found | {"repeats": 1}, "a three")
    with pytest.raises(RequestError, match="repeats"):
        engine.submit(job.asked | {"repeats": 0})


def test_texts_say_which_step_revealed_each_token(engine: Engine) -> None:
    job = done(engine, TEXT)
    tokens, row = job.result["tokens"], job.result["row"]
    given = [token for token in tokens if token["given"]]
    steps = [token["step"] for token in tokens if not token["given"]]
    assert given and all(token["step"] is None for token in given)
    assert len(steps) == row["tokens"] and set(steps) == set(range(row["nfe"]))
    assert "d i j k m n p" in job.result["text"]


def test_the_prompt_that_the_page_begins_with_fills_its_canvas_in_several_steps(engine: Engine) -> None:
    job = done(engine, {"kind": "text", "model": "tiny-dllm", "prompt": PROMPT})
    steps = [token["step"] for token in job.result["tokens"] if not token["given"]]
    assert len(set(steps)) >= 6 and steps != sorted(steps), "several, and not from left to right"


def test_canvases_are_seen_while_a_text_is_written(engine: Engine) -> None:
    seen = [snapshot for snapshot in engine.follow(engine.submit(TEXT | {"recipe": "plain"}).id) if snapshot.data]
    tokens = seen[0].data["tokens"]
    assert any(token["given"] for token in tokens) and any(token["step"] is None and not token["given"] for token in tokens)


def test_what_cannot_be_is_said_when_it_is_submitted(engine: Engine) -> None:
    with pytest.raises(ModelError, match="Did you mean 'tiny-video'"):
        engine.submit(VIDEO | {"model": "tiny-vidoe"})
    with pytest.raises(ModelError, match="no model"):
        engine.submit(VIDEO | {"model": "folder:none"})


@pytest.mark.parametrize(("asked", "said"), [
    (TEXT | {"model": "tiny-video"}, "no masked language model"), (IMAGE | {"model": "tiny-dllm"}, "no pictures"),
    ({"kind": "download", "model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}, "offline"), ({"kind": "download", "model": "tiny-flux"}, "on this disk"),
    (IMAGE | {"model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}, "Download it first"), (IMAGE | {"recipe": "trained:" + "0" * 16}, "no student"),
    (IMAGE | {"lora": "none"}, "no LoRA"),
    ({"kind": "train", "method": "nothing", "model": "tiny-flux"}, "no method"),
])  # fmt: skip
def test_what_does_not_go_together_fails_with_words(asked: dict[str, object], said: str, tmp_path: Path) -> None:
    with Engine(tmp_path, offline=True, apart=False) as here:
        found = here.wait(here.submit(asked).id)
    assert found.state == "failed" and found.error["kind"] == "refused" and said in found.error["sentence"], found.error


def test_stopping_the_engine_interrupts_and_the_next_one_may_try_again(tmp_path: Path) -> None:
    with Engine(tmp_path) as first:
        name = first.submit(IMAGE | {"steps": 200}).id
        until(first.follow(name), "Denoising", 1)
    second = Engine(tmp_path)
    try:
        assert second.job(name).state == "interrupted"
        assert second.retry(name).state == "queued" and second.job(name).asked["steps"] == 200
    finally:
        second.close()


def test_memory_and_threads_stay_flat_over_200_jobs(engine: Engine) -> None:
    """Submit, follow for a moment, cancel; every tenth is let to its end."""
    asked = read(TEXT)

    def cycle(number: int) -> None:
        job = engine.submit(asked)
        if number % 10:
            engine.cancel(job.id)
        assert engine.wait(job.id).over

    for number in range(20):
        cycle(number)
    gc.collect()
    process = psutil.Process()
    threads, memory, files = threading.active_count(), process.memory_info().rss, process.num_fds()
    for number in range(200):
        cycle(number)
    gc.collect()
    assert threading.active_count() == threads
    assert process.num_fds() <= files + 2
    assert process.memory_info().rss - memory < 24 * 2**20
