"""Processes that share the folder of a study: one at a time where it must be so, and who of them is still alive.

By locks that the operating system lets go when a process ends, however it ends: a killed one leaves no stale lock.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Self

from hasten.atomic import atomic_write

if sys.platform != "win32":
    import fcntl
else:  # one process at a time there: nothing tells whether another one lives
    fcntl = None

ALONE = "study.lock"


class Worker:
    """This process in a study, under a name of its own, until it ends or `leave` is called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, secrets.token_hex(4)
        self._file: IO[str] = _path(folder, self.name).open("w")
        if fcntl is not None:
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def lives(self, name: str) -> bool:
        """Is the worker of that name at work? The file of one that ended is removed."""
        if name == self.name or fcntl is None:
            return name == self.name
        path = _path(self.folder, name)
        try:
            with path.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            return False
        except OSError:  # somebody holds it
            return True
        return False

    def others(self) -> int:
        """How many other workers are at work on this study."""
        names = [path.stem.removeprefix("worker-") for path in self.folder.glob("worker-*.lock")]
        return sum(self.lives(name) for name in names if name != self.name)

    def leave(self) -> None:
        """Say that this one has ended. Safe to call twice."""
        self._file.close()
        _path(self.folder, self.name).unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While it is open no other process is in the same place of the same study; the others wait."""
    with (folder / ALONE).open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class FileLock:
    """What optuna locks its journal with. Its own lock is a link that a killed process leaves, and waits 30 seconds for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    @classmethod
    def of(cls, journal: Path) -> Self | None:
        """None where the system has no such locks, and optuna's own one is taken."""
        return cls(journal.with_suffix(".lock")) if fcntl is not None else None

    def acquire(self) -> bool:
        self._file = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        if self._file is not None:
            self._file.close()


def mended(journal: Path) -> None:
    """Cut off a last line that a killed process did not finish. Only where nobody else writes."""
    if not journal.is_file():
        return
    data = journal.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        atomic_write(journal, whole)


def _path(folder: Path, name: str) -> Path:
    return folder / f"worker-{name}.lock"
