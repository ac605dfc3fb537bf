"""Work that is gone on with: a study or a training has a folder that follows from what was asked, without its time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from hasten.errors import UsageError
from hasten.ui.engine.place import Place
from hasten.ui.engine.request import Request, Train, Tune, to_json

TIMES = ("seconds", "minutes")
"""What may differ between a request and the one that goes on with it."""


def folder_of(place: Place, request: Request) -> Path:
    """Where its study or training lies. Raises `UsageError` for a kind that has none."""
    if not isinstance(request, Tune | Train):
        raise UsageError(f"A job of kind {request.kind} keeps nothing to go on with; tune and train do.")
    given = json.loads(to_json(request))
    asked = {key: value for key, value in given.items() if key not in TIMES and (key != "students" or value)}  # an older hasten had none
    name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    return place.work / f"{request.kind}-{name}"
