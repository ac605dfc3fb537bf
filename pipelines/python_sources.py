"""Real text that is on every machine: the sources of Python's standard library, split by file.

Versions of Python differ in their sources, so whatever is made from them records `version()`.
"""

from __future__ import annotations

import platform
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from hasten.errors import UsageError

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
"""Folders of tests, of other people's packages, and of tables that only look like code."""
_ONE_IN = 20
_MOST_BYTES = 400_000

Split = Literal["train", "validation"]


def version() -> str:
    """Where the text comes from, in words."""
    return f"standard library of Python {platform.python_version()}"


def files(split: Split, root: Path | None = None) -> list[Path]:
    """The .py files of a split, in the order of their names; one in twenty, by checksum of the name, is for validation.

    `root`: another folder of .py files instead of the standard library; `UsageError` when nothing is found there.
    """
    folder = root or Path(sysconfig.get_paths()["stdlib"])
    found = [
        path
        for path in sorted(folder.rglob("*.py"))
        if not _LEFT_OUT & set(path.relative_to(folder).parts) and path.stat().st_size <= _MOST_BYTES
    ]
    chosen = [path for path in found if _split(path.relative_to(folder)) == split]
    if not chosen:
        raise UsageError(
            f"'{folder}' holds {len(found)} .py files and none of them is for {split}."
            " Name a folder with more Python sources, or leave it out to use the standard library."
        )
    return chosen


def texts(split: Split, root: Path | None = None) -> Iterator[str]:
    """The files' contents; a file that is not UTF-8 is left out."""
    for path in files(split, root):
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def _split(name: Path) -> Split:
    return "validation" if zlib.crc32(name.as_posix().encode()) % _ONE_IN == 0 else "train"
