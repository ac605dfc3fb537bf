"""A training's folder: who may write into it, and how it is written: aside, and then renamed.

A kill at any moment leaves either the old or the new folder complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hasten.errors import ResumeError, UsageError


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `target`, then put it in its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside, old = target.with_name(target.name + ".part"), target.with_name(target.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    write(aside)
    for file in aside.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors creates its files readable by their owner only
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def claimed(
    out: Path, wanted: Mapping[str, Any], resume: bool, may_change: tuple[str, ...], usual: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Hold `out` for one training: write its configuration, or check that a resumed run has the same one.

    `may_change`: dotted keys (or their beginnings) in which a resumed run may differ; `usual`: what keys were that an older
    version did not write. `UsageError` when the folder holds a training that is not to be resumed, or when another process
    is training in it right now: two would replace each other's logs and checkpoints. A killed process holds nothing, and
    of a training that is refused before it made anything nothing stays.
    """
    _check(out, wanted, resume, may_change, usual or {})
    fresh = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with (out / ".lock").open("w") as lock:
            if not _locked(lock):
                raise UsageError(f"Another process is training in '{out}'. Wait for it, stop it, or give another folder.")
            (out / "config.json").write_text(json.dumps(wanted, indent=1))
            try:
                yield
            finally:
                if _names(out) <= {"config.json", ".lock"}:
                    (out / "config.json").unlink()
    finally:
        if fresh and _names(out) == {".lock"}:
            (out / ".lock").unlink()
            out.rmdir()


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def _locked(lock: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _check(
    out: Path, wanted: Mapping[str, Any], resume: bool, may_change: tuple[str, ...], usual: Mapping[str, Any]
) -> None:
    file = out / "config.json"
    if file.exists() and not resume:
        raise UsageError(f"'{out}' already holds a training. Resume it, or give an empty folder.")
    if file.exists():
        found, new = _flat(usual) | _flat(json.loads(file.read_text())), _flat(wanted)
        keys = sorted(k for k in found.keys() | new.keys() if not k.startswith(may_change))
        differing = [
            f"{k} was {found.get(k)!r}, now {new.get(k)!r}" for k in keys if found.get(k) != new.get(k)
        ]
        if differing:
            allowed = " and ".join(key.rstrip(".") for key in may_change)
            raise ResumeError(
                f"Cannot resume '{out}': only {allowed} may change, but {'; '.join(differing[:4])}."
                " Restore the old values, or start in an empty folder."
            )
    elif resume and not out.is_dir():
        raise ResumeError(f"Cannot resume '{out}': there is no such folder. Start without resume.")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows


def truncate_log(log: Path, step: int) -> None:
    """Drop the lines of a JSONL log at or after `step` (they will be written again)."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue  # the line in flight when the process was killed
    aside = log.with_suffix(".part")
    aside.write_text("".join(line + "\n" for line in kept))
    os.replace(aside, log)
