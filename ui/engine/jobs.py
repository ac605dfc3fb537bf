"""The queue: rows of jobs with what was asked, how far it is, and what came of it. `place` is the order in which they are done."""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hasten.errors import UsageError
from hasten.ui.engine.database import Database
from hasten.ui.engine.limits import Limits, RequestError
from hasten.ui.engine.request import Request, read, to_json

State = Literal["queued", "running", "done", "failed", "cancelled", "interrupted"]
ENDED: frozenset[str] = frozenset({"done", "failed", "cancelled", "interrupted"})
"""States in which nothing happens any more. interrupted: the process that ran it was killed; it may be tried again."""

Where = Literal["first", "up", "down", "last"]
"""Where a waiting job may be moved, among those that wait."""


@dataclass(frozen=True, slots=True)
class Job:
    """One row. snapshot: as `Snapshot.to_dict`, the last that was written. result: what its kind gives (`work`). error: as
    `Trouble.to_dict`. again_of: the job that this one tries again. cancel: it was told to stop. made, began, ended: Unix
    seconds."""

    id: str
    kind: str
    state: State
    asked: dict[str, Any]
    snapshot: dict[str, Any]
    result: dict[str, Any]
    error: dict[str, Any]
    cancel: bool
    again_of: str | None
    made: float
    began: float | None
    ended: float | None

    @property
    def over(self) -> bool:
        return self.state in ENDED

    @property
    def request(self) -> Request:
        """What was asked, read again: an older hasten may have allowed what is not any more (`RequestError`)."""
        return read(self.asked)

    @classmethod
    def of(cls, row: sqlite3.Row) -> Job:
        return cls(
            row["id"], row["kind"], row["state"], json.loads(row["request"]), _dict(row["snapshot"]), _dict(row["result"]),
            _dict(row["error"]), bool(row["cancel"]), row["again_of"], row["made"], row["began"], row["ended"],
        )  # fmt: skip


class Jobs:
    """All jobs of a home. Every change is one transaction, so that threads and processes may all call these."""

    def __init__(self, database: Database, limits: Limits | None = None) -> None:
        self._database, self._limits = database, limits or Limits()

    # --- what views do ----------------------------------------------------------------------------

    def submit(self, request: Request, again_of: str | None = None) -> Job:
        """Put it at the end of the queue. Raises `RequestError` where too many wait already."""
        name = secrets.token_hex(8)
        with self._database.transaction() as rows:
            waiting = rows.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()[0]
            if waiting >= self._limits.max_queue:
                raise RequestError("queue", f"{waiting} waiting jobs", f"at most {self._limits.max_queue}", "Wait, or remove some.")
            rows.execute(
                "INSERT INTO jobs (id, kind, state, request, made, again_of) VALUES (?, ?, 'queued', ?, ?, ?)",
                (name, request.kind, to_json(request), time.time(), again_of),
            )
        return self.get(name)

    def get(self, job: str) -> Job:
        """Raises `UsageError` where there is no such job."""
        found = self._database.read("SELECT * FROM jobs WHERE id = ?", (job,))
        if not found:
            raise UsageError(f"There is no job {job[:32]!r}. It may have been removed; look at the list.")
        return Job.of(found[0])

    def list(self, limit: int = 50, states: Iterable[str] = get_args(State), kinds: Iterable[str] = ()) -> list[Job]:
        """Newest first."""
        chosen, named = tuple(states), tuple(kinds)
        where = f"state IN ({','.join('?' * len(chosen))})" + (f" AND kind IN ({','.join('?' * len(named))})" if named else "")
        found = self._database.read(f"SELECT * FROM jobs WHERE {where} ORDER BY made DESC, place DESC LIMIT ?", (*chosen, *named, limit))
        return [Job.of(row) for row in found]

    def queue(self) -> tuple[Job, ...]:
        """Those that wait, the next one first."""
        return tuple(Job.of(row) for row in self._database.read("SELECT * FROM jobs WHERE state = 'queued' ORDER BY place"))

    def move(self, job: str, to: Where) -> None:
        """Another turn for a waiting job. Raises `UsageError` for one that does not wait, or a place that is none."""
        if to not in get_args(Where):
            raise UsageError(f"A job cannot be moved {str(to)[:32]!r}. Say one of {', '.join(get_args(Where))}.")
        with self._database.transaction() as rows:
            found = rows.execute("SELECT id, place FROM jobs WHERE state = 'queued' ORDER BY place").fetchall()
            order = [row["id"] for row in found]
            if job in order:
                at = order.index(job)
                order.insert({"first": 0, "up": max(0, at - 1), "down": at + 1, "last": len(order)}[to], order.pop(at))
                # Places are unique at every moment, so they are all left before any is taken.
                rows.executemany("UPDATE jobs SET place = ? WHERE id = ?", [(-1 - number, name) for number, name in enumerate(order)])
                rows.executemany("UPDATE jobs SET place = ? WHERE id = ?", [(row["place"], name) for row, name in zip(found, order, strict=True)])
                return
        raise UsageError(f"Job {job} is {self.get(job).state}; only those that wait can be moved.")

    @property
    def paused(self) -> bool:
        """Is nothing begun, whatever waits?"""
        return bool(self._database.read("SELECT 1 FROM pause"))

    def pause(self) -> None:
        """Begin nothing more, in whatever process, until `resume`, also after a restart. What runs goes on."""
        with self._database.transaction() as rows:
            rows.execute("INSERT OR IGNORE INTO pause VALUES (1)")

    def resume(self) -> None:
        """Go on with what waits."""
        with self._database.transaction() as rows:
            rows.execute("DELETE FROM pause")

    def ahead(self, job: str) -> int:
        """How many jobs are before this one: running or waiting."""
        query = "SELECT count(*) FROM jobs WHERE state IN ('queued', 'running') AND place < (SELECT place FROM jobs WHERE id = ?)"
        return int(self._database.read(query, (job,))[0][0])

    def cancel(self, job: str) -> Job:
        """A waiting job is cancelled at once, a running one is told to stop; one that is over stays as it is."""
        with self._database.transaction() as rows:
            rows.execute("UPDATE jobs SET state = 'cancelled', ended = ? WHERE id = ? AND state = 'queued'", (time.time(), job))
            rows.execute("UPDATE jobs SET cancel = 1 WHERE id = ? AND state = 'running'", (job,))
        return self.get(job)

    def retry(self, job: str) -> Job:
        """The same again, at the end of the queue. Raises `UsageError` for a job that is not over."""
        found = self.get(job)
        if not found.over:
            raise UsageError(f"Job {job} is {found.state}. Wait for it, or cancel it first.")
        return self.submit(read(found.asked, self._limits), again_of=job)

    def remove(self, job: str) -> None:
        """Forget it. Raises `UsageError` while it runs."""
        with self._database.transaction() as rows:
            gone = rows.execute("DELETE FROM jobs WHERE id = ? AND state != 'running'", (job,))
        if not gone.rowcount:
            self.get(job)
            raise UsageError(f"Job {job} is running. Cancel it first.")

    # --- what the worker does ---------------------------------------------------------------------

    def start(self, holder: str) -> Job | None:
        """Begin the first waiting job; None where none waits or the queue is paused. holder: who has the lease. In one transaction, and only for a row
        that still waits: a job that is cancelled while it is taken is never begun."""
        with self._database.transaction() as rows:
            query = (
                "UPDATE jobs SET state = 'running', holder = ?, began = ?, snapshot = NULL WHERE place ="
                " (SELECT min(place) FROM jobs WHERE state = 'queued') AND state = 'queued'"
                " AND NOT EXISTS (SELECT 1 FROM pause) AND EXISTS (SELECT 1 FROM lease WHERE lease.holder = ?) RETURNING id"
            )
            found = rows.execute(query, (holder, time.time(), holder)).fetchone()
        return self.get(found["id"]) if found is not None else None

    def told_to_stop(self, job: str) -> bool:
        """Has somebody, in whatever process, cancelled or removed it?"""
        found = self._database.read("SELECT cancel FROM jobs WHERE id = ? AND state = 'running'", (job,))
        return not found or bool(found[0]["cancel"])

    def progress(self, job: str, snapshot: dict[str, Any]) -> None:
        """Let other processes see where it stands."""
        with self._database.transaction() as rows:
            rows.execute("UPDATE jobs SET snapshot = ? WHERE id = ? AND state = 'running'", (json.dumps(snapshot), job))

    def finish(self, job: str, holder: str, state: State, result: dict[str, Any] | None = None, error: dict[str, Any] | None = None) -> None:
        """It is over. Nothing happens where it is not this holder's any more."""
        values = (state, json.dumps(result or {}), json.dumps(error or {}), time.time(), job, holder)
        with self._database.transaction() as rows:
            rows.execute(
                "UPDATE jobs SET state = ?, result = ?, error = ?, ended = ?, cancel = 0 WHERE id = ? AND holder = ? AND state = 'running'",
                values,
            )

    def waiting(self) -> bool:
        """Is there a job to begin?"""
        return bool(self._database.read("SELECT 1 FROM jobs WHERE state = 'queued' AND NOT EXISTS (SELECT 1 FROM pause) LIMIT 1"))


def _dict(text: str | None) -> dict[str, Any]:
    found = json.loads(text) if text else {}
    return found if isinstance(found, dict) else {}
