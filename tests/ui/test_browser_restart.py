"""Killed and started again, and started and stopped two hundred times: nothing is lost, nothing piles up."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from hasten.ui.engine import Engine
from tests.ui.browsers import MARKS, PATIENT, chromium, fill, show, sync_api, visit
from tests.ui.processes import page as started
from tests.ui.processes import seeded
from tests.ui.sites import client

sync_api()
pytestmark = [*MARKS, pytest.mark.timeout(1800)]
CYCLES, WARM, RELOADED = 200, 50, 10


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return seeded(tmp_path / "home")


@pytest.mark.long
def test_after_a_kill_the_page_says_interrupted_and_tries_again(home: Path) -> None:
    with chromium() as browser:
        with started(home) as served:
            with visit(browser, served.filled().url) as tab:
                show(tab, "Generate")
                fill(tab, "generate", prompt="a five moving up", steps=200)
                tab.locator("#generate-run").click()
                sync_api().expect(tab.locator("#generate-result")).to_be_visible()
                engine = Engine(home)
                job = _until(lambda: next((each for each in engine.jobs.list(1, ("running",), ("generate",))), None))
            served.end(signal.SIGKILL)
        assert list((home / "ui").glob("web-*")), "what a kill leaves behind"
        with started(home) as served, visit(browser, served.url) as tab:
            assert engine.job(job.id).state == "interrupted"
            show(tab, "Generate")
            sync_api().expect(tab.locator(".hv-progress:visible")).to_contain_text("Interrupted", timeout=PATIENT)
            assert len(list((home / "ui").glob("web-*"))) == 1, "the killed one's files are swept"
            tab.get_by_role("button", name="Try again").locator("visible=true").first.click()
            again = _until(lambda: next((each for each in engine.jobs.list(1, kinds=("generate",)) if each.id != job.id), None))
            assert again.asked["steps"] == 200 and again.asked["prompt"] == "a five moving up"
            engine.cancel(again.id)
        engine.close()


@pytest.mark.slow
def test_two_hundred_jobs_and_reloads_leave_memory_and_threads_flat(home: Path) -> None:
    """Each cycle submits, looks, cancels; every tenth opens the page in a browser and leaves it while a job runs."""
    sizes, threads = [], []
    with chromium() as browser, started(home) as served, client(served.url) as web:
        process = psutil.Process(served.process.pid)
        clip = {"model": "tiny-video", "prompt": "a seven", "steps": 100, "recipe": "plain", "size": "32x32", "frames": 5}
        with visit(browser, served.filled().url) as tab:
            for cycle in range(CYCLES):
                job = web.post("/v1/videos", json=clip).json()["id"]
                if cycle % RELOADED == 0:
                    tab.reload()
                    tab.locator("#compare-player video").first.wait_for()
                assert web.get("/").status_code == 200
                assert web.delete(f"/v1/videos/{job}").status_code == 200
                _until(lambda job=job: web.get(f"/v1/videos/{job}").json()["status"] == "cancelled")
                sizes.append(process.memory_info().rss / 2**20)
                threads.append(process.num_threads())
    early, late = sizes[WARM : WARM + 20], sizes[-20:]
    assert min(late) - min(early) < 60, f"MiB: {early} -> {late}"
    assert max(threads[-20:]) <= max(threads[WARM : WARM + 20]) + 4, threads


def _until(found: Callable[[], Any], seconds: float = 120.0) -> Any:
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return value
