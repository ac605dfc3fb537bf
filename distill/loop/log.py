"""The log of a training: a line of JSON per step, always, and a tracker where one is asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from hasten.distill.loop.settings import Tracker
from hasten.distill.loop.state import truncate_log
from hasten.errors import UsageError

Row = Mapping[str, float]


def check_tracker(tracker: Tracker) -> None:
    """Raises `UsageError` for a tracker whose package is not there."""
    if tracker != "none" and find_spec(tracker) is None:
        raise UsageError(
            f"train.report_to = {tracker} needs the package {tracker}, which is not installed. pip install {tracker}, or leave it"
            " out: log.jsonl is always written."
        )


class Log:
    """A file of JSON lines from step `start` on, and its rows for a tracker. Without a file nothing is written: for all
    processes but the first. earlier: the rows before `start`."""

    def __init__(
        self, file: Path | None, start: int = 0, tracker: Tracker = "none", about: Mapping[str, object] | None = None
    ) -> None:
        self.earlier: list[dict[str, float]] = []
        self._lines: IO[str] | None = None
        self._tracker: _Nobody | _Board | _Trackio = _Nobody()
        if file is None:
            return
        check_tracker(tracker)
        truncate_log(file, start)
        self.earlier = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        self._lines = file.open("a", buffering=1)  # who looks at it while it runs sees whole lines, and all of them
        self._tracker = {"none": _Nobody, "tensorboard": _Board, "trackio": _Trackio}[tracker](file.parent, about or {})

    def write(self, step: int, row: Row) -> None:
        """A step's numbers, to six digits."""
        if self._lines is None:
            return
        rounded = {name: float(f"{value:.6g}") for name, value in row.items()}
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 1), **rounded}) + "\n")
        self._tracker.take(step, rounded)

    def flush(self) -> None:
        """Let everything stand in the file."""
        if self._lines is not None:
            self._lines.flush()

    def close(self) -> None:
        """End it; nothing may be written afterwards."""
        if self._lines is not None:
            self._lines.close()
        self._tracker.end()


class _Nobody:
    """No tracker."""

    def __init__(self, out: Path = Path(), about: Mapping[str, object] | None = None) -> None:
        pass

    def take(self, step: int, row: Row) -> None:
        """A step's numbers."""

    def end(self) -> None:
        """Nothing comes any more."""


class _Board(_Nobody):
    """Tensorboard's files in `out/tensorboard`."""

    def __init__(self, out: Path, about: Mapping[str, object]) -> None:
        self._writer: Any = import_module("torch.utils.tensorboard").SummaryWriter(str(out / "tensorboard"))
        self._writer.add_text("settings", json.dumps(about, indent=1))

    def take(self, step: int, row: Row) -> None:
        for key, value in row.items():
            self._writer.add_scalar(key.replace(".", "/"), value, step)

    def end(self) -> None:
        self._writer.close()


class _Trackio(_Nobody):
    """A run of trackio's project `hasten`, named after the folder."""

    def __init__(self, out: Path, about: Mapping[str, object]) -> None:
        self._trackio: Any = import_module("trackio")
        self._trackio.init(project="hasten", name=out.name, config=dict(about))

    def take(self, step: int, row: Row) -> None:
        self._trackio.log(dict(row), step=step)

    def end(self) -> None:
        self._trackio.finish()
