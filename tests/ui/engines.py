"""Engines for tests: a home of their own, and a folder with small models of random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hasten.ui.engine import Engine, Job, Snapshot
from tests.hosts import PIXART_CALL, WAN_CALL, saved, small_pixart, small_wan

VIDEO = {"kind": "generate", "model": "tiny-video", "prompt": "a seven moving left, slowly", "steps": 6}
IMAGE = {"kind": "generate", "model": "tiny-image", "prompt": "a three", "steps": 6, "recipe": "plain", "preview": False}
TEXT = {"kind": "text", "model": "tiny-dllm", "prompt": "sort: i p m d n k j . =", "length": 16}


def models_folder(root: Path) -> Path:
    """A models folder with a video and an image model: `folder:wan` and `folder:sets/pixart`."""
    for name, pipe, call in (("wan", small_wan(), WAN_CALL), ("sets/pixart", small_pixart(), PIXART_CALL)):
        folder = saved(pipe, root / name)
        (folder / "hasten.json").write_text(json.dumps({"call": call, "licence": "Apache-2.0"}))
    return root


def done(engine: Engine, asked: dict[str, Any], seconds: float = 600.0) -> Job:
    """Submit, wait, and give the job, which must have been done."""
    job = engine.wait(engine.submit(asked).id, seconds)
    assert job.state == "done", job.error
    return job


def until(snapshots: Iterator[Snapshot], phase: str, step: int = 0) -> Snapshot:
    """Follow to the first snapshot of a phase, at a step or behind it."""
    for snapshot in snapshots:
        if snapshot.phase.startswith(phase) and snapshot.step >= step:
            return snapshot
        assert snapshot.state in ("queued", "running"), snapshot
    raise AssertionError(f"it ended before {phase}")
