"""Every tab of `hasten ui`: on a phone, light and dark, for screen readers, and without asking anybody else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.ui.browsers import MARKS, TABS, chromium, show, sync_api, visit
from tests.ui.processes import Page, seeded
from tests.ui.processes import page as started

sync_api()
pytestmark = [*MARKS, pytest.mark.timeout(900)]

KNOWN = {"scrollable-region-focusable": "CodeMirror's editor, which scrolls by keys of its own"}
"""Findings of axe that stand in Gradio's own markup -> why. Everything else serious fails."""

HIGHLIGHTED = '<span class="ͼ'
"""How a word of code begins that CodeMirror has coloured; its light colours have less contrast than axe asks for."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with started(seeded(tmp_path_factory.mktemp("looks") / "home")) as found:
        yield found.filled()


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
            for closed in tab.locator("button.label-wrap:not(.open):visible").all():
                closed.click()
            for each in axe.Axe().run(tab).response["violations"]:
                if each["impact"] in ("serious", "critical") and each["id"] not in KNOWN:
                    ours = [node["html"] for node in each["nodes"] if not node["html"].startswith(HIGHLIGHTED)]
                    if ours:
                        found.setdefault(each["id"], []).extend(f"{name}: {html[:160]}" for html in ours[:3])
    assert found == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_tab_fits_a_phone(browser: Any, served: Page, scheme: str) -> None:
    with visit(browser, served.url, viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True) as tab:
        row = [tab.get_by_role("tab", name=name, exact=True).bounding_box() for name in TABS]
        assert len({box["y"] for box in row}) == 1, "all in one row"
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 32 for box in row)
        for name in TABS:
            show(tab, name)
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390, name


def test_dark_is_dark(browser: Any, served: Page) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        with visit(browser, served.url, color_scheme=scheme) as tab:
            color = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            seen[scheme] = sum(map(int, re.findall(r"\d+", color)[:3]))
    assert seen["light"] > 600
    assert seen["dark"] < 200


def test_the_whole_page_is_reached_by_keys(browser: Any, served: Page) -> None:
    with visit(browser, served.url) as tab:
        reached = set()
        for _ in range(40):
            tab.keyboard.press("Tab")
            reached.add(tab.evaluate("document.activeElement?.innerText?.trim() || document.activeElement?.ariaLabel || ''"))
        assert {"Compare", "Run again"} <= reached
        tab.get_by_role("tab", name="Compare").focus()
        tab.keyboard.press("Tab")
        tab.keyboard.press("Enter")
        assert tab.get_by_role("tab", name="Generate").get_attribute("aria-selected") == "true"
