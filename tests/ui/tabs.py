"""Tabs of a page without a browser: requests of every kind, and what a tab asks for when its controls stand as they are said to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
import pytest

from hasten.ui.engine import Engine, to_json
from hasten.ui.page.tabs.compare import CompareTab
from hasten.ui.page.tabs.generate import GenerateTab
from hasten.ui.page.tabs.text import TextTab
from hasten.ui.page.tabs.train import TrainTab
from hasten.ui.page.tabs.tune import TuneTab

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


@contextmanager
def standing_engine(folders: pytest.TempPathFactory) -> Iterator[Engine]:
    """One that is not started: its queue stands still."""
    made = Engine(folders.mktemp("home"))
    yield made
    made.close()


def all_tabs(engine: Engine) -> dict[str, Any]:
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


def edited() -> str:
    """A recipe as somebody pastes it."""
    from hasten.pipelines.recipes import recipe

    return recipe("easycache").to_yaml()


def read_json(request: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(to_json(request))
    return found
