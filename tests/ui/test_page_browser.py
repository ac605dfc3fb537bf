"""The page in Debian's Chromium: it opens filled, keys work from anywhere, and a reload or a second tab finds the run again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from hasten.ui.engine import Engine
from tests.ui.browsers import MARKS, PATIENT, chromium, opened, show, visit
from tests.ui.browsers import sync_api as found_sync_api
from tests.ui.pages import launched
from tests.ui.students import trained

sync_api = found_sync_api()
pytestmark = [*MARKS, pytest.mark.timeout(900)]

SMALL = {"kind": "compare", "model": "tiny-video", "prompt": "a seven moving left", "recipes": ["balanced", "fast:student=false"], "steps": 6}

@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, str]]:
    """An engine with one comparison that is done, and the address of its page."""
    with launched(tmp_path_factory, SMALL) as (engine, url):
        assert engine.wait(engine.jobs.list(1)[0].id).state == "done"
        yield engine, url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def tab(browser: Any, served: tuple[Engine, str]) -> Iterator[Any]:
    """A page in a browser of its own, which must not complain."""
    with visit(browser, served[1].rstrip("/")) as page:
        yield page


def expect(locator: Any) -> Any:
    return sync_api.expect(locator)


@pytest.mark.long
def test_it_opens_filled_with_the_last_comparison(tab: Any) -> None:
    expect(tab.locator("#compare-player .hv-tag")).to_have_text(["plain", "balanced"])
    expect(tab.locator(".hv-metrics .hv-card:visible")).to_have_count(2)
    expect(tab.locator(".hv-timeline:visible svg.drawn").first).to_be_visible()
    expect(tab.get_by_text("“a seven moving left”")).to_be_visible()


def test_another_run_shows_what_it_left_out(tab: Any) -> None:
    tab.get_by_role("radio", name="fast:student=false").check()
    expect(tab.locator(".hv-timeline:visible h3")).to_have_text("What fast:student=false computed", timeout=PATIENT)


def test_a_causal_model_goes_on_with_a_prompt_and_its_text_says_who_guessed_it(tab: Any) -> None:
    show(tab, "Text")
    expect(tab.locator("#text-drafts")).to_be_hidden()
    tab.locator("#text-model input").click()
    tab.get_by_role("option", name="tiny-lm", exact=True).click()
    expect(tab.locator("#text-drafts")).to_be_visible(timeout=PATIENT)
    expect(tab.locator("#tabs .speed:visible")).to_have_count(0)
    prompt = "<img src=x onerror=window.PWN=1> a b c d a b c d a b"
    tab.locator("#text-prompt textarea").fill(prompt)
    tab.get_by_label("Guess in every forward").check()
    tab.locator("#text-run").click()
    expect(tab.locator("#text-result .hv-exact h3")).to_contain_text("Same text", timeout=PATIENT)
    assert tab.evaluate("typeof window.PWN") == "undefined"
    slider = tab.locator("#text-result").get_by_role("slider", name="Token")
    slider.focus()
    tab.keyboard.press("Home")
    expect(tab.locator('#text-result [data-part="said"]')).to_contain_text("Token 1: written by the model itself, behind the prompt")
    tab.reload()
    show(tab, "Text")
    expect(tab.locator("#text-result .hv-exact h3")).to_contain_text("Same text", timeout=PATIENT)
    expect(tab.locator("#text-model input")).to_have_value("tiny-lm")
    expect(tab.locator("#text-prompt textarea")).to_have_value(prompt)
    expect(tab.get_by_label("Guess in every forward")).to_be_checked()
    expect(tab.locator("#tabs .speed:visible")).to_have_count(0)


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
    second = tab.context.new_page()
    opened(second, served[1].rstrip("/"))
    for page in (tab, second):
        show(page, "Generate")
        expect(page.locator("#generate-result video")).to_be_visible(timeout=2 * PATIENT)
    assert served[0].job(job).state == "done"
    assert [each.id for each in served[0].jobs.list(5, kinds=["generate"])].count(job) == 1


def test_a_finished_training_draws_in_generate_by_one_click(tab: Any, served: tuple[Engine, str]) -> None:
    trained(served[0])
    show(tab, "History")
    tab.get_by_role("button", name="Train: pairs").or_(tab.locator("#history-gallery button", has_text="Train")).first.click()
    tab.get_by_role("button", name="Open", exact=True).click()
    expect(tab.get_by_text("The student is ready")).to_be_visible(timeout=PATIENT)
    tab.get_by_role("button", name="Use the student in Generate").click()
    expect(tab.locator("#generate-result img")).to_be_visible(timeout=PATIENT)
    expect(tab.get_by_role("region", name="The run in numbers")).to_contain_text("1 instead of", timeout=PATIENT)
    tab.get_by_text("Advanced", exact=True).locator("visible=true").click()
    expect(tab.locator("#generate-recipe input")).to_have_value(re.compile("^Your student .*: pairs of tiny-image$"), timeout=PATIENT)
    job = served[0].jobs.list(1)[0]
    assert job.result["row"]["nfe"] == 1 and job.asked["recipe"].startswith("trained:")


def test_the_queue_is_paused_and_put_in_another_order(tab: Any, served: tuple[Engine, str]) -> None:
    engine = served[0]
    show(tab, "History")
    tab.locator("#history-pause").click()
    expect(tab.locator("#history-pause")).to_have_text("Go on with the queue", timeout=PATIENT)
    asked = {"kind": "generate", "model": "tiny-image", "steps": 3, "recipe": "plain", "preview": False}
    first, second = (engine.submit(asked | {"prompt": prompt}).id for prompt in ("a one", "a two"))
    tab.get_by_role("button", name="Look again").click()
    tab.locator("#history-queue").get_by_role("button", name="Generate: a two", exact=True).click()
    tab.get_by_role("button", name="First", exact=True).click()
    expect(tab.locator("#history-queue .hv-is-queued button")).to_have_text(["Generate: a two", "Generate: a one"], timeout=PATIENT)
    assert [job.id for job in engine.jobs.queue()] == [second, first]
    expect(tab.locator(".hp-line")).to_contain_text("2 waiting · the queue is paused", timeout=PATIENT)
    tab.locator("#history-pause").click()
    expect(tab.locator("#history-pause")).to_have_text("Pause the queue", timeout=PATIENT)
    assert engine.wait(first).state == "done"


def test_it_fits_a_phone(browser: Any, served: tuple[Engine, str]) -> None:
    with visit(browser, served[1].rstrip("/"), viewport={"width": 390, "height": 844}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        expect(page.locator("button.go:visible")).to_be_visible()
