"""Result files of earlier runs of a benchmark, whose rows may stand beside new ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.errors import UsageError


def opened(file: Path, command: str) -> dict[str, Any]:
    """What `hasten {command} --json` wrote. Raises `UsageError` for any other file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("command", command) != command:
            raise ValueError(f"it is one of hasten {found['command']}")
        if not isinstance(found["rows"], list) or not all(isinstance(found[key], dict) for key in ("versions", "hardware")):
            raise TypeError("its parts are not what they should be")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"'{file}' is no result of hasten {command} ({error}). Give the file that its --json wrote.") from error
    return found  # type: ignore[no-any-return]


def check_same(file: Path, there: Mapping[str, object], here: Mapping[str, object]) -> None:
    """Raise `UsageError`, which names the differences, where the rows of `file` were measured in another way than new ones would be."""
    if odd := [f"{name} {there.get(name)!r} there, {here[name]!r} here" for name in here if there.get(name) != here[name]]:
        raise UsageError(f"The rows of '{file}' cannot stand beside new ones: {'; '.join(odd)}. Leave --onto out, and measure all again.")
