"""Views in Debian's Chromium: what moves, what keys do, what fits on a phone, and that nothing is asked of another host."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hasten.pipelines.media import save
from hasten.report import Report
from hasten.trace import Event, Run, Trace
from hasten.ui.views import page as pages
from hasten.ui.views.canvas import canvas
from hasten.ui.views.decoding import decoding
from hasten.ui.views.density import density
from hasten.ui.views.front import front
from hasten.ui.views.gallery import gallery
from hasten.ui.views.loss import loss
from hasten.ui.views.metrics import metrics
from hasten.ui.views.player import player
from hasten.ui.views.progress import progress, queue
from hasten.ui.views.timeline import timeline

CHROMIUM = shutil.which("chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
]

FRAMES, FPS = 17, 8
PROMPT = "<img src=x onerror='window.PWNED=1'>${window.PWNED=1}{{PWNED}}"


DRAFTED: dict[str, Any] = {
    "tokens": [{"text": "a b\n", "given": True}, {"text": "first", "by": "", "round": 0}, *(
        {"text": f" t{at}", "by": ("look-up", "small", "")[at % 3], "round": at // 3 + 1, "lead": at / 10} for at in range(12)
    ), {"text": PROMPT, "by": None, "round": None}],
    "rounds": [{"drafted": 6, "accepted": 2, "written": 3} for _ in range(4)], "drafters": {"look-up": [12, 4], "small": [12, 4]},
    "row": {"recipe": "look-up-or-draft:nodes=12,every=true", "tokens_per_forward": 3.0, "seconds": 1.0, "plain_seconds": 2.0, "speedup": 2.0},
    "exact": {"verdict": "differs", "headline": "Another text from token 5 on", "sentence": PROMPT}, "warnings": [PROMPT],
}  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every view: two clips whose right halves differ, and a report of fifty steps."""
    folder = tmp_path_factory.mktemp("views")
    clip = np.full((FRAMES, 32, 32, 3), 40, np.uint8)
    other = clip.copy()
    other[:, :, 16:] = 60
    urls = [pages.embedded(save(frames, folder / f"{name}.mp4", fps=FPS, metadata={})[0]) for name, frames in (("a", clip), ("b", other))]
    picture = pages.embedded(save(clip[:1], folder / "a.png", fps=1, metadata={})[0])
    runs = [{"label": "plain", "url": urls[0]}, {"label": PROMPT, "url": urls[1]}]
    rows = [
        {"recipe": "plain", "seconds": 4.0, "speedup": 1.0},
        {"recipe": "fast", "seconds": 1.0, "speedup": 4.0, "psnr_median": 30.0, "psnr_worst": 28.0, "reads": PROMPT},
    ]
    views = [
        player({"runs": runs, "width": 32, "height": 32, "frames": FRAMES, "fps": FPS, "group": "g"}),
        metrics({"rows": rows, "noise_floor": 12.0, "by_frame": {"fast": [30.0 + at % 3 for at in range(FRAMES)]}, "group": "g"}),
        timeline(report()),
        density(report()),
        front({"rows": [{"recipe": f"r{at}", "speedup": 1.0 + at, "psnr_median": 50.0 - at * at} for at in range(5)], "budget": 35}),
        canvas({"tokens": [{"text": PROMPT, "given": True}, *({"text": f" w{at}", "step": (7 * at) % 10} for at in range(10))], "steps": 10}),
        decoding(DRAFTED),
        progress({"state": "running", "phase": "Denoising", "step": 3, "steps": 10, "message": PROMPT}),
        queue({"jobs": [{"id": "1", "title": PROMPT * 3, "state": "queued"}]}),
        loss({"rows": [{"step": at, "loss": 2.0**-at} for at in range(20)], "samples": [{"step": 5, "url": picture}]}),
        gallery({"items": [{"id": at, "title": f"a {word} moving", "thumb": picture} for at, word in enumerate(("seven", "nine"))]}),
    ]
    path = folder / "all.html"
    path.write_text(pages.alone(PROMPT, PROMPT, views), encoding="utf-8")
    return path


def report() -> dict[str, Any]:
    trace = Trace(runs=[Run(0, 50, [], 5.0, True)], structure={"net.blocks": 40})
    for step in range(50):
        for block in range(40):
            kind = ("compute", "reuse", "forecast", "skip")[(step + block) % 4]
            trace.add(Event(0, step, 0, "net.blocks", kind, (block, block + 1), 0.1, 0.2, 0.05))  # type: ignore[arg-type]
    data: dict[str, Any] = json.loads(Report(trace).to_json())
    calls = [
        {"run": 0, "step": s, "branch": 0, "site": f"net.blocks.{k}.attn", "layer": k, "action": "sparse", "tokens": 64, "density": 0.3}
        for s in range(50)
        for k in range(0, 40, 4)
    ]
    return {**data, "attention": calls}


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    """The page on a desktop. Ends the test when a script fails or anything is requested."""
    opened = browser.new_page(viewport={"width": 1100, "height": 900})
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None)
    opened.goto(file.as_uri())
    opened.wait_for_function("[...document.querySelectorAll('video')].every((clip) => clip.readyState > 1 && !clip.seeking)")
    yield opened
    assert wrong == [] and opened.evaluate("window.PWNED") is None
    opened.close()


def seen(page: Any) -> np.ndarray[Any, Any]:
    """What the player shows, RGB."""
    return np.asarray(Image.open(io.BytesIO(page.locator(".hv-stage").screenshot())).convert("RGB")).astype(int)


def test_the_wipe_moves_by_key_and_by_pointer(page: Any) -> None:
    wipe = page.get_by_role("slider", name="Wipe between left and right")
    wipe.focus()
    page.keyboard.press("Home")
    assert wipe.get_attribute("aria-valuetext") == "0 % left"
    right = seen(page)[100, -60, 0] - seen(page)[100, 60, 0]
    page.keyboard.press("End")
    assert right > 10 and abs(seen(page)[100, -60, 0] - seen(page)[100, 60, 0]) < 5
    box = page.locator(".hv-stage").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 60, steps=5)
    page.mouse.up()
    assert abs(float(wipe.input_value()) - 25) < 2
    page.keyboard.press("ArrowRight")  # after a drag, arrow keys step through frames again
    assert page.locator('[data-part="frame"]').inner_text() == f"2 / {FRAMES}"


def test_both_clips_stay_within_a_frame(page: Any) -> None:
    page.get_by_role("button", name="Play").click()
    away = []
    for _ in range(8):
        page.wait_for_timeout(200)
        away.append(page.evaluate("document.querySelector('.hv-player').hastenDrift()"))
    moved = page.evaluate("document.querySelector('.hv-a video').currentTime")
    page.get_by_role("button", name="Pause").click()
    # A clip that begins again while the other ends is a whole clip away for a moment.
    assert moved > 0 and sum(min(each, abs(FRAMES - each)) <= 1 for each in away) >= 7, away


def test_keys_step_play_swap_and_choose_a_view(page: Any) -> None:
    page.locator(".hv-keys").focus()
    shown = page.locator('[data-part="frame"]')
    for key, expected in (("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("ArrowLeft", 1), ("ArrowLeft", FRAMES), (".", 1)):
        page.keyboard.press(key)
        assert shown.inner_text() == f"{expected} / {FRAMES}"
    page.keyboard.press("Space")
    assert page.get_by_role("button", name="Pause").count() == 1
    page.keyboard.press("Space")
    before = page.locator(".hv-a .hv-tag").inner_text()
    page.keyboard.press("c")
    assert page.locator(".hv-b .hv-tag").inner_text() == before == "plain"
    assert page.locator(".hv-a .hv-tag").inner_text() == PROMPT
    for key, mode in (("2", "side"), ("3", "blink"), ("4", "difference"), ("1", "wipe")):
        page.keyboard.press(key)
        assert page.locator(".hv-stage").get_attribute("data-mode") == mode
        assert page.locator(f'input[value="{mode}"]').is_checked()


def test_the_difference_is_black_where_clips_agree_and_grows_with_the_gain(page: Any) -> None:
    page.get_by_role("radio", name="Difference").check()
    gain = page.get_by_role("slider", name="Amplify the difference")
    gain.fill("0")
    page.wait_for_timeout(100)
    little = seen(page)
    gain.fill("3")
    page.wait_for_timeout(100)
    much = seen(page)
    assert gain.get_attribute("aria-valuetext") == "8 times"
    assert much[100, 60].max() < 30, "the left halves are equal"
    assert 8 < little[100, -60].max() < 45 and much[100, -60].max() > 4 * little[100, -60].max()


def test_blinking_shows_one_at_a_time(page: Any) -> None:
    page.get_by_role("radio", name="Blink").check()
    hidden = set()
    for _ in range(8):
        hidden.add(page.evaluate("['a', 'b'].map((s) => getComputedStyle(document.querySelector('.hv-' + s)).visibility).join()"))
        page.wait_for_timeout(250)
    assert hidden == {"visible,hidden", "hidden,visible"}


def test_a_card_seeks_the_player_and_follows_it(page: Any) -> None:
    line = page.get_by_role("slider", name="Frame of fast")
    line.fill("6")
    assert page.locator('.hv-player [data-part="frame"]').inner_text() == f"7 / {FRAMES}"
    assert line.get_attribute("aria-valuetext") == f"frame 7 of {FRAMES}, 30.0 dB"
    page.get_by_role("slider", name="Frame", exact=True).fill("9")
    assert line.input_value() == "9"


def test_cells_answer_and_the_timeline_can_be_kept(page: Any) -> None:
    page.locator(".hv-timeline rect.reuse").first.hover()
    assert "signal 0.1 against limit 0.2" in page.locator(".hv-timeline .hv-said").inner_text()
    with page.expect_download() as kept:
        page.get_by_role("button", name="Download as JSON").click()
    data = json.loads(Path(kept.value.path()).read_text(encoding="utf-8"))
    assert len(data["events"]) == 2000 and data["structure"] == {"net.blocks": 40}


def test_two_thousand_cells_are_drawn_quickly(page: Any) -> None:
    took = page.evaluate(
        """() => { const slot = document.createElement('div'), html = document.querySelector('.hv-timeline').outerHTML;
        document.body.append(slot); const began = performance.now(); hastenViews.replace(slot, html); slot.getBoundingClientRect();
        return performance.now() - began; }"""
    )
    assert took < 2000


def test_points_are_reached_by_keys_and_send_their_number(page: Any) -> None:
    page.evaluate("document.addEventListener('hasten:select', (event) => (window.chosen = event.detail))")
    points = page.locator("button.hv-point")
    points.nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.evaluate("window.chosen") == {"number": 2, "recipe": "r2"}
    points.nth(4).click()
    assert page.evaluate("window.chosen.number") == 4
    assert points.nth(4).get_attribute("aria-pressed") == "true" and points.nth(2).get_attribute("aria-pressed") == "false"
    assert page.locator(".hv-front .hv-said").inner_text().startswith("r4: 5.00×")


def test_a_text_fills_in_step_by_step(page: Any) -> None:
    slider = page.get_by_role("slider", name="Step")
    masked = page.locator(".hv-words .hv-masked")
    assert masked.count() == 0
    slider.fill("0")
    assert masked.count() == 10
    slider.fill("4")
    assert masked.count() == 6 and "4 of 10 tokens" in page.locator('.hv-canvas [data-part="said"]').inner_text()
    assert PROMPT in page.locator(".hv-canvas .hv-words").inner_text()


def test_a_text_is_watched_again_and_stops_at_a_touch(page: Any) -> None:
    slider, masked = page.get_by_role("slider", name="Step"), page.locator(".hv-words .hv-masked")
    page.get_by_role("button", name="Watch it being written").click()
    sync_api.expect(masked).not_to_have_count(0)
    sync_api.expect(slider).not_to_have_value("0")
    slider.press("Home")
    page.wait_for_timeout(900)
    assert slider.input_value() == "0", "who moves it is not fought with"
    page.get_by_role("button", name="Watch it being written").click()
    sync_api.expect(slider).to_have_value("10", timeout=30_000)
    assert masked.count() == 0


def test_a_text_that_grows_is_shown_to_its_end(page: Any) -> None:
    """A slider at its end follows it; one that was moved stays."""
    tokens = [{"text": f"w{at}", "step": at} for at in range(6)]
    short, long = canvas({"tokens": tokens[:2]}), canvas({"tokens": tokens})
    page.evaluate("document.body.append(Object.assign(document.createElement('div'), {id: 'slot'}))")
    put = "html => hastenViews.replace(document.getElementById('slot'), html)"
    page.evaluate(put, short)
    page.evaluate(put, long)
    assert page.locator("#slot .hv-words .hv-masked").count() == 0
    page.locator("#slot").get_by_role("slider", name="Step").fill("3")
    page.evaluate(put, long.replace("Written", "Told"))
    assert page.locator("#slot .hv-words .hv-masked").count() == 3


def test_a_drafted_text_says_of_each_token_who_guessed_it(page: Any) -> None:
    view = page.locator(".hv-decoding")
    said, slider = view.locator('[data-part="said"]'), view.get_by_role("slider", name="Token")
    assert said.inner_text() == "Token 14: being written" and PROMPT in view.locator(".hv-words").inner_text()
    view.locator("[data-token]").nth(4).hover()
    assert said.inner_text() == "Token 5: guessed by look-up; forward 2, 6 drafted, 2 accepted; 0.3 ahead of the next best in logits"
    assert view.locator(".hv-words .hv-together").count() == 3 and view.locator("[data-bar].hv-together").count() == 1
    view.locator("[data-bar]").nth(3).hover()
    assert said.inner_text() == "Forward 4, 6 drafted, 2 accepted, 3 written"
    slider.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext").startswith("“ t0”. Token 2: guessed by look-up; forward 1")
    view.locator("[data-token]").nth(7).click()
    assert slider.input_value() == "8"
    colours = view.locator(".hv-words .hv-token").evaluate_all("tokens => new Set(tokens.map((t) => getComputedStyle(t).backgroundColor)).size")
    assert colours == 4, "the model, two drafters, and what is being written"


def test_a_drafted_text_that_grows_keeps_the_chosen_token(page: Any) -> None:
    html = [decoding({**DRAFTED, "tokens": DRAFTED["tokens"][:many]}) for many in (5, 9)]
    page.evaluate("document.body.append(Object.assign(document.createElement('div'), {id: 'growing'}))")
    put, slider = "html => hastenViews.replace(document.getElementById('growing'), html)", page.locator("#growing").get_by_role("slider", name="Token")
    for at, expected in ((None, "8"), ("2", "2")):
        page.evaluate(put, html[0])
        if at:
            slider.fill(at)
        page.evaluate(put, html[1])
        assert slider.input_value() == expected, "the end is followed, a choice stays"


def test_the_gallery_filters_by_words(page: Any) -> None:
    page.get_by_role("searchbox").fill("MOVING sev")
    assert page.locator(".hv-results li:visible").count() == 1 and page.locator('[data-part="count"]').inner_text() == "1 result"
    page.get_by_role("searchbox").fill("ten")
    assert page.get_by_text("No result has all these words.").is_visible()


def test_new_html_keeps_what_the_reader_did(page: Any) -> None:
    page.get_by_role("searchbox").fill("nine")
    state = page.evaluate(
        """() => { const slot = document.createElement('div'), root = document.querySelector('.hv-gallery');
        slot.append(root); document.body.append(slot); hastenViews.replace(slot, root.outerHTML.replace('seven', 'eight').replace(/data-started="\\d+"/, ''));
        return [slot.querySelector('input').value, slot.querySelectorAll('li:not([hidden])').length]; }"""
    )
    assert state == ["nine", 1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_no_sideways_scroll(browser: Any, file: Path, scheme: str) -> None:
    phone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    phone.goto(file.as_uri())
    phone.wait_for_timeout(500)
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    for text in ("Side by side", "Difference"):
        phone.get_by_role("radio", name=text).check()
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    phone.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Any, file: Path, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe: pip install axe-playwright-python")
    opened = browser.new_page(viewport={"width": 1100, "height": 900}, color_scheme=scheme)
    opened.goto(file.as_uri())
    opened.wait_for_timeout(500)
    found = axe.Axe().run(opened).response["violations"]
    opened.close()
    serious = {(each["id"], node["html"][:160]) for each in found if each["impact"] in ("serious", "critical") for node in each["nodes"]}
    assert not serious
