"""Views inside Gradio: nothing a user wrote runs, choices arrive, and updates keep what the reader did."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

CHROMIUM = shutil.which("chromium")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
gr = pytest.importorskip("gradio", reason="needs gradio: pip install 'hasten[ui]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
]

from hasten.ui.views import component, theme
from hasten.ui.views.gallery import gallery
from hasten.ui.views.progress import progress

NASTY = "${Object.assign(window,{PWNED:1})}{{PWNED}}<img src=x onerror='window.PWNED=1'>`"
ITEMS = [{"id": "a", "title": NASTY}, {"id": "b", "title": "a nine"}]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with gr.Blocks(analytics_enabled=False) as demo:
        found = component.shown(gallery({"items": ITEMS}), elem_id="found")
        now = component.shown(elem_id="now")
        chosen, again = gr.Textbox(label="chosen"), gr.Button("Again", variant="primary")

        def choose(event: gr.EventData) -> str:
            return str(event.id)

        found.select(choose, None, chosen)
        count = iter(range(100))

        def update() -> tuple[str, str]:
            step = next(count)
            jobs = {"state": "running", "phase": "Denoising", "step": step, "steps": 10, "message": NASTY}
            return progress(jobs), gallery({"items": [*ITEMS, {"id": "c", "title": f"a nine, {step}"}]})

        again.click(update, None, [now, found])
    _, url, _ = demo.launch(
        prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1", **component.launch_options()
    )
    yield url
    demo.close()


def test_in_gradio(address: str) -> None:
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        hosts: set[str] = set()
        page.on("request", lambda request: hosts.add(request.url.partition("://")[2].partition("/")[0].partition(":")[0]))
        page.goto(f"{address}?__theme=dark")
        page.wait_for_selector(".hv-results")
        assert NASTY in page.locator("#found").inner_text()
        page.get_by_role("button", name="a nine").click()
        page.wait_for_function("document.querySelector('textarea').value === 'b'")
        page.get_by_role("searchbox").fill("nine")
        for step in range(3):
            page.get_by_role("button", name="Again").click()
            page.locator("#now dd", has_text=f"{step} of 10").wait_for()
            if step == 0:
                page.evaluate("window.bar = document.querySelector('#now .hv-fill')")
        assert page.locator("#found li:visible").count() == 2, "what was typed still filters"
        assert page.evaluate("window.bar.isConnected"), "what changes often keeps its elements"
        assert page.evaluate("window.PWNED") is None and NASTY in page.locator("#now").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert {host for host in hosts if host} == {"127.0.0.1"}
        browser.close()


def test_the_accent_has_enough_contrast() -> None:
    def light(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        low, high = sorted((light(a), light(b)))
        return (high + 0.05) / (low + 0.05)

    for ground in (theme.ACCENT, theme.ACCENT_HOVER):
        assert contrast(theme.ON_ACCENT, ground) > 4.5
    assert contrast("#0063a6", "#ffffff") > 4.5 and contrast("#4ea8de", "#14171a") > 4.5
