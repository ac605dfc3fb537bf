"""The page's parts without a browser: who follows which job, what is said of it, what stays text, and the page as a whole."""

from __future__ import annotations

import asyncio
import json
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from hasten.errors import HastenError
from hasten.ui.engine import Engine, RequestError, Snapshot, read
from hasten.ui.page import build, launch_options
from hasten.ui.page.app import _secret
from hasten.ui.page.first import FIRST, begin
from hasten.ui.page.results import _said, compared, data_url, failure, recipe_words, size_of, standing, url
from hasten.ui.page.sentences import model_words, picture, said
from hasten.ui.page.tabs.history import HistoryTab
from hasten.ui.page.tabs.tune import rows as tune_rows
from hasten.ui.page.watch import Watch, in_words, snapshots
from tests.ui.tabs import ASKED, EVIL, all_tabs, edited, standing_engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with standing_engine(tmp_path_factory) as made:
        yield made


@pytest.fixture(scope="module")
def tabs(engine: Engine) -> dict[str, Any]:
    return all_tabs(engine)


# --- following ----------------------------------------------------------------------------------------------


def test_a_follower_ends_with_its_job_and_holds_no_thread(engine: Engine) -> None:
    async def all_of_it() -> list[Snapshot | None]:
        found, before = [], threading.active_count()
        async for snapshot in snapshots(engine, job, lambda: True):
            found.append(snapshot)
            assert threading.active_count() <= before + 6  # of the loop's own pool
            if len(found) == 1:
                engine.cancel(job)
        return found

    job = engine.submit(ASKED[1] | {"recipe": "plain"}).id
    found = asyncio.run(all_of_it())
    assert [snapshot.state for snapshot in found if snapshot] == ["queued", "cancelled"]


def test_a_follower_gives_signs_of_life_and_ends_when_its_job_is_removed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.ui.page.watch.BEAT", 0.3)
    job = engine.submit(ASKED[1] | {"recipe": "plain"}).id

    async def watch() -> list[Snapshot | None]:
        found = []
        async for snapshot in snapshots(engine, job, lambda: True):
            found.append(snapshot)
            if snapshot is None:
                engine.remove(job)
        return found

    assert asyncio.run(asyncio.wait_for(watch(), 30))[-1] is None


def test_of_two_jobs_of_one_page_the_newer_is_followed(engine: Engine, tabs: dict[str, Any]) -> None:
    watch: Watch = tabs["text"].watch
    older, newer = (engine.submit(ASKED[4]).id for _ in range(2))

    class Page:
        session_hash = "one"

    async def both() -> None:
        first = watch._follow(older, Page())  # type: ignore[arg-type]
        await anext(first), await anext(first)
        second = watch._follow(newer, Page())  # type: ignore[arg-type]
        await anext(second), await anext(second)
        with pytest.raises(StopAsyncIteration):
            while True:
                await asyncio.wait_for(anext(first), 10)
        assert watch._looked_at == {"one": newer}
        engine.cancel(newer)
        assert any(update[watch.stop]["value"] == "Stop" for update in [u async for u in second] if watch.stop in update)
        assert watch._looked_at == {}

    asyncio.run(asyncio.wait_for(both(), 60))
    engine.cancel(older)


def test_a_page_finds_its_job_again_else_the_newest(engine: Engine, tabs: dict[str, Any]) -> None:
    watch: Watch = tabs["generate"].watch
    kept, mine = watch.submitted({"text": "other"}, ASKED[0])
    newer = engine.submit(ASKED[0]).id
    assert kept == {"text": "other", "generate": mine}
    assert watch.found_again(kept) == mine
    assert watch.found_again({"generate": "../../etc"}) == newer and watch.found_again(None) == newer
    for job in (mine, newer):
        engine.cancel(job)


def test_stop_says_so_at_once_and_refuses_a_second_click(engine: Engine, tabs: dict[str, Any]) -> None:
    watch: Watch = tabs["generate"].watch
    job = engine.submit(ASKED[0]).id
    running = watch.updates(job, Snapshot(job, 3, "running", "Denoising", 2, 10))
    assert running[watch.stop] == gr.update(value="Stop", interactive=True)
    stopping = watch.updates(job, Snapshot(job, 4, "running", "Stopping", 2, 10))
    assert stopping[watch.stop] == gr.update(value="Stopping…", interactive=False)
    engine.cancel(job)
    over = watch.updates(job, engine.snapshot(job))
    assert over[watch.stop] == gr.update(value="Stop", interactive=False) and "Stopped" in over[watch.progress]["value"]


def test_what_a_failed_job_may_be_tried_with_becomes_buttons(engine: Engine, tabs: dict[str, Any]) -> None:
    from hasten.ui.engine.trouble import Trouble

    watch: Watch = tabs["generate"].watch
    request = read({"kind": "generate", "model": "tiny-video", "prompt": "a", "frames": 33, "recipe": "balanced"})
    trouble = Trouble.of(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), request, "Decoding")
    job = engine.jobs.submit(request)
    with engine._database.transaction() as table:
        table.execute("UPDATE jobs SET state = 'failed', error = ? WHERE id = ?", (json.dumps(trouble.to_dict()), job.id))
    updates = watch.updates(job.id, engine.snapshot(job.id))
    labels = [updates[button].get("value") for button in watch.remedies]
    assert labels[:2] == ["Without previews", "Decoded in tiles"] and labels[2].endswith("frames instead of 33")
    assert updates[watch.row]["visible"] and "Memory ran out while decoding" in updates[watch.progress]["value"]
    for asked in updates[watch.asked]:
        read(asked)


def test_an_interrupted_job_may_be_tried_again(engine: Engine) -> None:
    job = engine.submit(ASKED[4])
    with engine._database.transaction() as table:
        table.execute("UPDATE jobs SET state = 'interrupted' WHERE id = ?", (job.id,))
    remedies = engine.remedies(engine.job(job.id))
    sentence = failure(engine.job(job.id), remedies)
    assert "ended in the middle" in sentence and [remedy["label"] for remedy in remedies] == ["Try again"]
    assert read(remedies[0]["request"]) == job.request


def test_errors_are_told_in_their_own_words() -> None:
    def refuse() -> None:
        raise RequestError("steps", 0, "1 to 200")

    with pytest.raises(gr.Error, match="steps: got 0; allowed: 1 to 200"):
        in_words(refuse)()


# --- what is shown ------------------------------------------------------------------------------------------


def test_words_of_people_stay_text() -> None:
    row = {"recipe": EVIL, "speedup": 2.0, "seconds": 1.0, "psnr_median": 30.0, "computed_fraction": 0.5}
    html = "".join([
        compared({"runs": [{"row": row}, {"row": row}], "noise_floor": 10.0}, EVIL), said(EVIL), picture("/file", "image", EVIL, EVIL, file=EVIL),
    ])  # fmt: skip
    assert "<img src=x" not in html and html.count("&lt;img src=x") >= 5
    card = {"bytes": 5, "where": "folder", "ready": True, "licence": EVIL, "fit": EVIL, "fits": None, "note": ""}
    assert "<img" not in model_words(card)


def test_files_have_urls_of_this_server_only(tmp_path: Path) -> None:
    from hasten.ui.views.markup import source

    assert source(url(tmp_path / "a b%.png")).endswith("/a%20b%25.png") and url(tmp_path).startswith("/gradio_api/file=")
    assert source(data_url(b"\x89PNG")).startswith("data:image/png;base64,")
    assert size_of(tmp_path / "none.png") == (16, 9)


def test_few_calls_are_not_called_all_of_the_work() -> None:
    rows = [{"recipe": "plain", "nfe": 100.0, "computed_fraction": 1.0}, {"recipe": "fastest", "nfe": 1.0, "computed_fraction": 1.0, "speedup": 40.0}]
    assert "1 % of the work was done" in compared({"runs": [{"row": row} for row in rows]}, "a seven")
    assert [_said(row, rows[0]).get("skipped") for row in rows] == [None, "all but 1 call instead of 100"]


def test_standing_and_recipes_in_words() -> None:
    assert standing(Snapshot("a", 1, "running", "Stopping", 1, 2))["state"] == "stopping"
    assert standing(Snapshot("a", 1, "failed", "Failed", note="Because."))["message"] == "Because."
    assert recipe_words({"recipe": "a\nb"}) == "edited recipe" and recipe_words({"recipes": ["balanced", "fast"]}) == "balanced, fast"


def test_points_of_a_study_become_rows_and_ask_for_comparisons(tabs: dict[str, Any]) -> None:
    tab = tabs["tune"]
    trials = [{"number": 3, "name": "x", "speedup": 2.0, "worst": 31.0, "kept": True, "note": ""}, {"number": 4, "name": "y", "speedup": None, "worst": None}]
    assert [row["number"] for row in tune_rows(trials)] == [3]
    asked = tab.compared({"model": "tiny-video", "prompt": "a", "recipe": edited(), "steps": 10})
    assert read(asked).kind == "compare" and asked["steps"] == 10
    with pytest.raises(HastenError, match="Choose a point first"):
        tab.compared({})


def test_the_history_acts_only_on_what_is_there(engine: Engine) -> None:
    with gr.Blocks():
        tab = HistoryTab(engine)
    job = engine.submit(ASKED[4]).id
    tab._acting(engine.cancel)(job)
    assert engine.job(job).state == "cancelled"
    tab._acting(engine.remove)(job)
    for bad in (job, "", "../x"):
        with pytest.raises(HastenError):
            tab._acting(engine.remove)(bad)
    with pytest.raises(HastenError, match="Choose a result"):
        tab.chosen("")
    with pytest.raises(RequestError):
        tab.from_file(b"\x80\x04pickle")
    assert tab.from_file(json.dumps({"kind": "text", "model": "tiny-dllm", "prompt": "a"}).encode())["kind"] == "text"


# --- the whole ----------------------------------------------------------------------------------------------


def test_the_first_comparison_is_asked_for_once(tmp_path: Path) -> None:
    read(FIRST)
    engine = Engine(tmp_path)
    job = begin(engine)
    assert job is not None and begin(engine) is None
    engine.cancel(job)
    assert begin(engine) is not None
    engine.close()


def test_a_page_is_built_and_its_browser_memory_outlives_a_restart(engine: Engine) -> None:
    page = build(engine)
    names = {each.api_name for each in page.fns.values() if each.api_visibility == "public"}
    assert names == {"generate", "compare", "text", "decode", "tune", "status", "result", "cancel", "queue", "pause", "resume", "move"}
    file = engine.place.folder / "page.secret"
    assert _secret(file) == _secret(file) and stat.S_IMODE(file.stat().st_mode) == 0o600


def test_no_event_of_the_page_uses_gradios_cancel_or_its_queue_as_a_lock(engine: Engine) -> None:
    page = build(engine)
    for each in page.fns.values():
        assert not each.cancels
        assert not each.queue or each.concurrency_limit is None, each.name


def test_only_results_are_served_and_nothing_is_measured(engine: Engine) -> None:
    options = launch_options(engine)
    assert options["allowed_paths"] == [str(engine.place.outputs)]
    assert (options["run_history"], options["enable_monitoring"], options["share"], options["ssr_mode"]) == (False, False, False, False)
    for word in ("http://", "https://", "@import", "url("):
        assert word not in options["css"].replace("http://www.w3.org", "") and word not in options["head"].replace("http://www.w3.org", "")
