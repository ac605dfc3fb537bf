"""Who does the work: a thread for the bundled models, one spawned process for everything else. One job at a time.

The process lives on between jobs, so that its model stays warm. Where it dies (the system kills it for its memory, a driver
crashes), the page does not: the job fails with words, and the next one finds a new process.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from multiprocessing.process import BaseProcess
from typing import Any

from hasten.errors import HastenError
from hasten.ui.engine.cancel import Cancelled
from hasten.ui.engine.child import serve
from hasten.ui.engine.desk import Desk
from hasten.ui.engine.models import Models
from hasten.ui.engine.place import Place
from hasten.ui.engine.report import Tell
from hasten.ui.engine.request import Request, Train, to_json
from hasten.ui.engine.snapshot import Snapshot
from hasten.ui.engine.trouble import Trouble, again

GRACE = 30.0
"""Seconds after which a process that was told to stop and does not is ended."""


class Failed(HastenError):
    """A job that failed in the worker's process. trouble: what it said."""

    def __init__(self, trouble: Trouble) -> None:
        self.trouble = trouble
        super().__init__(trouble.sentence)


class Worker:
    """Does jobs for one engine, in its dispatcher's thread or in a process of its own.

    apart: whether a job gets the process; None: all but those of bundled models, and trainings, which have no other clean stop.
    """

    def __init__(self, place: Place, apart: bool | None = None, grace: float = GRACE) -> None:
        self._place, self._apart, self._grace = place, apart, grace
        self._models = Models(place)
        self._desk = Desk(place)
        self._process: _Process | None = None

    def perform(self, job: str, request: Request, tell: Tell, stop: threading.Event) -> dict[str, Any]:
        """Do a job; its result. Raises `Cancelled` once it has really stopped, `Failed` or what went wrong."""
        if not self._is_apart(request):
            return self._desk.perform(job, request, tell, stop.is_set)
        if self._process is not None and not self._process.alive:
            self._process.close()
            self._process = None
        if self._process is None:
            self._process = _Process(self._place)
        try:
            return self._process.perform(job, request, tell, stop, self._grace)
        finally:
            if not self._process.alive:
                self._process.close()
                self._process = None

    @property
    def pid(self) -> int | None:
        """Of the process; None where there is none now."""
        return self._process.pid if self._process is not None else None

    def unload(self) -> None:
        """Give back all memory that models take."""
        self._desk.unload()
        self.close()

    def close(self) -> None:
        """End the process. Safe to call twice."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _is_apart(self, request: Request) -> bool:
        if self._apart is not None:
            return self._apart
        return self._models.apart(request.model) or isinstance(request, Train)


class _Process:
    """A spawned process and the pipe to it. Small plain values go through the pipe, frames through files."""

    def __init__(self, place: Place) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._stop = spawn.Event()
        self._pipe, theirs = spawn.Pipe()
        self._process: BaseProcess = spawn.Process(target=serve, args=(theirs, self._stop, place), name="hasten-worker", daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def perform(self, job: str, request: Request, tell: Tell, stop: threading.Event, grace: float) -> dict[str, Any]:
        self._stop.clear()
        asked: float | None = None
        try:
            self._pipe.send({"job": job, "request": to_json(request)})
            while True:
                if stop.is_set() and asked is None:
                    self._stop.set()
                    asked = time.monotonic()
                if asked is not None and time.monotonic() - asked > grace:
                    self._process.kill()
                    self._process.join()
                    raise Cancelled
                if self._pipe.poll(0.05) and (answer := self._heard(self._pipe.recv(), tell)) is not None:
                    return answer
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(5)
            if stop.is_set():
                raise Cancelled from None
            raise Failed(Trouble("crash", _how(self._process.exitcode), "", (again(request),))) from None

    def _heard(self, message: dict[str, Any], tell: Tell) -> dict[str, Any] | None:
        """The result where it is one; a snapshot is handed on."""
        if "snapshot" in message:
            tell(Snapshot.of(message["snapshot"]))
            return None
        if "cancelled" in message:
            raise Cancelled
        if "trouble" in message:
            raise Failed(message["trouble"])
        result: dict[str, Any] = message["result"]
        return result

    def close(self) -> None:
        """End it, however busy it is."""
        self._stop.set()
        self._pipe.close()  # it reads the end of the pipe, and ends
        self._process.join(2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _how(code: int | None) -> str:
    """In words, how a process ended."""
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = str(-code)
        memory = " Most often the system ends a process so when memory runs out." if name == "SIGKILL" else ""
        return f"The worker's process crashed ({name}).{memory} The next job starts a new one, and the queue goes on."
    return f"The worker's process ended by itself (exit code {code}). The next job starts a new one, and the queue goes on."

