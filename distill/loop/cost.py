"""What a training has cost, summed over all times it was resumed: processor seconds and the most memory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hasten.atomic import atomic_write

FILE = "cost.json"


@contextmanager
def metered(out: Path, what: str) -> Iterator[None]:
    """Add to `cost.json` below `out`: `<what>_seconds` of all threads of this process, and `peak_bytes`, the most memory that
    the process (on CUDA: torch's allocator) has held so far, libraries included."""
    started = time.process_time()
    try:
        yield
    finally:
        if out.is_dir() and {file.name for file in out.iterdir()} - {"config.json", ".lock"}:  # refused: nothing was made
            found = read(out)
            found[f"{what}_seconds"] = round(found.get(f"{what}_seconds", 0.0) + time.process_time() - started, 1)
            found["peak_bytes"] = max(found.get("peak_bytes", 0.0), _peak())
            atomic_write(out / FILE, json.dumps(found) + "\n")


def read(out: Path) -> dict[str, float]:
    """`cost.json` below `out`; {} where there is none."""
    file = out / FILE
    found: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def _peak() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows has no such counter
        return 0.0
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(kibibytes * 1024)
