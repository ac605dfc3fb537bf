"""The ways between tabs: a point that is compared, a result that is opened again, settings that are restored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from hasten.errors import UsageError
from hasten.ui.page.tabs.compare import CompareTab
from hasten.ui.page.tabs.export import ExportTab
from hasten.ui.page.tabs.generate import GenerateTab
from hasten.ui.page.tabs.history import HistoryTab
from hasten.ui.page.tabs.text import TextTab
from hasten.ui.page.tabs.train import TrainTab
from hasten.ui.page.tabs.tune import TuneTab
from hasten.ui.page.watch import TOLD, Updates, in_words

Tab = CompareTab | GenerateTab | TextTab | TuneTab | TrainTab


def connect(
    tabs: gr.Tabs, compare: CompareTab, generate: GenerateTab, text: TextTab, tune: TuneTab, train: TrainTab, history: HistoryTab, export: ExportTab
) -> None:
    """Wire them."""
    kinds: dict[str, Tab] = {"compare": compare, "generate": generate, "text": text, "decode": text, "tune": tune, "train": train}

    def to(name: str) -> dict[Any, Any]:
        return {tabs: gr.update(selected=name)}

    def goes(event: Callable[..., Any], name: str, ask: Callable[..., dict[str, Any]], inputs: list[Any]) -> None:
        """On `event`: fill the tab `name` with the request of `ask`, show it, and start it."""
        tab = kinds[name]

        def fill(*values: Any) -> Updates:
            return {**tab.filled(ask(*values)), **to(name)}

        event(in_words(fill), inputs, [tabs, *tab.fills], **TOLD)
        tab.watch.starts(event, ask, inputs)

    goes(generate.compare.click, "compare", _versus(compare, generate), [generate.output])
    goes(tune.compare.click, "compare", tune.compared, [tune.chosen])
    goes(train.compare.click, "compare", train.compared, [train.student])
    _studying(tabs, train, tune)
    goes(tune.use.click, "generate", tune.used, [tune.chosen])
    goes(train.use.click, "generate", train.used, [train.student])
    _restoring(tabs, kinds, history)
    _opening(tabs, kinds, history)

    def exported(output: str) -> Updates:
        if not output:
            raise UsageError("There is no result yet.")
        return {**dict(zip(export.outputs, export.chosen(output), strict=True)), **to("export")}

    for event, chosen in ((generate.export.click, generate.output), (history.export.click, history.output)):
        event(in_words(exported), [chosen], [tabs, *export.outputs], **TOLD)

    def study(found: dict[str, Any]) -> Updates:
        return exported(found.get("output", ""))

    tune.export.click(in_words(study), [tune.found], [tabs, *export.outputs], **TOLD)


def _studying(tabs: gr.Tabs, train: TrainTab, tune: TuneTab) -> None:
    """A student into the Tune tab. Nothing is started: prompts and time are chosen there."""

    def fill(student: dict[str, Any]) -> Updates:
        gr.Info("The student is chosen. Look at the prompts, then start the study.")
        prompts = tune.examples(train.used(student)["model"])
        return {**tune.filled(train.studied(student, prompts)), tabs: gr.update(selected="tune")}

    train.tune.click(in_words(fill), [train.student], [tabs, *tune.fills], **TOLD)


def _versus(compare: CompareTab, generate: GenerateTab) -> Callable[[str], dict[str, Any]]:
    def asked(output: str) -> dict[str, Any]:
        """The comparison of a generated result with the plain run."""
        if not output:
            raise UsageError("There is no result yet.")
        request = dict(compare.shelf.result(output)["request"])
        recipe = request.pop("recipe", "balanced")
        return {**request, "kind": "compare", "recipes": ["balanced" if recipe == "plain" else recipe]}

    return asked


def _restoring(tabs: gr.Tabs, kinds: dict[str, Tab], history: HistoryTab) -> None:
    """Settings of a result or of a dropped file, into the tab of their kind. Nothing is started."""
    outputs = [tabs, *dict.fromkeys(box for tab in kinds.values() for box in tab.fills)]

    def fill(asked: dict[str, Any]) -> Updates:
        if asked["kind"] not in kinds:
            raise UsageError(f"Settings of a {asked['kind']} cannot be restored.")
        gr.Info("The settings are restored. Nothing runs yet.")
        return {**kinds[asked["kind"]].filled(asked), tabs: gr.update(selected=_tab(asked["kind"]))}

    def of_result(output: str) -> Updates:
        return fill(dict(history.chosen(output)["request"]))

    def of_file(data: bytes | None) -> Updates:
        return fill(history.from_file(data))

    history.restore.click(in_words(of_result), [history.output], outputs, **TOLD)
    history.file.upload(in_words(of_file), [history.file], outputs, **TOLD)


def _tab(kind: str) -> str:
    """Where results of a kind are shown."""
    return "text" if kind == "decode" else kind


def _opening(tabs: gr.Tabs, kinds: dict[str, Tab], history: HistoryTab) -> None:
    """A result of the history, in the tab where it was made."""
    outputs = [tabs, *dict.fromkeys(box for tab in kinds.values() for box in tab.watch.own)]

    def opened(output: str) -> Updates:
        found = history.chosen(output)
        return {**kinds[found["kind"]].shown(found), tabs: gr.update(selected=_tab(found["kind"]))}

    history.open.click(in_words(opened), [history.output], outputs, **TOLD)
