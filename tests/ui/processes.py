"""`hasten ui` as a process of its own, as a person starts it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from hasten.ui.engine import Engine

PATIENT = 120.0
"""Seconds in which a page must be there, on a machine that is busy with other tests."""


SMALL = {"kind": "compare", "model": "tiny-video", "prompt": "a seven moving left, slowly", "recipes": ["balanced"], "steps": 6, "preview": False}
"""A comparison for the front page, which would otherwise begin a larger one."""


class Page:
    """A running `hasten ui`."""

    def __init__(self, home: Path, *options: str) -> None:
        self.home, self.log = home, home / "log.txt"
        home.mkdir(exist_ok=True, parents=True)
        command = [sys.executable, "-m", "hasten", "ui", "--no-browser", "--home", str(home), "--port", "0", "--offline", *options]
        self.began = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HASTEN_TRACEBACK": "1"}, cwd=home)
        self.url = self._found()
        self.seconds = time.monotonic() - self.began

    def _found(self) -> str:
        while time.monotonic() - self.began < PATIENT:
            if found := re.search(r"http://\S+", self.log.read_text()):
                return found[0]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def filled(self) -> Page:
        """When the comparison of `seeded` is done."""
        engine = Engine(self.home)
        try:
            job = engine.wait(engine.jobs.list(kinds=("compare",))[-1].id, 5 * PATIENT)
            assert job.state == "done", job.error
        finally:
            engine.close()
        return self

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


def seeded(home: Path) -> Path:
    """A home with a small comparison in its queue."""
    engine = Engine(home)
    engine.submit(SMALL)
    engine.close()
    return home


@contextlib.contextmanager
def page(home: Path, *options: str) -> Iterator[Page]:
    """One that is ended, whatever happens."""
    found = Page(home, *options)
    try:
        yield found
    finally:
        if found.process.poll() is None:
            found.end()
