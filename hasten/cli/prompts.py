"""Prompts from the command line and from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.pipelines.generate import Prompt

MAX_FILE_BYTES = 16 * 2**20


def collect(texts: list[str], file: Path | None, seed: int) -> tuple[Prompt, ...]:
    """All prompts of a command, numbered. Raises `UsageError` when there is none or the file is no good."""
    from hasten.pipelines.generate import Prompt

    found = [(text, seed) for text in texts]
    if file is not None:
        found += _read(file, seed)
    if not found:
        raise UsageError("No prompt was given. Pass --prompt TEXT, or --prompts FILE with one prompt a line.")
    return tuple(Prompt(text, own, index) for index, (text, own) in enumerate(found))


def _read(file: Path, seed: int) -> list[tuple[str, int]]:
    """(prompt, seed) of each line: plain text with # comments, or JSON objects with prompt and seed."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{file} is larger than {MAX_FILE_BYTES // 2**20} MiB. Split it.")
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(
            f"Cannot read the prompts file {file}: {reason}. Check the name; one prompt a line."
        ) from None
    found = []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if line and not line.startswith("#"):
            found.append(_from_json(line, file, number, seed) if line.startswith("{") else (line, seed))
    if not found:
        raise UsageError(f"The prompts file {file} has no prompts. Write one a line; # starts a comment.")
    return found


def _from_json(line: str, file: Path, number: int, seed: int) -> tuple[str, int]:
    where = f"{file}, line {number}"
    try:
        data: Any = json.loads(line)
    except ValueError as error:
        raise UsageError(
            f'{where}: not valid JSON ({error}). Write {{"prompt": "...", "seed": 0}}.'
        ) from None
    unknown = sorted(set(data) - {"prompt", "seed"})
    text, own = data.get("prompt"), data.get("seed", seed)
    if unknown or not isinstance(text, str) or isinstance(own, bool) or not isinstance(own, int):
        problem = f"unknown key {unknown[0]!r}" if unknown else "prompt must be text and seed a whole number"
        raise UsageError(f'{where}: {problem}. Write {{"prompt": "...", "seed": 0}}.')
    return text, own
