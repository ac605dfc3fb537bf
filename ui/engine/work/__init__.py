"""What each kind of job does. Loops are hasten's own; here they are called, watched, and their results kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hasten.ui.engine.desk import Desk
from hasten.ui.engine.report import Report
from hasten.ui.engine.work.compare import compare
from hasten.ui.engine.work.decode import decode
from hasten.ui.engine.work.download import download
from hasten.ui.engine.work.generate import generate
from hasten.ui.engine.work.text import text
from hasten.ui.engine.work.train import train
from hasten.ui.engine.work.tune import tune

WORK: dict[str, Callable[[Any, Desk, Report], dict[str, Any]]] = {
    "generate": generate, "compare": compare, "text": text, "decode": decode, "tune": tune, "train": train, "download": download,
}  # fmt: skip
"""Kind -> what does it: (request, desk, report) -> result, plain JSON values."""
