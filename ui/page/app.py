"""All tabs on one page, and how it is launched."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from hasten.errors import HastenError
from hasten.ui.engine import Engine, to_json
from hasten.ui.page.api import publish
from hasten.ui.page.first import begin
from hasten.ui.page.sentences import heading
from hasten.ui.page.status import Status
from hasten.ui.page.tabs.compare import CompareTab
from hasten.ui.page.tabs.export import ExportTab
from hasten.ui.page.tabs.generate import GenerateTab
from hasten.ui.page.tabs.history import HistoryTab
from hasten.ui.page.tabs.text import TextTab
from hasten.ui.page.tabs.train import TrainTab
from hasten.ui.page.tabs.tune import TuneTab
from hasten.ui.page.watch import HIDDEN, Updates
from hasten.ui.page.ways import Tab, connect
from hasten.ui.views.component import launch_options as views_options
from hasten.ui.views.component import shown

TABS = {"compare": "Compare", "generate": "Generate", "text": "Text", "tune": "Tune", "train": "Train", "history": "History", "export": "Export"}


def build(engine: Engine) -> gr.Blocks:
    """The page of an engine that is started. A home without any comparison gets its first one at once."""
    begin(engine)
    with gr.Blocks(title="hasten", analytics_enabled=False, delete_cache=(300, 3600)) as page:
        kept = gr.BrowserState({}, storage_key="hasten-jobs", secret=_secret(engine.place.folder / "page.secret"))
        shown(heading())
        status = Status(engine)
        with gr.Tabs(selected="compare", elem_id="tabs", overflow_behavior="wrap") as tabs:
            with gr.Tab(TABS["compare"], id="compare") as comparing:
                compare = CompareTab(engine, kept)
            with gr.Tab(TABS["generate"], id="generate") as generating:
                generate = GenerateTab(engine, kept)
            with gr.Tab(TABS["text"], id="text") as writing:
                text = TextTab(engine, kept)
            with gr.Tab(TABS["tune"], id="tune") as tuning:
                tune = TuneTab(engine, kept)
            with gr.Tab(TABS["train"], id="train"):
                train = TrainTab(engine, kept)
            with gr.Tab(TABS["history"], id="history") as opened:
                history = HistoryTab(engine)
            with gr.Tab(TABS["export"], id="export") as exporting:
                export = ExportTab(engine)
        opened.select(history.look, None, history.looks, queue=False, **HIDDEN)
        exporting.select(export.look, [export.which], export.outputs, queue=False, **HIDDEN)
        for chosen, box, now in ((generating, generate.recipe, generate), (comparing, compare.more, compare)):
            chosen.select(_choices(now), None, [box], queue=False, **HIDDEN)
        writing.select(text.drafting.offered, [text.picker.model], [text.drafting.recipe], queue=False, **HIDDEN)
        tuning.select(tune.offered, None, [tune.students], queue=False, **HIDDEN)
        connect(tabs, compare, generate, text, tune, train, history, export)
        _found_again(page, kept, [compare, generate, text, tune, train])
        status.begin(page)
        publish(engine)
    assert isinstance(page, gr.Blocks)
    return page


def launch_options(engine: Engine | None = None) -> dict[str, Any]:
    """Arguments of `launch()` without which the page is neither itself nor safe. engine: whose results it may serve."""
    look = views_options()
    assets = files("hasten.ui.page") / "assets"
    style, frame, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "frame.css", "page.js"))
    return {
        # Gradio rewrites its css to hold below the page's head only; rules about what is around it, and about phones, stand apart.
        "theme": look["theme"], "css": look["css"] + style, "head": look["head"] + f"<style>{frame}</style><script>{script}</script>",
        "ssr_mode": False, "footer_links": ["api"], "run_history": False, "enable_monitoring": False, "state_session_capacity": 64,
        "show_error": True, "share": False, "mcp_server": False, "max_file_size": engine.limits.max_upload if engine is not None else "64mb",
        "allowed_paths": [str(engine.place.outputs)] if engine is not None else [],
    }  # fmt: skip


def _choices(tab: GenerateTab | CompareTab) -> Callable[[], Any]:
    return lambda: gr.update(choices=tab.choices())


def _found_again(page: gr.Blocks, kept: gr.BrowserState, tabs: list[Tab]) -> None:
    """A page that is opened looks at its jobs again, whoever runs them. Its controls stand as those were asked for that this browser
    looked at; to others, who may be typing already, they are left as they are."""

    def found(known: dict[str, str] | None) -> Updates:
        updates: Updates = {}
        for tab in tabs:
            job = tab.watch.found_again(known)
            mine = job == (known or {}).get(tab.watch.kind)
            updates |= {tab.watch.job: job, **(asked_again(tab, job) if mine else {})}
        return updates

    outputs = dict.fromkeys(box for tab in tabs for box in (tab.watch.job, *tab.fills))
    loaded = page.load(found, [kept], list(outputs), queue=False, **HIDDEN)
    for tab in tabs:
        tab.watch.follows(loaded.then)


def asked_again(tab: Tab, job: str) -> Updates:
    """A tab's controls as the request of its job has them. They stay as they are where there is none, where its model or student is
    gone, and for a comparison of several recipes, which would leave the slider without a meaning."""
    if not job:
        return {}
    try:
        asked = json.loads(to_json(tab.engine.job(job).request))
        return tab.filled(asked) if asked["kind"] in tab.watch.kinds and len(asked.get("recipes") or ()) < 2 else {}
    except HastenError:  # what is gone is said where it is used; the result itself is still shown
        return {}


def _secret(file: Path) -> str:
    """Of this home, the same at each start, so that browsers keep their memory of jobs."""
    try:
        return file.read_text(encoding="ascii")
    except OSError:
        made = secrets.token_hex(16)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
            stream.write(made)
        return made
