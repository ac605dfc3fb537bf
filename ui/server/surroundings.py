"""The process around the page: an empty folder to stand in, temporary files nobody else can read, and nobody told about it.

Gradio copies files that a handler names from the present folder and from the temporary one, so neither may hold anything.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from hasten.errors import OutputError

QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
NO_HUB = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@contextlib.contextmanager
def prepared(folder: Path, offline: bool = False) -> Iterator[Path]:
    """For a process of its own, before Gradio is imported. folder: below which temporary files may lie; those of processes that
    were killed are removed. Yields the folder with all of this one's, which is gone afterwards. Raises `OutputError`."""
    here = Path.cwd()
    mine = folder / f"web-{os.getpid()}"
    try:
        for left in folder.glob("web-*"):
            if not _lives(left):
                shutil.rmtree(left, ignore_errors=True)
        for each in (mine, mine / "files", mine / "empty"):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot make the folder {mine}: {error.strerror}. Name another one by --home.") from error
    os.environ |= QUIET | (NO_HUB if offline else {}) | {"GRADIO_TEMP_DIR": str(mine / "files")}
    os.chdir(mine / "empty")
    try:
        yield mine
    finally:
        os.chdir(here)
        shutil.rmtree(mine, ignore_errors=True)


def _lives(left: Path) -> bool:
    number = left.name.removeprefix("web-")
    return not number.isdecimal() or psutil.pid_exists(int(number))
