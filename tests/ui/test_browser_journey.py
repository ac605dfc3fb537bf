"""One visitor of `hasten ui` as a person starts it: generates, stops, compares, exports, restores, and finds words where words belong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hasten.pipelines.media import save
from hasten.ui.engine import Engine, Job
from tests.ui.browsers import MARKS, PATIENT, TABS, chromium, fill, show, sync_api, visit
from tests.ui.processes import Page, seeded
from tests.ui.processes import page as started

sync_api()
pytestmark = [*MARKS, pytest.mark.timeout(900)]
EVIL = "a seven <img src=x onerror=window.PWN=1> ${window.PWN=1} {{PWN}}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded(tmp_path_factory.mktemp("journey") / "home")


@pytest.fixture(scope="module")
def served(home: Path) -> Iterator[Page]:
    with started(home) as found:
        yield found.filled()


@pytest.fixture(scope="module")
def queue(home: Path) -> Iterator[Engine]:
    """The same queue, looked at from this process."""
    engine = Engine(home)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def tab(browser: Any, served: Page) -> Iterator[Any]:
    with visit(browser, served.url) as found:
        yield found


def expect(locator: Any) -> Any:
    return sync_api().expect(locator)


def newest(queue: Engine, kind: str = "generate") -> Job:
    return queue.jobs.list(1, kinds=(kind,))[0]


def generated(tab: Any, queue: Engine, **values: object) -> Job:
    """Make one in the Generate tab, and wait for it."""
    before = queue.jobs.list(1)[0].id
    show(tab, "Generate")
    fill(tab, "generate", **values)
    tab.locator("#generate-run").click()
    for _ in range(600):
        if (job := queue.jobs.list(1)[0]).id != before:
            return queue.wait(job.id, PATIENT / 1000)
        tab.wait_for_timeout(100)
    raise AssertionError("nothing was submitted")


def test_a_prompt_with_markup_stays_text_everywhere(tab: Any, queue: Engine) -> None:
    job = generated(tab, queue, prompt=EVIL, steps=4)
    assert (job.state, job.asked["prompt"]) == ("done", EVIL), job.error
    expect(tab.locator("#generate-result video")).to_be_visible(timeout=PATIENT)
    for name in TABS:
        show(tab, name)
        tab.wait_for_timeout(500)
    expect(tab.locator("#export-python")).to_contain_text("onerror", timeout=PATIENT)
    assert tab.evaluate("typeof window.PWN") == "undefined"
    tab.reload()
    tab.locator("#compare-player video").first.wait_for()
    show(tab, "History")
    expect(tab.locator("#history-gallery")).to_contain_text("onerror", timeout=PATIENT)
    assert tab.evaluate("typeof window.PWN") == "undefined"


def test_stop_and_run_again_do_not_overlap(tab: Any, queue: Engine) -> None:
    show(tab, "Generate")
    fill(tab, "generate", prompt="a four moving right", steps=200)
    tab.locator("#generate-run").click()
    stop = tab.locator("button.halt:visible")
    expect(stop).to_be_enabled(timeout=PATIENT)
    first = newest(queue)
    fill(tab, "generate", steps=3)
    stop.click()
    tab.locator("#generate-run").click()
    expect(tab.locator("#generate-result video")).to_be_visible(timeout=PATIENT)
    for _ in range(600):
        if (second := newest(queue)).id != first.id:
            break
        tab.wait_for_timeout(100)
    assert queue.wait(second.id, PATIENT / 1000).state == "done"
    first, second = queue.job(first.id), queue.job(second.id)
    assert (first.state, first.asked["steps"], second.asked["steps"]) == ("cancelled", 200, 3)
    assert first.ended is not None and second.began is not None and first.ended <= second.began


def test_a_comparison_is_run(tab: Any, queue: Engine) -> None:
    fill(tab, "compare", prompt="a two moving up", steps=5)
    tab.locator("#compare-run").click()
    expect(tab.get_by_text("“a two moving up”")).to_be_visible(timeout=PATIENT)
    expect(tab.locator("#compare-player .hv-tag")).to_have_text(["plain", "balanced"])
    expect(tab.locator(".hv-timeline:visible svg.drawn").first).to_be_visible()
    wipe = tab.locator("#compare-player input[type=range]").first
    assert wipe.get_attribute("aria-label") or wipe.get_attribute("id")
    job = newest(queue, "compare")
    assert job.state == "done" and job.asked["steps"] == 5


@pytest.mark.slow
def test_a_study_is_watched_and_its_recipe_compared(tab: Any, queue: Engine) -> None:
    show(tab, "Tune")
    tab.get_by_role("spinbutton", name="Likeness to keep").fill("20")
    tab.get_by_label("Seconds to search").fill("240")
    tab.locator("#tune-steps").locator("input, textarea").first.fill("6")
    tab.keyboard.press("Tab")
    tab.locator("#tune-run").click()
    front = tab.locator("#tune-front")
    expect(front.locator("button.hv-point").first).to_be_visible(timeout=3 * PATIENT)
    study = newest(queue, "tune")
    assert queue.wait(study.id, 5 * PATIENT / 1000).state == "done"
    assert study.asked["steps"] == 6 and study.asked["budget"] == "psnr>=20"
    before = newest(queue, "compare").id
    expect(tab.get_by_role("button", name="Compare it with the plain run")).to_be_visible(timeout=PATIENT)
    front.locator("button.hv-point").last.click(force=True)
    expect(tab.get_by_text("Trial", exact=False).locator("visible=true").first).to_be_visible()
    tab.get_by_role("button", name="Compare it with the plain run").click()
    for _ in range(600):
        if (job := newest(queue, "compare")).id != before:
            break
        tab.wait_for_timeout(100)
    assert queue.wait(job.id, 2 * PATIENT / 1000).state == "done"
    expect(tab.get_by_role("tab", name="Compare", exact=True)).to_have_attribute("aria-selected", "true")


@pytest.mark.long
def test_an_exported_program_runs(tab: Any, queue: Engine, tmp_path: Path) -> None:
    generated(tab, queue, prompt="a nine moving down", steps=3)
    expect(tab.locator("#generate-result video")).to_be_visible(timeout=PATIENT)
    show(tab, "Export")
    expect(tab.locator("#export-python")).to_contain_text("a nine moving down", timeout=PATIENT)
    for name, made in (("#export-python", "program.py"), ("#export-yaml", "recipe.yaml")):
        with tab.expect_download() as download:
            tab.locator(name).get_by_role("button", name="Download", exact=False).click()
        download.value.save_as(tmp_path / made)
    for command in ([sys.executable, "program.py"], [sys.executable, "-m", "hasten", "recipes", "recipe.yaml"]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert [file for file in tmp_path.iterdir() if file.suffix in (".mp4", ".png", ".gif")], "the program wrote its clip"


def test_settings_come_back_from_a_file(tab: Any, queue: Engine) -> None:
    done = generated(tab, queue, prompt="a zero moving left", steps=4, seed=31)
    file = queue.outputs.file(done.result["output"], done.result["media"])
    fill(tab, "generate", prompt="something else", seed=1)
    show(tab, "History")
    tab.locator("#history-file input[type=file]").set_input_files(file)
    box = tab.locator("#generate-prompt textarea")
    expect(box).to_have_value("a zero moving left", timeout=PATIENT)
    expect(tab.locator("#generate-seed input")).to_have_value("31")
    expect(box).to_be_visible()


@pytest.mark.parametrize("name", ["bomb.png", "other.png", "pickle.png", "page.json", "laughs.yaml"])
def test_files_of_others_are_refused_in_words(tab: Any, name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    _planted(file)
    show(tab, "History")
    tab.locator("#history-file input[type=file]").set_input_files(file)
    expect(tab.locator(".toast-body").first).to_contain_text("allowed", timeout=PATIENT)
    assert tab.evaluate("typeof window.PWN") == "undefined"


def _planted(file: Path) -> None:
    """A file that somebody else may send."""
    if file.name == "bomb.png":
        Image.new("1", (9000, 9000)).save(file)
    elif file.name == "other.png":
        import numpy as np

        save(np.zeros((1, 32, 32, 3), np.uint8), file, fps=1, metadata={})
    elif file.name == "pickle.png":
        file.write_bytes(b"\x80\x04\x95\x20\x00cposix\nsystem\n(S'touch /tmp/pwned'\ntR.")
    elif file.name == "page.json":
        file.write_text('{"kind": "generate", "model": "tiny-video", "prompt": "a", "output_path": "<img src=x onerror=window.PWN=1>"}')
    else:
        file.write_text("a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: [*b,*b,*b,*b]\n")


def test_a_request_that_is_not_allowed_says_why_as_text(tab: Any) -> None:
    show(tab, "Generate")
    told = tab.locator(".toast-body").first
    for _ in range(4):  # the page may still be filling in the model's own settings, which empties what was typed
        fill(tab, "generate", steps=EVIL[8:])
        tab.locator("#generate-run").click()
        with suppress(sync_api().TimeoutError):
            told.wait_for(timeout=10_000)
            break
    expect(told).to_contain_text("<img src=x onerror", timeout=PATIENT)
    assert tab.evaluate("typeof window.PWN") == "undefined"


def test_a_second_visitor_sees_the_queue(tab: Any, browser: Any, served: Page, queue: Engine) -> None:
    job = queue.submit({"kind": "generate", "model": "tiny-video", "prompt": "a six moving right", "steps": 200, "recipe": "plain"})
    with visit(browser, served.url) as other:
        for each in (tab, other):
            show(each, "History")
            expect(each.locator("#history-queue")).to_contain_text("a six moving right", timeout=PATIENT)
        other.locator("#history-queue").get_by_role("button", name="a six moving right").first.click()
        other.get_by_role("button", name="Stop it").click()
        assert queue.wait(job.id, PATIENT / 1000).state == "cancelled"
