"""What a training here has made is a recipe everywhere: it runs in its few calls, and no path of it is ever told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from hasten.errors import HastenError, RecipeError
from hasten.pipelines.lora import find
from hasten.pipelines.tune.space import Space
from hasten.recipe import Recipe, from_yaml
from hasten.ui.engine import Engine, RequestError, read
from hasten.ui.engine.desk import Desk
from hasten.ui.engine.recipes import portable, recipe_of
from hasten.ui.engine.report import Report
from hasten.ui.engine.work.study import folder_of
from hasten.ui.engine.work.train import _kept, _Watch
from hasten.ui.engine.work.tune import _students
from hasten.ui.page.results import Shelf, generated, recipe_words
from hasten.ui.page.settings import as_yaml, recipe_choices
from hasten.ui.page.tabs.compare import CompareTab
from hasten.ui.page.tabs.generate import GenerateTab
from hasten.ui.page.tabs.train import WHOLE, TrainTab
from hasten.ui.page.tabs.tune import TuneTab
from tests.ui.engines import IMAGE, done
from tests.ui.students import TRAINED, trained

TUNE = {"kind": "tune", "model": "tiny-image", "prompts": ["a one", "a two", "a three", "a four"]}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tmp_path_factory.mktemp("home")) as found:
        yield found


@pytest.fixture(scope="module")
def student(engine: Engine) -> str:
    return trained(engine)


def test_it_draws_in_its_own_calls_whatever_steps_are_asked(engine: Engine, student: str) -> None:
    job = done(engine, IMAGE | {"recipe": student})
    assert (job.result["row"]["nfe"], job.result["steps"], job.result["usual_steps"]) == (1, 1, IMAGE["steps"])
    trace = json.loads(engine.outputs.file(job.result["output"], job.result["trace"]).read_text())
    assert trace["nfe"] == 1
    told = generated(Shelf(engine).result(job.result["output"]))
    assert "1 instead of 6" in told and "work done" not in told, "all of one call is not all of the work"


def test_its_recipe_is_edited_without_any_path(engine: Engine, student: str) -> None:
    text = as_yaml(engine, student)
    assert f"path: {student}" in text and str(engine.place.home) not in text
    assert done(engine, IMAGE | {"recipe": text}).result["row"]["nfe"] == 1
    with pytest.raises(RequestError, match="names a file"):
        read(IMAGE | {"recipe": text.replace(student, str(engine.place.outputs))})


def test_a_comparison_names_it_and_counts_its_calls(engine: Engine, student: str) -> None:
    plain, few = done(engine, {"kind": "compare", "model": "tiny-image", "prompt": "a three", "steps": 6, "recipes": [student]}).result["runs"]
    assert few["recipe"] == f"student {student[8:14]}" and few["row"]["nfe"] == 1 < plain["row"]["nfe"]
    assert recipe_words({"recipes": [student]}) == few["recipe"]


def test_what_is_exported_finds_it_from_anywhere(engine: Engine, student: str) -> None:
    adapter = from_yaml(engine.yaml(IMAGE | {"recipe": student})).adapter
    assert adapter is not None and find(adapter).is_file()
    assert str(find(adapter)) in engine.python(IMAGE | {"recipe": as_yaml(engine, student)})


def test_a_study_tries_it_and_tells_no_path(engine: Engine, student: str) -> None:
    desk = Desk(engine.place)
    [file] = _students(read(TUNE | {"students": [student]}), desk)  # type: ignore[arg-type]
    space = Space(8, True, adapters=(file,))
    assert "student" in space.families
    known = engine.outputs.trained()
    text = portable(space._student({"student": file}), known).to_yaml()
    assert f"path: {student}" in text and find(recipe_of(text, known).adapter).is_file()  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="no student"):
        _students(read(TUNE | {"students": ["trained:" + "0" * 16]}), desk)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="students"):
        read(TUNE | {"students": ["../../etc/passwd"]})


def test_studies_of_an_older_hasten_are_gone_on_with(engine: Engine, student: str) -> None:
    place = engine.place
    assert folder_of(place, read(TUNE | {"students": []})) == folder_of(place, read(TUNE))
    assert folder_of(place, read(TUNE | {"students": [student]})) != folder_of(place, read(TUNE))


def test_a_whole_network_is_no_recipe(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "recipe.yaml").write_text(Recipe(name="whole", models=("tiny-image",)).to_yaml())
    report = Report("job", lambda snapshot: None, lambda: False)
    found = _kept(read(TRAINED), Desk(engine.place), tmp_path, _Watch(tmp_path, report, 2, 1.0), True)  # type: ignore[arg-type]
    assert found["student"] and found["recipe"] is None, "on the model itself its sampler alone would draw nonsense"
    assert found["output"] not in engine.outputs.trained()
    with gr.Blocks():
        tab = TrainTab(engine, gr.BrowserState({}))
    assert WHOLE in tab.shown(Shelf(engine).result(found["output"]))[tab.note]


def test_a_finished_training_fills_the_other_tabs(engine: Engine, student: str) -> None:
    with gr.Blocks():
        train, generate, compare, tune = (tab(engine, gr.BrowserState({})) for tab in (TrainTab, GenerateTab, CompareTab, TuneTab))
    late = trained(engine, "tiny-image-4-calls")  # when the page was there already
    told = train.shown(Shelf(engine).result(late.partition(":")[2]))[train.student]
    filled = generate.filled(train.used(told))
    assert filled[generate.recipe]["value"] == late and late in values(filled[generate.recipe])
    assert filled[generate.settings.picker.model] == "tiny-image" and filled[generate.settings.lora] == ""
    assert "as few calls" in filled[generate.speed.words]
    assert compare.filled(train.compared(told))[compare.more]["value"] == [late]
    studied = tune.filled(train.studied(told, tune.examples("tiny-image")))
    assert studied[tune.students]["value"] == [late] and studied[tune.students]["visible"]
    assert [name for _, name in recipe_choices(engine, "video") if name.startswith("trained:")] == [late, student], "newest first"
    with pytest.raises(HastenError, match="not here any more"):
        tune.filled(TUNE | {"students": ["trained:" + "0" * 16]})


def values(update: dict[str, Any]) -> list[str]:
    return [value for _, value in update["choices"]]
