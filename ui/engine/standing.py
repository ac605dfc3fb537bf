"""Where a job stands by its row: one that waits, is over, or runs in another process."""

from __future__ import annotations

from hasten.ui.engine.jobs import Job, Jobs
from hasten.ui.engine.snapshot import Snapshot


def of_row(jobs: Jobs, row: Job) -> Snapshot:
    """What a row says. jobs: the queue that it is of."""
    found = Snapshot.of({"job": row.id, **row.snapshot})
    if row.state == "queued":
        ahead = jobs.ahead(row.id)
        words = (f"{ahead} before it" if ahead else "", "the queue is paused" if jobs.paused else "")
        return Snapshot(row.id, 0, "queued", "Waiting", note=", ".join(filter(None, words)))
    number = found.number + 1 if row.over else found.number
    return Snapshot.of(found.to_dict() | {"state": row.state, "number": number, "phase": _phase(row, found)})


def _phase(row: Job, found: Snapshot) -> str:
    words = {"done": "Done", "failed": "Failed", "cancelled": "Cancelled", "interrupted": "Interrupted"}
    return words.get(row.state, found.phase or "Starting")
