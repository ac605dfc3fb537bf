"""Debian's Chromium on a served page, looked at while it works: nobody else is asked, nothing is complained of."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENT = 120_000
"""Milliseconds, on a machine that is busy with other tests."""

TABS = ("Compare", "Generate", "Text", "Tune", "Train", "History", "Export")
MARKS = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")]


def sync_api() -> Any:
    """Playwright; without it the tests of a module are left out."""
    return pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    with sync_api().sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextlib.contextmanager
def visit(browser: Any, url: str, **more: Any) -> Iterator[Any]:
    """A page of a fresh visitor. Afterwards: no request went elsewhere, no script failed, no policy was broken."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **more})
    context.set_default_timeout(PATIENT)
    outside, wrong = [], []

    def asked(request: Any) -> None:
        if not request.url.startswith((f"{url}/", "data:", "blob:")):
            outside.append(request.url)

    def said(message: Any) -> None:
        if message.type == "error" and ("Content Security Policy" in message.text or "Refused" in message.text):
            wrong.append(message.text)

    context.on("request", asked)
    context.on("console", said)
    context.on("weberror", lambda error: wrong.append(str(error.error)))
    try:
        page = context.new_page()
        opened(page, url)
        yield page
    finally:
        context.close()
    assert outside == []
    assert wrong == []


def opened(page: Any, url: str) -> None:
    """Its first comparison is there."""
    page.goto(f"{url}/")
    page.locator("#compare-player video").first.wait_for()


def show(page: Any, name: str) -> None:
    """Choose a tab, which is in sight, also on a phone."""
    page.get_by_role("tab", name=name, exact=True).click()
    page.wait_for_timeout(200)


def fill(page: Any, tab: str, **values: object) -> None:
    """Type into the boxes of a tab's settings, by their names."""
    if not page.locator(f"#{tab}-steps").is_visible():
        page.get_by_text("Advanced", exact=True).locator("visible=true").click()
    for name, value in values.items():
        box = page.locator(f"#{tab}-{name}").locator("textarea, input").first
        box.fill(str(value))
        box.blur()
