"""Who may work: one process at a time, of all that share a home. A killed one loses its lease at once.

A holder is known by its process number and when that process was born, so that a number given out again is not mistaken for it;
where the home is shared by machines, by its heartbeat.
"""

from __future__ import annotations

import os
import platform
import secrets
import sqlite3
import time

import psutil

from hasten.ui.engine.database import Database

BEAT = 5.0
"""Seconds between heartbeats of a holder."""

STALE = 60.0
"""Seconds after which a holder that cannot be looked at (another machine, another engine of this process) is taken for dead."""

INTERRUPTED = "UPDATE jobs SET state = 'interrupted', ended = ?, cancel = 0 WHERE state = 'running'"


class Lease:
    """One engine's claim on the right to work."""

    def __init__(self, database: Database) -> None:
        self.holder = secrets.token_hex(8)
        self._database = database
        self._pid, self._machine = os.getpid(), platform.node()
        self._born = psutil.Process(self._pid).create_time()

    def take(self) -> bool:
        """Have it, or keep it; False while another one has it. Whoever takes it finds nothing running: rows that say so are those
        of a holder that was killed, and become interrupted."""
        with self._database.transaction() as rows:
            found = rows.execute("SELECT * FROM lease").fetchone()
            if found is not None and found["holder"] != self.holder and self._lives(found):
                return False
            if found is None or found["holder"] != self.holder:
                rows.execute(INTERRUPTED, (time.time(),))
            values = (self.holder, self._pid, self._born, self._machine, time.time())
            rows.execute("INSERT OR REPLACE INTO lease VALUES (1, ?, ?, ?, ?, ?)", values)
        return True

    def beat(self) -> bool:
        """Say that this holder lives. False where it is not (or no longer) the holder."""
        with self._database.transaction() as rows:
            done = rows.execute("UPDATE lease SET beat = ? WHERE holder = ?", (time.time(), self.holder))
        return done.rowcount == 1

    def release(self) -> None:
        """Let others work. Safe to call twice."""
        with self._database.transaction() as rows:
            rows.execute("DELETE FROM lease WHERE holder = ?", (self.holder,))

    def sweep(self) -> None:
        """Mark what a killed process has left running as interrupted, without taking the lease."""
        with self._database.transaction() as rows:
            found = rows.execute("SELECT * FROM lease").fetchone()
            if found is None or not self._lives(found):
                rows.execute(INTERRUPTED, (time.time(),))
                rows.execute("DELETE FROM lease")

    @property
    def other(self) -> bool:
        """Does another engine have it now?"""
        found = self._database.read("SELECT * FROM lease")
        return bool(found) and found[0]["holder"] != self.holder and self._lives(found[0])

    def _lives(self, row: sqlite3.Row) -> bool:
        """Is the holder of this row at work?"""
        fresh = bool(time.time() - row["beat"] < STALE)
        if row["machine"] != self._machine or row["pid"] == self._pid:
            return fresh
        try:
            process = psutil.Process(row["pid"])
            same = abs(process.create_time() - row["born"]) < 1.0
            return bool(same and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:  # somebody else's: it is there, and no more can be known
            return fresh
