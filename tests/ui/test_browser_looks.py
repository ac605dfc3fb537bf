"""Every tab of `hasten ui`: on a phone, light and dark, for screen readers, and without asking anybody else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.ui.browsers import MARKS, TABS, chromium, show, sync_api, visit
from tests.ui.processes import Page
from tests.ui.processes import page as started

from hasten.ui.engine import Engine

sync_api()
pytestmark = [*MARKS, pytest.mark.timeout(900)]
SMALL = {"kind": "compare", "model": "tiny-video", "prompt": "a seven moving left, slowly", "recipes": ["balanced"], "steps": 6, "preview": False}

KNOWN = {
    "aria-allowed-attr": "Gradio's dropdown: its input has aria-expanded without being a combobox",
    "aria-required-children": "Gradio's tab list holds the menu button of tabs that have no room",
    "aria-input-field-name": "CodeMirror's editor, which Gradio gives no name",
    "scrollable-region-focusable": "CodeMirror's editor scrolls by its own keys",
    "nested-interactive": "Gradio's drop zone is a button around its file input",
    "label": "Gradio's number box beside a slider and its hidden file input",
    "image-redundant-alt": "Gradio's footer",
}
"""Findings of axe that stand in Gradio's own markup -> why. Everything else serious fails."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    home: Path = tmp_path_factory.mktemp("looks") / "home"
    engine = Engine(home)
    engine.submit(SMALL)
    engine.close()
    with started(home) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_of_ours(browser: Any, served: Page, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe: pip install axe-playwright-python")
    found: dict[str, list[str]] = {}
    with visit(browser, served.url, color_scheme=scheme) as tab:
        for name in TABS:
            show(tab, name)
            for each in axe.Axe().run(tab).response["violations"]:
                if each["impact"] in ("serious", "critical") and each["id"] not in KNOWN:
                    found.setdefault(each["id"], []).extend(f"{name}: {node['html'][:160]}" for node in each["nodes"][:3])
    assert found == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_tab_fits_a_phone(browser: Any, served: Page, scheme: str) -> None:
    with visit(browser, served.url, viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True) as tab:
        for name in TABS:
            show(tab, name)
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390, name


def test_dark_is_dark(browser: Any, served: Page) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        with visit(browser, served.url, color_scheme=scheme) as tab:
            color = tab.evaluate("getComputedStyle(document.querySelector('.gradio-container')).backgroundColor")
            seen[scheme] = sum(map(int, color.removeprefix("rgb(").rstrip(")").split(",")[:3]))
    assert seen["light"] > 600 > 200 > seen["dark"]


def test_the_whole_page_is_reached_by_keys(browser: Any, served: Page) -> None:
    with visit(browser, served.url) as tab:
        reached = set()
        for _ in range(40):
            tab.keyboard.press("Tab")
            reached.add(tab.evaluate("document.activeElement?.innerText?.trim() || document.activeElement?.ariaLabel || ''"))
        assert {"Compare", "Run again"} <= reached
        tab.get_by_role("tab", name="Compare").focus()
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("Enter")
        assert tab.get_by_role("tab", name="Generate").get_attribute("aria-selected") == "true"
