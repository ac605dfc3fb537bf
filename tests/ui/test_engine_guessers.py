"""Students that guess tokens: a training here makes them, the list of who guesses has them for their model, and nothing is their path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
import pytest

from hasten.errors import HastenError, UsageError
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.recipe import from_yaml
from hasten.stamp import Stamp
from hasten.ui.engine import Engine, read
from hasten.ui.page.drafting import choices
from hasten.ui.page.results import Shelf
from hasten.ui.page.settings import as_yaml, students
from hasten.ui.page.tabs.text import TextTab
from hasten.ui.page.tabs.train import TrainTab
from tests.ui.engines import done
from tests.ui.tabs import asks

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")

SETTINGS = {"train.steps": 2, "train.batch": 2, "data.call.max_new_tokens": 8}
TRAIN = {"kind": "train", "model": "tiny-lm", "prompts": ["copy: a b c d =", "sort: b a ="], "minutes": 5.0, "settings": SETTINGS}
DECODE = {"kind": "decode", "model": "tiny-lm", "prompt": "a b c d a b c d a b", "length": 12}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tmp_path_factory.mktemp("home"), offline=True, device="cpu") as found:
        yield found


@pytest.fixture(scope="module")
def heads(engine: Engine) -> str:
    return str(done(engine, TRAIN | {"method": "medusa"}).result["recipe"])


@pytest.mark.parametrize(("method", "kind"), [("medusa", "medusa"), ("mtp", "masks"), ("ppd", "prompt-tokens")])
def test_what_a_training_leaves_guesses_for_its_model(engine: Engine, method: str, kind: str) -> None:
    made = done(engine, TRAIN | {"method": method}).result
    assert made["drafts"] and made["recipe"] == f"trained:{made['output']}"
    text = as_yaml(engine, made["recipe"])
    assert f"path: {made['recipe']}" in text and str(engine.place.home) not in text
    steady = text[: text.index("pace:")] + "pace:\n  kind: steady\n" if "pace:" in text else text + "pace:\n  kind: steady\n"
    for recipe in (made["recipe"], steady):
        found = done(engine, DECODE | {"recipe": recipe}).result
        assert found["exact"]["verdict"] in ("same", "plain"), found["exact"]
    assert set(found["drafters"]) == {kind}, "the steady one guesses in every forward"


def test_it_is_listed_for_the_model_that_it_fits_and_for_no_other(engine: Engine, heads: str) -> None:
    label = {recipe: label for label, recipe in choices(engine, "tiny-lm")}[heads]
    assert "Medusa" in label and "trained:" not in label
    assert heads not in [recipe for _, recipe in choices(engine, "tiny-draft")]
    assert heads not in [recipe for _, recipe in students(engine)], "it draws no pictures"


def test_its_controls_are_filled_and_another_model_does_not_keep_it(engine: Engine, heads: str) -> None:
    with gr.Blocks():
        tab = TextTab(engine, gr.BrowserState({}))
    updates = tab.filled(DECODE | {"recipe": heads})
    assert heads in [recipe for _, recipe in updates[tab.drafting.recipe]["choices"]]
    assert asks(tab, updates)["recipe"] == heads
    assert tab.other_model("tiny-draft", heads, "")[tab.drafting.recipe]["value"] == "look-up"
    assert "value" not in tab.other_model("tiny-lm", heads, "")[tab.drafting.recipe]
    with pytest.raises(UsageError, match="not here any more"):
        tab.filled(DECODE | {"recipe": "trained:" + "0" * 16})


def test_what_tuning_kept_is_offered_for_its_model(engine: Engine) -> None:
    def keep(name: str, recipe: str, **stamped: Any) -> None:
        stamp = Stamp(**{"model": "tiny-lm", "weights": "0" * 16, "budget": "lossless", "speedup": 1.4, "date": "2026-01-02"} | stamped)
        made = find_recipe(recipe).model_copy(update={"name": "tuned", "tuned": stamp})
        (engine.place.home / "tuned").mkdir(exist_ok=True)
        (engine.place.home / "tuned" / f"{name}.yaml").write_text(made.to_yaml())

    before = choices(engine, "tiny-lm")
    keep("slower", "look-up:nodes=4")
    keep("fastest", "look-up:nodes=8", speedup=1.9)
    keep("other-model", "look-up:nodes=9", model="tiny-draft")
    keep("other-budget", "look-up:nodes=10", budget="exact_match>=0.9")
    keep("with-a-file", "medusa:path=/etc")
    (engine.place.home / "tuned" / "broken.yaml").write_text("draft: [\n")
    new = [each for each in choices(engine, "tiny-lm") if each not in before]
    assert ["1.9" in label for label, _ in new] == [True, False], "the fastest first"
    found = done(engine, DECODE | {"recipe": new[0][1]}).result
    assert found["row"]["recipe"] == "tuned" and found["exact"]["verdict"] in ("same", "plain")
    with gr.Blocks():
        tab = TextTab(engine, gr.BrowserState({}))
    updates = tab.filled(DECODE | {"recipe": new[0][1]})
    assert updates[tab.drafting.recipe]["value"] == new[0][1], "its label is shown, not its text"


def test_the_train_tab_says_where_it_is_used(engine: Engine, heads: str) -> None:
    with gr.Blocks():
        tab = TrainTab(engine, gr.BrowserState({}))
    shown: dict[Any, Any] = tab.shown(Shelf(engine).result(heads.partition(":")[2]))
    assert "Text" in shown[tab.note] and shown[tab.next]["visible"] is False
    with pytest.raises(HastenError, match="no student"):
        tab.used(shown[tab.student])


def test_the_train_tab_has_the_methods_of_a_models_kind(engine: Engine) -> None:
    with gr.Blocks():
        tab = TrainTab(engine, gr.BrowserState({}))
    causal = tab.other_model("tiny-lm", "pairs")[tab.method]
    assert {name for _, name in causal["choices"]} == {"medusa", "ppd", "mtp"} and causal["value"] == "medusa"
    assert tab.other_model("tiny-lm", "ppd")[tab.method]["value"] == "ppd"
    assert tab.other_model("tiny-image", "ppd")[tab.method]["value"] == "pairs"
    updates = tab.filled(TRAIN | {"method": "mtp", "settings": {"train.steps": 2}})
    assert read(asks(tab, updates)) == read(TRAIN | {"method": "mtp", "settings": {"train.steps": 2}})


def test_what_is_exported_finds_it_from_anywhere(engine: Engine, heads: str) -> None:
    draft: Any = from_yaml(engine.yaml(DECODE | {"recipe": heads})).draft
    assert draft.read(), "its file is there, whatever the folder"
    program = engine.python(DECODE | {"recipe": heads})
    assert str(engine.outputs.trained()[heads.partition(":")[2]]) in program
