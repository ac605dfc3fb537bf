"""Results on the disk: a folder for each, known by its id, written aside and put in place whole; and settings back from files.

`result.json` in it is what the job gave, with `id`, `kind`, `made` (Unix seconds), `request` and `files`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.atomic import atomic_write, replacing
from hasten.errors import OutputError, UsageError
from hasten.ui.engine.place import Place
from hasten.ui.engine.request import Request, to_json

ID = re.compile(r"[0-9a-f]{16}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,80}\.(png|mp4|json|yaml|txt|html)")
MANIFEST = "result.json"
THUMB = 320
"""Pixels of a thumbnail's longer side, at most."""


class Outputs:
    """All results of a place."""

    def __init__(self, place: Place) -> None:
        self.place, self.folder = place, place.outputs

    @contextmanager
    def making(self, request: Request) -> Iterator[Making]:
        """A result in the making. It appears when the body ends; where it raises, nothing of it is left."""
        name = secrets.token_hex(8)
        aside = self.folder / f".{name}.part"
        try:
            aside.mkdir()
            made = Making(name, aside, request)
            yield made
            made.finish()
            os.replace(aside, self.folder / name)
        except OSError as error:
            raise OutputError(f"Cannot keep the result in {self.folder}: {error.strerror or error}. Free some space on the disk.") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed processes have left half made. Only while nobody else works."""
        for aside in self.folder.glob(".*.part"):
            shutil.rmtree(aside, ignore_errors=True)

    def get(self, output: str) -> dict[str, Any]:
        """`result.json`. Raises `UsageError` where there is no such result."""
        if ID.fullmatch(output) is None:
            raise UsageError(f"{output[:32]!r} is no id of a result. It is 16 hexadecimal digits.")
        try:
            found = json.loads((self.folder / output / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UsageError(f"There is no result {output}. It may have been removed.") from None
        return dict(found)

    def file(self, output: str, name: str) -> Path:
        """A file of a result. Raises `UsageError` for a name that is not one of its files."""
        if name != MANIFEST and name not in self.get(output)["files"]:
            raise UsageError(f"Result {output} has no file {name[:40]!r}.")
        return self.folder / output / name

    def list(self, limit: int = 50, search: str = "", kinds: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """Newest first. search: words that must stand in the prompt, the model or the recipe."""
        words, found = search.lower().split(), []
        folders = [entry for entry in os.scandir(self.folder) if ID.fullmatch(entry.name)]
        for entry in sorted(folders, key=lambda each: -each.stat().st_mtime):
            try:
                each = self.get(entry.name)
            except UsageError:
                continue
            text = json.dumps(each.get("request", {}), ensure_ascii=False).lower()
            if (not kinds or each.get("kind") in kinds) and all(word in text for word in words):
                found.append(each)
            if len(found) >= limit:
                break
        return found

    def remove(self, output: str) -> None:
        """Forget a result and its files. Raises `UsageError` where there is none."""
        self.get(output)
        gone = self.folder / f".{output}.part"
        os.replace(self.folder / output, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def trained(self) -> dict[str, Path]:
        """Id -> recipe file of the students that trainings here have made, and that a recipe can bring along; oldest first."""
        found: list[tuple[float, str, Path]] = []
        for entry in os.scandir(self.folder):
            file = Path(entry.path) / "student" / "recipe.yaml"
            if ID.fullmatch(entry.name) and file.is_file():
                with suppress(UsageError):  # it was removed a moment ago
                    told = self.get(entry.name)
                    found += [(told.get("made", 0.0), entry.name, file)] if told.get("recipe") else []
        return {name: file for _, name, file in sorted(found)}


class Making:
    """One result in the making: files in a folder aside, then `finish`."""

    def __init__(self, name: str, folder: Path, request: Request) -> None:
        self.id, self.folder, self.request = name, folder, request
        self.files: list[str] = []
        self.facts: dict[str, Any] = {}

    def media(self, stem: str, frames: NDArray[Any], *, fps: float, about: Mapping[str, Any]) -> str:
        """A PNG or MP4 of frames (F, H, W, C) that says how it was made; its name. Nothing is resized."""
        from hasten.pipelines import media

        name = f"{safe(stem)}{'.mp4' if len(frames) > 1 else '.png'}"
        # A page restores from `request`; other tools read the keys that `media` knows.
        media.save(frames, self.folder / name, fps=fps, metadata={**about, "request": json.loads(to_json(self.request))})
        return self._kept(name)

    def thumb(self, frames: NDArray[Any], name: str = "thumb.png") -> str:
        """A small PNG of the middle frame; its name."""
        from PIL import Image

        middle = np.asarray(frames[len(frames) // 2])
        small = Image.fromarray(middle if middle.dtype == np.uint8 else np.rint(middle * 255).astype(np.uint8))
        small.thumbnail((THUMB, THUMB))
        with replacing(self.folder / name) as aside:
            small.save(aside, format="PNG")
        return self._kept(name)

    def text(self, name: str, content: str) -> str:
        """A file of text; its name."""
        atomic_write(self.folder / name, content)
        return self._kept(name)

    def json(self, name: str, content: Any) -> str:
        """A file of strict JSON; its name."""
        from hasten.report_forms import strict

        return self.text(name, json.dumps(strict(content), allow_nan=False, ensure_ascii=False))

    def copy(self, file: Path, name: str) -> str:
        """A file that is there already; its name."""
        with replacing(self.folder / name) as aside:
            shutil.copyfile(file, aside)
        return self._kept(name)

    def _kept(self, name: str) -> str:
        if NAME.fullmatch(name) is None:
            raise UsageError(f"A result may not have a file {name!r}: names of letters, digits, - and _, ending in png, mp4, json, yaml or txt.")
        self.files.append(name)
        return name

    def finish(self) -> None:
        """Write `result.json`, the last of its files."""
        head = {"id": self.id, "kind": self.request.kind, "made": time.time(), "request": json.loads(to_json(self.request))}
        self.json(MANIFEST, {**self.facts, **head, "files": self.files})


def safe(stem: str) -> str:
    """A recipe's name as a file's: what some systems do not allow becomes a dash."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_")[:60] or "result"
