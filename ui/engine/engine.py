"""The engine: one home, one queue, one worker. Everything that a page, an API or a command line asks for is a method here."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hasten.errors import OutputError, UsageError
from hasten.ui.engine import export, latents, preview, restore
from hasten.ui.engine.cancel import Cancelled
from hasten.ui.engine.database import Database
from hasten.ui.engine.jobs import Job, Jobs, State, Where
from hasten.ui.engine.lease import BEAT, Lease
from hasten.ui.engine.limits import Limits
from hasten.ui.engine.models import Models
from hasten.ui.engine.outputs import Outputs
from hasten.ui.engine.place import Place, usual_home
from hasten.ui.engine.request import Request, read
from hasten.ui.engine.snapshot import Board, Snapshot
from hasten.ui.engine.standing import of_row
from hasten.ui.engine.trouble import Trouble, tried
from hasten.ui.engine.worker import Failed, Worker

WRITTEN = 0.5
"""Seconds between two writings of a running job's snapshot into its row, at least."""

LOOKED = 0.5
"""Seconds between two looks at the table: for jobs of other processes, and for their cancellations."""


class Engine:
    """Jobs of one home, done one at a time by whichever engine of that home has the lease.

    home: None for `HASTEN_HOME` or the user's cache folder. models, loras: folders with models and LoRAs of one's own; loras
    None: `loras` below the models folder. offline: never fetch. apart: whether jobs get a process of their own, None for all but
    those of bundled models. Methods may be called from any thread.
    """

    def __init__(
        self, home: Path | str | None = None, *, models: Path | str | None = None, loras: Path | str | None = None, limits: Limits | None = None,
        offline: bool = False, apart: bool | None = None, device: str | None = None, dtype: str | None = None,
    ) -> None:  # fmt: skip
        folder = Path(models).expanduser().absolute() if models is not None else None
        styles = Path(loras).expanduser().absolute() if loras is not None else folder / "loras" if folder is not None else None
        where = Path(home).expanduser().absolute() if home is not None else usual_home()
        self.place = Place(where, folder, styles, offline, limits or Limits(), device, dtype)
        self.place.make()
        self.limits = self.place.limits
        self._database = Database(self.place.jobs)
        self.jobs = Jobs(self._database, self.limits)
        self.models, self.outputs = Models(self.place), Outputs(self.place)
        self._lease = Lease(self._database)
        self._board = Board()
        self._worker = Worker(self.place, apart)
        self._threads: list[threading.Thread] = []
        self._wake, self._ended = threading.Event(), threading.Event()
        self._running: tuple[str, threading.Event] | None = None
        self._holds = False
        self._lease.sweep()

    # --- starting and stopping --------------------------------------------------------------------

    def start(self) -> Self:
        """Begin to work on the queue. Safe to call twice."""
        if not self._threads:
            self._ended.clear()
            self._threads = [threading.Thread(target=work, name=f"hasten-{work.__name__.strip('_')}", daemon=True) for work in (self._work, self._watch)]
            for thread in self._threads:
                thread.start()
        return self

    def stop(self) -> None:
        """Stop working: a running job becomes interrupted, and may be tried again. Safe to call twice."""
        self._ended.set()
        self._wake.set()
        if (running := self._running) is not None:
            running[1].set()
        for thread in self._threads:
            thread.join()
        self._threads = []
        self._worker.unload()

    def close(self) -> None:
        """Stop, and let go of the table. Nothing may be asked afterwards."""
        self.stop()
        self._database.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    # --- jobs -------------------------------------------------------------------------------------

    def submit(self, request: object) -> Job:
        """Put a request (a `Request`, a mapping or JSON text) at the end of the queue. Raises `RequestError` for what is not
        allowed, `ModelError` for a model that is not there."""
        found = read(request, self.limits)
        card = self.models.card(found.model)
        if found.kind != "download" and card.where != "remote":
            self.models.source(found.model)
        job = self.jobs.submit(found)
        self._wake.set()
        return job

    def job(self, job: str) -> Job:
        """A row as it is now. Raises `UsageError` where there is none."""
        return self.jobs.get(job)

    def cancel(self, job: str) -> Job:
        """Tell it to stop; it has when its state says so."""
        found = self.jobs.cancel(job)
        if (running := self._running) is not None and running[0] == job:
            running[1].set()
        self._board.wake()
        return found

    def move(self, job: str, to: Where) -> None:
        """Another turn for a job that waits: first, up, down or last. Raises `UsageError` for one that does not wait."""
        self.jobs.move(job, to)
        self._board.wake()

    def pause(self) -> None:
        """Begin nothing more, in whatever process, until `resume`, also after a restart. What runs goes on."""
        self.jobs.pause()
        self._board.wake()

    def resume(self) -> None:
        """Go on with what waits."""
        self.jobs.resume()
        self._wake.set()
        self._board.wake()

    def retry(self, job: str) -> Job:
        """The same again, as a new job."""
        found = self.jobs.retry(job)
        self._wake.set()
        return found

    def remove(self, job: str) -> None:
        """Forget a job that does not run. Its results stay."""
        self.jobs.remove(job)
        latents.remove(self.place, job)

    def remedies(self, job: Job) -> list[dict[str, Any]]:
        """What one click would try of a job that gave nothing: [{"label", "request"}]. Where it had denoised all, what is tried
        first is to decode that again."""
        if job.state not in ("failed", "interrupted"):
            return []
        full = job.error.get("kind") in ("memory", "crash", None)  # a system that is full ends processes without a word
        return [*latents.remedies(self.place, job.id, job.asked, full), *tried(job.asked, job.error)]

    def follow(self, job: str) -> Iterator[Snapshot]:
        """Where the job stands, the newest each time, until it is over; the last has its final state. A slow reader misses
        some, and holds up nobody. Ends when the engine is stopped, too. Raises `UsageError` where there is no such job."""
        seen: tuple[int, str] = (-1, "")
        while True:
            found = self._board.get(job)
            if found is None:
                stopped = self._ended.is_set() and self._running is None  # nobody here will say more
                row = self.jobs.get(job)
                found = of_row(self.jobs, row)
                if row.over or stopped:
                    yield found
                    return
            if (found.number, found.state) != seen and found.number >= seen[0]:
                seen = (found.number, found.state)
                yield found
            self._board.newer(job, seen[0], LOOKED)

    def wait(self, job: str, seconds: float = 600.0) -> Job:
        """The job when it is over. Raises `UsageError` where it is not in time."""
        until = time.monotonic() + seconds
        for _ in self.follow(job):
            if time.monotonic() > until:
                break
        found = self.jobs.get(job)
        if not found.over:
            raise UsageError(f"Job {job} is {found.state} after {seconds:.0f} s. Wait longer, or cancel it.")
        return found

    def snapshot(self, job: str) -> Snapshot:
        """Where it stands now."""
        return self._board.get(job) or of_row(self.jobs, self.jobs.get(job))

    # --- files ------------------------------------------------------------------------------------

    def preview(self, name: str) -> bytes | None:
        """The picture of a snapshot's `preview` as PNG, or a newer one of that job; None where there is none any more."""
        return preview.read(self.place, name)

    def sample(self, job: str, name: str) -> Path:
        """A picture that a training has drawn (`Snapshot.data["samples"]`). Raises `UsageError` for a name that is none."""
        from hasten.ui.engine.work.study import folder_of

        folder = folder_of(self.place, self.jobs.get(job).request) / "samples"
        known = {file.name: file for file in folder.glob("*.png")} if folder.is_dir() else {}
        if name not in known:
            raise UsageError(f"There is no sample {name[:40]!r} of job {job}.")
        return known[name]

    def restore(self, data: bytes) -> Request:
        """The request that a file was made by: PNG, MP4, GIF, JSON or YAML. Raises `RequestError`."""
        return restore.restore(data, self.limits, self.place.folder)

    def python(self, request: object) -> str:
        """A program that makes the same, ready to run."""
        return export.python(read(request, self.limits), self.models, self.outputs)

    def yaml(self, request: object) -> str:
        """The recipe as YAML, with the command that uses it and the whole request in its head."""
        return export.yaml(read(request, self.limits), self.models, self.outputs)

    def unload(self) -> None:
        """Give back the memory of models that are kept warm. Raises `UsageError` while a job runs."""
        if self._running is not None:
            raise UsageError("A job is running. Cancel it first, or wait for it.")
        self._worker.unload()

    # --- the two threads --------------------------------------------------------------------------

    def _work(self) -> None:
        """Take the lease while there is something to do, and do it."""
        while not self._ended.is_set():
            self._wake.wait(LOOKED)
            self._wake.clear()
            try:
                while not self._ended.is_set() and self.jobs.waiting() and self._lease.take():
                    if not self._holds:
                        self.outputs.sweep()  # only a holder makes results, so these are of one that was killed
                        latents.sweep(self.place)
                    self._holds = True
                    job = self.jobs.start(self._lease.holder)
                    if job is not None:
                        self._run(job)
                if self._holds:
                    self._holds = False
                    self._lease.release()
                elif self._lease.other:
                    self._worker.unload()  # the device is somebody else's now
            except OutputError:  # a full disk: the table is tried again, and jobs stay as they are
                self._ended.wait(2 * LOOKED)
        if self._holds:
            self._lease.release()

    def _watch(self) -> None:
        """Keep the lease alive, and hear what other processes have cancelled."""
        beaten = time.monotonic()
        while not self._ended.wait(LOOKED):
            try:
                if (running := self._running) is not None and self.jobs.told_to_stop(running[0]):
                    running[1].set()
                if self._holds and time.monotonic() - beaten > BEAT:
                    self._lease.beat()
                    beaten = time.monotonic()
            except OutputError:
                continue

    def _run(self, job: Job) -> None:
        """One job from its first snapshot to its last state. Nothing that it does ends the queue."""
        stop = threading.Event()
        self._running = (job.id, stop)
        self._board.put(Snapshot(job.id, state="running", phase="Starting"))
        written = [0.0]

        def tell(snapshot: Snapshot) -> None:
            self._board.put(snapshot.but(phase="Stopping") if stop.is_set() else snapshot)
            if time.monotonic() - written[0] > WRITTEN:
                written[0] = time.monotonic()
                self.jobs.progress(job.id, snapshot.to_dict())

        state: State = "done"
        result: dict[str, Any] = {}
        error: dict[str, Any] = {}
        try:
            if self.jobs.told_to_stop(job.id) or self._ended.is_set():  # it was cancelled while it was taken
                raise Cancelled
            result = self._worker.perform(job.id, job.request, tell, stop)
        except Cancelled:
            state = "interrupted" if self._ended.is_set() and not self.jobs.told_to_stop(job.id) else "cancelled"
        except Failed as failed:
            state, error = "failed", failed.trouble.to_dict()
        except Exception as bad:  # noqa: BLE001 - the queue goes on, whatever a job does
            state, error = "failed", self._troubled(job, bad)
        self._over(job, state, result, error)

    def _troubled(self, job: Job, error: Exception) -> dict[str, Any]:
        found = self._board.get(job.id)
        try:
            return Trouble.of(error, job.request, found.phase if found else "").to_dict()
        except Exception:  # noqa: BLE001 - the request itself is what cannot be read
            return Trouble("refused", str(error)).to_dict()

    def _over(self, job: Job, state: State, result: dict[str, Any], error: dict[str, Any]) -> None:
        """Write it down; then let followers look at the row."""
        last = self._board.get(job.id)
        if last is not None:
            self.jobs.progress(job.id, last.to_dict())
        self.jobs.finish(job.id, self._lease.holder, state, result, error)
        if state in ("done", "cancelled"):
            latents.remove(self.place, job.id)
        if state == "done" and job.asked.get("latents"):
            latents.remove(self.place, job.asked["latents"])
        preview.remove(self.place, job.id)
        self._running = None
        self._board.drop(job.id)
