"""The page's parts without a browser: what buttons ask for, what is filled in again, who follows what, and what stays text."""

from __future__ import annotations

import asyncio
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from hasten.errors import HastenError
from hasten.ui.engine import Engine, RequestError, Snapshot, read, to_json
from hasten.ui.page import build, launch_options
from hasten.ui.page.app import _secret
from hasten.ui.page.drafting import choices as drafting_choices
from hasten.ui.page.first import FIRST, begin
from hasten.ui.page.results import _said, compared, data_url, failure, recipe_words, size_of, standing, url
from hasten.ui.page.sentences import model_words, picture, said
from hasten.ui.page.settings import Speed, checked, recipe_choices
from hasten.ui.page.speed import PICTURES, TEXTS, levels, place_of
from hasten.ui.page.tabs.compare import CompareTab
from hasten.ui.page.tabs.generate import GenerateTab
from hasten.ui.page.tabs.history import HistoryTab
from hasten.ui.page.tabs.text import TextTab
from hasten.ui.page.tabs.train import TrainTab
from hasten.ui.page.tabs.tune import TuneTab
from hasten.ui.page.tabs.tune import rows as tune_rows
from hasten.ui.page.watch import Watch, in_words, snapshots

EVIL = "<img src=x onerror=window.PWN=1>${window.PWN=1}"
ASKED: list[dict[str, Any]] = [
    {"kind": "generate", "model": "tiny-video", "prompt": EVIL, "seed": 7, "steps": 12, "guidance": 2.5, "recipe": "easycache:limit=0.1"},
    {"kind": "generate", "model": "tiny-image", "prompt": "a three", "recipe": "\n", "preview": False},
    {"kind": "compare", "model": "tiny-video", "prompt": "a seven", "recipes": ["balanced", "fastest"], "frames": 9, "negative": "blur"},
    {"kind": "compare", "model": "tiny-image", "prompt": "a seven", "recipes": ["fast:student=false"], "repeats": 3, "decoding": "tiles"},
    {"kind": "text", "model": "tiny-dllm", "prompt": "sort: b a =", "length": 12, "recipe": "text-fast"},
    {"kind": "decode", "model": "tiny-lm", "prompt": EVIL, "recipe": "look-up:every=true", "length": 12, "temperature": 0.8, "top_k": 5},
    {"kind": "decode", "model": "tiny-draft", "prompt": "a", "recipe": "dyspec:nodes=4", "seed": 3},
    {"kind": "tune", "model": "tiny-video", "prompts": ["a", "b", "c", "d"], "budget": "psnr>=34", "seconds": 33.0, "steps": 10},
    {"kind": "train", "method": "pairs", "model": "tiny-image", "prompts": ["a three"], "minutes": 2.0, "settings": {"train.steps": 5, "train.lr": 0.001}},
]
PLACE = {"decode": "text"}
"""Kinds that are asked for in a tab of another name."""

TABS = {"generate": GenerateTab, "compare": CompareTab, "text": TextTab, "tune": TuneTab, "train": TrainTab}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One that is not started: its queue stands still."""
    made = Engine(tmp_path_factory.mktemp("home"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def tabs(engine: Engine) -> dict[str, Any]:
    with gr.Blocks():
        return {name: tab(engine, gr.BrowserState({})) for name, tab in TABS.items()}


def asks(tab: Any, updates: dict[Any, Any]) -> dict[str, Any]:
    """What the tab's main button asks for when its controls are as `updates` leave them."""

    def value(component: Any) -> Any:
        found = updates.get(component, component.value)
        return found.get("value", component.value) if isinstance(found, dict) else found

    if isinstance(tab, GenerateTab):
        inputs = [tab.recipe, tab.edited, *tab.settings.inputs]
    elif isinstance(tab, CompareTab):
        inputs = [tab.speed.slider, tab.more, tab.repeats, *tab.settings.inputs]
    elif isinstance(tab, TextTab):
        inputs = tab.inputs
    elif isinstance(tab, TuneTab):
        inputs = [tab.picker.model, tab.prompts, tab.budget, tab.seconds, tab.steps, tab.students]
    else:
        inputs = [tab.picker.model, tab.method, tab.prompts, tab.minutes, *tab._settings]
    found: dict[str, Any] = tab.request(*(value(component) for component in inputs))
    return found


# --- what is asked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: f"{asked['kind']}-{asked['model']}")
def test_settings_that_are_restored_ask_for_the_same(tabs: dict[str, Any], asked: dict[str, Any]) -> None:
    tab = tabs[PLACE.get(asked["kind"], asked["kind"])]
    if "\n" in asked.get("recipe", ""):
        asked = {**asked, "recipe": _yaml()}
    whole = read(asked)
    updates = tab.filled(read_json(whole))
    assert set(updates) <= set(tab.fills)
    assert read(asks(tab, updates)) == whole


def _yaml() -> str:
    from hasten.pipelines.recipes import recipe

    return recipe("easycache").to_yaml()


def read_json(request: Any) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(to_json(request))
    return found


def test_a_page_as_it_opens_asks_for_what_is_allowed(tabs: dict[str, Any]) -> None:
    for name, tab in tabs.items():
        assert read(asks(tab, {})).kind == name


def test_an_edited_recipe_counts_before_the_chosen_one(tabs: dict[str, Any]) -> None:
    tab = tabs["generate"]
    assert asks(tab, {tab.edited: _yaml(), tab.recipe: "fast"})["recipe"] == _yaml()
    assert asks(tab, {tab.edited: "  ", tab.recipe: "fast"})["recipe"] == "fast"


def test_boxes_for_numbers_take_nothing_or_numbers(tabs: dict[str, Any]) -> None:
    tab = tabs["generate"]
    assert "steps" not in asks(tab, {tab.settings.numbers["steps"]: ""})
    assert asks(tab, {tab.settings.numbers["steps"]: " 12 "})["steps"] == 12
    with pytest.raises(RequestError, match="steps: got 'many'"):
        asks(tab, {tab.settings.numbers["steps"]: "many"})


def test_an_edited_recipe_is_checked_while_it_is_typed(engine: Engine) -> None:
    assert "is used" in checked(engine, _yaml())
    assert "hp-warning" in checked(engine, _yaml().replace("reuse:", "reusee:")) and "reusee" in checked(engine, _yaml().replace("reuse:", "reusee:"))
    assert "hp-warning" in checked(engine, f"{EVIL}: 1\n") and "<img" not in checked(engine, f"{EVIL}: 1\n")


# --- speed --------------------------------------------------------------------------------------------------


def test_the_slider_has_students_only_where_there_are_some() -> None:
    assert [level.recipe for level in levels("tiny-video", "video")][-1] == "fastest"
    assert {level.recipe for level in levels("folder:mine", "video")} == {"plain", "auto:psnr=40", "balanced", "fast:student=false"}
    assert levels("tiny-dllm", "text") == TEXTS


def test_every_level_is_a_recipe() -> None:
    from hasten.ui.engine.recipes import check

    for level in (*PICTURES, *TEXTS):
        check(level.recipe)
    assert place_of("balanced", PICTURES) == 2 and place_of("easycache", PICTURES) is None


def test_a_comparison_never_names_plain(engine: Engine) -> None:
    with gr.Blocks():
        speed = Speed(engine, "tiny-video", "video", lowest=1)
    assert speed.recipe(0, "tiny-video") == "auto:psnr=40"
    assert speed.recipe(5, "folder:mine") == "fast:student=false"


def test_all_choices_are_recipes_of_their_kind(engine: Engine) -> None:
    names = [name for _, name in recipe_choices(engine, "text")]
    assert "text-balanced" in names and "balanced" not in names and "fast-dllm" in names
    assert "easycache" in [name for _, name in recipe_choices(engine, "video")]


def test_the_controls_of_a_model_are_those_it_has(tabs: dict[str, Any]) -> None:
    tab = tabs["text"]
    for model, causal in (("tiny-lm", True), ("tiny-dllm", False)):
        updates = tab.other_model(model)
        assert updates[tab.drafting.column]["visible"] is causal and updates[tab.slide]["visible"] is not causal
    assert {"text", "language"} == {tab.picker.card(name).kind for _, name in tab.picker.model.choices}
    asked = asks(tab, {tab.picker.model: "tiny-lm"})
    assert (asked["kind"], asked["recipe"]) == ("decode", "look-up") and "temperature" not in asked
    assert asks(tab, {tab.picker.model: "tiny-lm", tab.drafting.every: True})["recipe"] == "look-up:every=true"
    assert asks(tab, {tab.picker.model: "tiny-lm", tab.drafting.every: True, tab.drafting.recipe: "plain"})["recipe"] == "plain"
    with pytest.raises(RequestError, match="temperature: got 'warm'"):
        asks(tab, {tab.picker.model: "tiny-lm", tab.drafting.temperature: "warm"})


def test_every_way_of_guessing_that_is_offered_may_be_asked_for(engine: Engine) -> None:
    names = [name for _, name in drafting_choices(engine)]
    assert names[0] == "look-up" and {"dyspec", "plain", "jacobi", "triforce"} <= set(names) and not {"medusa", "h2o"} & set(names)
    for name in names:
        read({"kind": "decode", "model": "tiny-lm", "prompt": "a", "recipe": name})


def test_a_text_is_drawn_by_its_kind(tabs: dict[str, Any]) -> None:
    tab = tabs["text"]
    token = {"text": EVIL, "by": "look-up", "round": 1, "lead": None, "given": False}
    running = tab.running(Snapshot("a", 1, "running", "Writing", data={"tokens": [token], "rounds": [{"drafted": 1, "accepted": 1, "written": 2}]}))
    assert 'data-view="decoding"' in running[tab.canvas] and "<img" not in running[tab.canvas]
    found = {"kind": "decode", "text": EVIL, "tokens": [token], "rounds": [], "row": {"recipe": "look-up"}, "exact": {}, "warnings": []}
    assert 'data-view="decoding"' in tab.shown(found)[tab.canvas]
    assert set(tab.shown(found)) == set(tab.shown({"kind": "text", "text": "", "tokens": [], "row": {}}))


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
        table.execute("UPDATE jobs SET state = 'failed', error = ? WHERE id = ?", (_json(trouble.to_dict()), job.id))
    updates = watch.updates(job.id, engine.snapshot(job.id))
    labels = [updates[button].get("value") for button in watch.remedies]
    assert labels[:2] == ["Without previews", "Decoded in tiles"] and labels[2].endswith("frames instead of 33")
    assert updates[watch.row]["visible"] and "Memory ran out while decoding" in updates[watch.progress]["value"]
    for asked in updates[watch.asked]:
        read(asked)


def _json(value: Any) -> str:
    import json

    return json.dumps(value)


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
    asked = tab.compared({"model": "tiny-video", "prompt": "a", "recipe": _yaml(), "steps": 10})
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
    assert tab.from_file(_json({"kind": "text", "model": "tiny-dllm", "prompt": "a"}).encode())["kind"] == "text"


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
