"""The page's tabs without a browser: what buttons ask for, what is filled in again, and which controls a model has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
import pytest

from hasten.ui.engine import Engine, RequestError, Snapshot, read
from hasten.ui.page.app import asked_again
from hasten.ui.page.drafting import LOSSY
from hasten.ui.page.drafting import choices as drafting_choices
from hasten.ui.page.settings import Speed, checked, recipe_choices
from hasten.ui.page.speed import PICTURES, TEXTS, levels, place_of
from hasten.ui.page.tabs.text import PROMPT
from tests.ui.tabs import ASKED, EVIL, PLACE, all_tabs, asks, edited, read_json, standing_engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with standing_engine(tmp_path_factory) as made:
        yield made


@pytest.fixture(scope="module")
def tabs(engine: Engine) -> dict[str, Any]:
    return all_tabs(engine)


# --- what is asked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: f"{asked['kind']}-{asked['model']}")
def test_settings_that_are_restored_ask_for_the_same(tabs: dict[str, Any], asked: dict[str, Any]) -> None:
    tab = tabs[PLACE.get(asked["kind"], asked["kind"])]
    if "\n" in asked.get("recipe", ""):
        asked = {**asked, "recipe": edited()}
    whole = read(asked)
    updates = tab.filled(read_json(whole))
    assert set(updates) <= set(tab.fills)
    assert read(asks(tab, updates)) == whole


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: f"{asked['kind']}-{asked['model']}")
def test_a_page_that_is_opened_again_asks_for_the_same(engine: Engine, tabs: dict[str, Any], asked: dict[str, Any]) -> None:
    tab = tabs[PLACE.get(asked["kind"], asked["kind"])]
    if "\n" in asked.get("recipe", ""):
        asked = {**asked, "recipe": edited()}
    job = engine.submit(asked)
    updates = asked_again(tab, job.id)
    assert set(updates) <= set(tab.fills)
    if len(asked.get("recipes", ())) > 1:
        assert updates == {}, "the slider would be without a meaning"
    else:
        assert read(asks(tab, updates)) == job.request


def test_controls_stay_where_a_job_says_nothing_of_them(engine: Engine, tabs: dict[str, Any]) -> None:
    gone = engine.jobs.submit(read(ASKED[4] | {"model": "folder:gone"})).id  # it was there when it was asked
    other = engine.submit(ASKED[7]).id
    for job in ("", gone, other, "../../etc"):
        assert asked_again(tabs["text"], job) == {}


def test_a_page_as_it_opens_asks_for_what_is_allowed(tabs: dict[str, Any]) -> None:
    for name, tab in tabs.items():
        assert read(asks(tab, {})).kind == name


def test_an_edited_recipe_counts_before_the_chosen_one(tabs: dict[str, Any]) -> None:
    tab = tabs["generate"]
    assert asks(tab, {tab.edited: edited(), tab.recipe: "fast"})["recipe"] == edited()
    assert asks(tab, {tab.edited: "  ", tab.recipe: "fast"})["recipe"] == "fast"


def test_boxes_for_numbers_take_nothing_or_numbers(tabs: dict[str, Any]) -> None:
    tab = tabs["generate"]
    assert "steps" not in asks(tab, {tab.settings.numbers["steps"]: ""})
    assert asks(tab, {tab.settings.numbers["steps"]: " 12 "})["steps"] == 12
    with pytest.raises(RequestError, match="steps: got 'many'"):
        asks(tab, {tab.settings.numbers["steps"]: "many"})


def test_an_edited_recipe_is_checked_while_it_is_typed(engine: Engine) -> None:
    assert "is used" in checked(engine, edited())
    assert "hp-warning" in checked(engine, edited().replace("reuse:", "reusee:")) and "reusee" in checked(engine, edited().replace("reuse:", "reusee:"))
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
        updates = tab.other_model(model, "look-up", PROMPT)
        assert updates[tab.drafting.column]["visible"] is causal and updates[tab.slide]["visible"] is not causal
        assert updates[tab.prompt] and tab.prompt not in tab.other_model(model, "look-up", "my own words")
    assert {"text", "language"} == {tab.picker.card(name).kind for _, name in tab.picker.model.choices}
    asked = asks(tab, {tab.picker.model: "tiny-lm"})
    assert (asked["kind"], asked["recipe"]) == ("decode", "look-up") and "temperature" not in asked
    assert asks(tab, {tab.picker.model: "tiny-lm", tab.drafting.every: True})["recipe"] == "look-up:every=true"
    assert asks(tab, {tab.picker.model: "tiny-lm", tab.drafting.every: True, tab.drafting.recipe: "plain"})["recipe"] == "plain"
    with pytest.raises(RequestError, match="temperature: got 'warm'"):
        asks(tab, {tab.picker.model: "tiny-lm", tab.drafting.temperature: "warm"})


def test_what_is_said_of_guesses_follows_from_the_recipe(tabs: dict[str, Any]) -> None:
    drafting = tabs["text"].drafting
    lossy = "{draft: {kind: look-up}, verify: {kind: typical, allow_lossy: true}}"
    said = {recipe: drafting.told(recipe) for recipe in ("look-up", "look-up:every=true", "diffuspec", "plain", lossy, "no such", "")}
    able = {recipe: each[drafting.every]["interactive"] for recipe, each in said.items()}
    assert able == dict.fromkeys(said, False) | {"look-up": True, "look-up:every=true": True}
    assert said["diffuspec"][drafting.every]["value"] is False and "value" not in said["look-up"][drafting.every]
    assert LOSSY in said[lossy][drafting.words] and "no such" in said["no such"][drafting.words]
    for recipe in ("look-up", "diffuspec", "plain", ""):
        assert "warning" not in said[recipe][drafting.words]


def test_an_empty_prompt_is_answered_with_an_example_of_its_kind() -> None:
    for asked, example in ((ASKED[0], "a seven"), (ASKED[4], "sort:"), (ASKED[5], "def ")):
        with pytest.raises(RequestError, match=f"for example '{example}"):
            read(asked | {"prompt": " "})
    read(ASKED[5] | {"prompt": "a " * 10_000})
    with pytest.raises(RequestError, match="characters"):
        read(ASKED[0] | {"prompt": "a " * 10_000})


def test_every_way_of_guessing_that_is_offered_may_be_asked_for(engine: Engine) -> None:
    names = [name for _, name in drafting_choices(engine, "tiny-lm")]
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
