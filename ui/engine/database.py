"""One SQLite file for all processes: jobs, the lease, and whether the queue is paused. Opened by each, written in short transactions."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hasten.errors import OutputError

VERSION = 1
PATIENCE = 30.0
"""Seconds that a transaction waits for one of another process."""

TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
  place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, state TEXT NOT NULL, request TEXT NOT NULL,
  snapshot TEXT, result TEXT, error TEXT, holder TEXT, cancel INTEGER NOT NULL DEFAULT 0, again_of TEXT,
  made REAL NOT NULL, began REAL, ended REAL);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, place);
CREATE TABLE IF NOT EXISTS lease (
  only INTEGER PRIMARY KEY CHECK (only = 1), holder TEXT NOT NULL, pid INTEGER NOT NULL, born REAL NOT NULL, machine TEXT NOT NULL,
  beat REAL NOT NULL);
CREATE TABLE IF NOT EXISTS pause (only INTEGER PRIMARY KEY CHECK (only = 1));
"""


class Database:
    """One connection for all threads of a process, one at a time."""

    def __init__(self, file: Path) -> None:
        """Open it, made where there is none. Raises `OutputError` where that cannot be, or where a newer hasten has written it."""
        self.file = file
        self._lock = threading.RLock()
        try:
            self._open = sqlite3.connect(file, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            self._open.row_factory = sqlite3.Row
            self._open.execute("PRAGMA journal_mode = WAL")
            self._open.execute("PRAGMA synchronous = NORMAL")
            found = self._open.execute("PRAGMA user_version").fetchone()[0]
            if found in (0, VERSION):
                self._open.executescript(TABLES)
                self._open.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.Error as error:
            raise OutputError(f"The job list {file} cannot be opened: {error}. Move it away, or set HASTEN_HOME to another folder.") from error
        if found not in (0, VERSION):
            self._open.close()
            raise OutputError(f"The job list {file} was written by a newer hasten (version {found}, known: {VERSION}). Update hasten, or move it away.")

    def read(self, query: str, values: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        """Rows, as they stand now."""
        with self._lock:
            return self._open.execute(query, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, alone among all processes. Raises `OutputError` where it cannot be written."""
        with self._lock:
            try:
                self._open.execute("BEGIN IMMEDIATE")
                try:
                    yield self._open
                except BaseException:
                    self._open.execute("ROLLBACK")
                    raise
                self._open.execute("COMMIT")
            except sqlite3.OperationalError as error:
                if self._open.in_transaction:
                    self._open.execute("ROLLBACK")
                raise OutputError(f"The job list {self.file} cannot be written: {error}. Free some space on the disk, or check its rights.") from error

    def close(self) -> None:
        """Safe to call twice."""
        with self._lock:
            self._open.close()
