"""The worker's process: takes jobs from the pipe until its other end is closed."""

from __future__ import annotations

import signal
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any

from hasten.ui.engine.cancel import Cancelled
from hasten.ui.engine.desk import Desk
from hasten.ui.engine.place import Place
from hasten.ui.engine.request import Request, read
from hasten.ui.engine.snapshot import Snapshot
from hasten.ui.engine.trouble import Trouble


def serve(pipe: Connection, stop: Event, place: Place) -> None:
    """Do jobs one after the other. Ctrl-C is for the parent, which then closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    desk = Desk(place)
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):  # the parent has ended, or has closed it
            return
        try:
            pipe.send(_answer(message, desk, pipe, stop))
        except (BrokenPipeError, OSError):
            return


def _answer(message: dict[str, Any], desk: Desk, pipe: Connection, stop: Event) -> dict[str, Any]:
    """What comes of one job."""
    request: Request = read(message["request"], desk.limits)
    phase = ""

    def tell(snapshot: Snapshot) -> None:
        nonlocal phase
        phase = snapshot.phase
        try:
            pipe.send({"snapshot": snapshot.to_dict()})
        except OSError:  # nobody is there any more for whom to work
            raise Cancelled from None

    try:
        return {"result": desk.perform(message["job"], request, tell, stop.is_set)}
    except Cancelled:
        return {"cancelled": True}
    except BaseException as error:  # noqa: BLE001 - whatever it is, the process goes on and says so
        return {"trouble": Trouble.of(error, request, phase)}
