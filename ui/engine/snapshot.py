"""Where a job stands, for whoever looks: the newest snapshot of each running job, in memory, and how to wait for the next."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Where a job stands.

    number: rises with each. state: of the job (`jobs.State`). phase: in words ("Loading", "Denoising", "Decoding",
    "Searching", "Training", "Stopping"). step, steps: of the phase, 0 where not known. seconds: since it started;
    seconds_per_step, seconds_left: of the phase, None where not known. memory: bytes at most so far, of the accelerator or of the
    process. skipped: share of the network's work left out so far. preview: an id for `Engine.preview`, another for each picture.
    note: the newest sentence to be told. data: what only this kind has:

    text: `tokens`: [{"text", "step", "given"}], step the one that revealed it, None where it is masked.
    decode: `tokens`: [{"text", "given", "by", "round", "lead"}] and `rounds`: [{"drafted", "accepted", "written"}] (see `work.decode`).
    compare: `rows`, the finished runs'. tune: `trials`: [{"number", "name", "speedup", "worst", "kept", "note"}].
    train: `loss`: [[step, loss], ...] (at most 400 points), `samples`: names of pictures (`Engine.sample`).
    """

    job: str
    number: int = 0
    state: str = "queued"
    phase: str = ""
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    seconds_per_step: float | None = None
    seconds_left: float | None = None
    memory: int | None = None
    skipped: float | None = None
    preview: str | None = None
    note: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Snapshot:
        """From what `to_dict` gave; keys of another version are left out."""
        known = {each.name for each in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def but(self, **changes: Any) -> Snapshot:
        """The next one, with some values changed."""
        return replace(self, number=self.number + 1, **changes)


class Board:
    """The newest snapshot of each job that runs in this process or its child. Followers wait here."""

    def __init__(self) -> None:
        self._newest: dict[str, Snapshot] = {}
        self._changed = threading.Condition()

    def put(self, snapshot: Snapshot) -> None:
        """Replace the job's snapshot and wake its followers. Nobody's slowness is waited for."""
        with self._changed:
            self._newest[snapshot.job] = snapshot
            self._changed.notify_all()

    def drop(self, job: str) -> None:
        """The job is over: followers read its row."""
        with self._changed:
            self._newest.pop(job, None)
            self._changed.notify_all()

    def wake(self) -> None:
        """A row has changed: let followers look at it."""
        with self._changed:
            self._changed.notify_all()

    def get(self, job: str) -> Snapshot | None:
        """The newest one, None where the job does not run here."""
        with self._changed:
            return self._newest.get(job)

    def newer(self, job: str, than: int, seconds: float) -> Snapshot | None:
        """Wait for a snapshot with a larger number, at most so long; None where there was none."""

        def ready() -> bool:
            found = self._newest.get(job)
            return found is None or found.number > than

        with self._changed:
            if job not in self._newest:
                self._changed.wait(seconds)  # it may start here soon
            else:
                self._changed.wait_for(ready, seconds)
            found = self._newest.get(job)
        return found if found is not None and found.number > than else None
