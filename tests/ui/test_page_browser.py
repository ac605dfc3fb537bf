"""The page in Debian's Chromium: it opens filled, keys work from anywhere, and a reload or a second tab finds the run again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from hasten.ui.engine import Engine
from hasten.ui.page import build, launch_options

CHROMIUM = shutil.which("chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
]

SMALL = {"kind": "compare", "model": "tiny-video", "prompt": "a seven moving left", "recipes": ["balanced", "fast:student=false"], "steps": 6}
PATIENT = 120_000
"""Milliseconds, on a machine that is busy with other tests."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, str]]:
    """An engine with one comparison that is done, and the address of its page."""
    keep = pytest.MonkeyPatch()
    keep.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    keep.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
    keep.chdir(tmp_path_factory.mktemp("empty"))
    with Engine(tmp_path_factory.mktemp("home")) as engine:
        assert engine.wait(engine.submit(SMALL).id).state == "done"
        page = build(engine)
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, inbrowser=False, **launch_options(engine))
        yield engine, url
        page.close(verbose=False)
    keep.undo()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def tab(browser: Any, served: tuple[Engine, str]) -> Iterator[Any]:
    """A page in a browser of its own, which must not complain."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENT)
    wrong: list[str] = []
    page = opened(context, served[1])
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    context.close()
    assert not wrong


def opened(context: Any, url: str) -> Any:
    """A page whose first jobs are found again."""
    page = context.new_page()
    page.goto(url)
    page.locator("#compare-player video").first.wait_for(timeout=PATIENT)
    return page


def show(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
    page.locator("button.go:visible").wait_for()


def expect(locator: Any) -> Any:
    return sync_api.expect(locator)


def test_it_opens_filled_with_the_last_comparison(tab: Any) -> None:
    expect(tab.locator("#compare-player .hv-tag")).to_have_text(["plain", "balanced"])
    expect(tab.locator(".hv-metrics .hv-card:visible")).to_have_count(2)
    expect(tab.locator(".hv-timeline:visible svg.drawn").first).to_be_visible()
    expect(tab.get_by_text("“a seven moving left”")).to_be_visible()


def test_another_run_shows_what_it_left_out(tab: Any) -> None:
    tab.get_by_role("radio", name="fast:student=false").check()
    expect(tab.locator(".hv-timeline:visible h3")).to_have_text("What fast:student=false computed", timeout=PATIENT)


def test_keys_reach_the_player_from_anywhere(tab: Any) -> None:
    frame = tab.locator('#compare-player [data-part="frame"]')
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    expect(frame).to_have_text("3 / 17")
    tab.keyboard.press("ArrowLeft")
    expect(frame).to_have_text("2 / 17")
    tab.keyboard.press("s")
    expect(tab.locator("#compare-player .hv-tag")).to_have_text(["balanced", "plain"])
    tab.keyboard.press("4")
    expect(tab.locator("#compare-player .hv-stage")).to_have_attribute("data-mode", "difference")


def test_keys_do_nothing_to_the_player_while_one_types(tab: Any) -> None:
    show(tab, "Generate")
    box = tab.locator("#generate-prompt textarea")
    box.fill("")
    box.press_sequentially("1s?4")
    expect(box).to_have_value("1s?4")
    expect(tab.locator("#hp-help[open]")).to_have_count(0)


def test_a_question_mark_opens_the_list_of_keys(tab: Any) -> None:
    tab.keyboard.press("?")
    dialog = tab.get_by_role("dialog", name="Keys")
    expect(dialog).to_be_visible()
    tab.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


def test_control_enter_runs_what_was_typed_and_escape_stops_it(tab: Any, served: tuple[Engine, str]) -> None:
    show(tab, "Generate")
    box = tab.locator("#generate-prompt textarea")
    box.fill("a nine moving down, quickly")
    tab.get_by_text("Advanced", exact=True).locator("visible=true").click()
    tab.locator("#generate-steps").get_by_role("textbox").fill("200")
    box.press("Control+Enter")
    stop = tab.locator("button.halt:visible")
    expect(stop).to_be_enabled(timeout=PATIENT)
    job = served[0].jobs.list(1)[0]
    assert (job.asked["prompt"], job.asked["steps"]) == ("a nine moving down, quickly", 200)
    tab.locator(".hv-progress:visible").click()
    tab.keyboard.press("Escape")
    expect(tab.locator('.hv-progress:visible [data-part="phase"]')).to_have_text("Stopped", timeout=PATIENT)
    expect(stop).to_be_disabled()
    assert served[0].job(job.id).state == "cancelled"


def test_a_reload_and_a_second_tab_find_the_run_again(tab: Any, served: tuple[Engine, str]) -> None:
    show(tab, "Generate")
    tab.locator("#generate-prompt textarea").fill("a two moving up")
    tab.get_by_text("Advanced", exact=True).locator("visible=true").click()
    tab.locator("#generate-steps").get_by_role("textbox").fill("24")
    tab.locator("#generate-run").click()
    expect(tab.locator("button.halt:visible")).to_be_enabled(timeout=PATIENT)
    job = served[0].jobs.list(1)[0].id
    tab.reload()
    second = opened(tab.context, served[1])
    for page in (tab, second):
        show(page, "Generate")
        expect(page.locator("#generate-result video")).to_be_visible(timeout=2 * PATIENT)
    assert served[0].job(job).state == "done"
    assert [each.id for each in served[0].jobs.list(5, kinds=["generate"])].count(job) == 1


def test_it_fits_a_phone(browser: Any, served: tuple[Engine, str]) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = opened(context, served[1])
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(page.locator("button.go:visible")).to_be_visible()
    context.close()
