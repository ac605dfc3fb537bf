"""A folder of one's own pictures or clips: what lies in it, what each is called, and its pixels.

A caption stands in a `.txt` beside its file, or in `metadata.jsonl`, `metadata.csv` or `captions.csv` of the folder, with
the columns `file_name` and `text` as in the hub's image folders. What cannot be used is skipped, and said by name.

Shapes: T frames (1 for pictures) of H x W pixels; pixels float32 [3, T, H, W] in [-1, 1].
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hasten.errors import UsageError
from hasten.pipelines.frames import CLIPS, frames

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
"""Read by Pillow; the last two may move."""
TABLES = ("metadata.jsonl", "metadata.csv", "captions.csv")
NAMES, TEXTS = ("file_name", "file", "image", "video"), ("text", "caption", "prompt")
"""Columns of a table, the first that is there."""


class Unusable(Exception):
    """Why one file is skipped."""


@dataclass(frozen=True, slots=True)
class Size:
    """What a model is trained on: T frames of H x W. resize: whether other sizes are scaled until they cover it, and cut
    in the middle; otherwise they are skipped."""

    frames: int
    height: int
    width: int
    resize: bool = True


@dataclass
class OwnFiles:
    """Files with their captions, in the order of their names, and why others were skipped (file name -> words)."""

    captions: dict[Path, str]
    skipped: dict[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """Of all names, captions and contents: the same where the data are the same."""
        whole = hashlib.sha256()
        for file, caption in self.captions.items():
            whole.update(json.dumps([file.name, caption, hashlib.sha256(file.read_bytes()).hexdigest()]).encode())
        return whole.hexdigest()

    def told(self) -> str:
        """How many are used, and the name and fault of each that is not, in words."""
        text = f"{len(self.captions)} file(s) are used"
        if not self.skipped:
            return f"{text}."
        rest = [f"{name} ({why})" for name, why in self.skipped.items()]
        more = f", and {len(rest) - 20} more" if len(rest) > 20 else ""
        return f"{text}, {len(rest)} skipped: {', '.join(rest[:20])}{more}."


def find(folder: Path, uncaptioned: bool = False) -> OwnFiles:
    """What lies in `folder` (not below it). uncaptioned: files without a caption get the empty prompt; else they are
    skipped. Raises `UsageError` for a folder that is not there, a table that cannot be read, or when nothing is left."""
    if not folder.is_dir():
        raise UsageError(f"There is no folder '{folder}'. data.folder is one with pictures or clips and their captions.")
    table = _table(folder)
    found = OwnFiles({}, {name: "named in the table, and not there" for name in table if not (folder / name).is_file()})
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in (*PICTURES, *CLIPS):
            if file.suffix != ".txt" and file.name not in TABLES and not file.name.startswith("."):
                found.skipped[file.name] = "not a format that is read" if file.is_file() else "a folder"
            continue
        try:
            caption = table.get(file.name) or _beside(file)
        except (OSError, UnicodeDecodeError):
            found.skipped[file.name] = "its caption is not UTF-8 text"
            continue
        if caption or uncaptioned:
            found.captions[file] = caption
        else:
            found.skipped[file.name] = "no caption"
    if not found.captions:
        raise UsageError(
            f"Nothing in '{folder}' can be trained on: {found.told()} Needed: {', '.join((*PICTURES, *CLIPS))}, each with a"
            " caption in a .txt of the same name or a row of metadata.jsonl (data.uncaptioned=true does without)."
        )
    return found


def pixels(file: Path, size: Size) -> Tensor:
    """The first T frames of a file, [3, T, H, W]. Raises `Unusable` with the reason where they cannot be had.

    What is transparent becomes white; a picture is turned as its camera says; frames are taken as they follow each
    other, whatever their rate.
    """
    try:
        found = list(islice(frames(file), size.frames + 1))
    except Exception as error:  # decoders raise many kinds for broken files
        raise Unusable(f"cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    if size.frames == 1 and len(found) > 1:
        raise Unusable("it moves, and the model makes pictures")
    if len(found) < size.frames:
        raise Unusable(f"{len(found)} frames of {size.frames}")
    made = [_fitted(frame, size) for frame in found[: size.frames]]
    stacked = torch.from_numpy(np.stack([np.asarray(frame, dtype=np.float32) for frame in made]))
    return stacked.permute(3, 0, 1, 2) / 127.5 - 1


def _fitted(frame: Image.Image, size: Size) -> Image.Image:
    wanted = (size.width, size.height)
    if frame.size == wanted:
        return frame
    if not size.resize:
        raise Unusable(f"{frame.width} x {frame.height} pixels, not {size.width} x {size.height}")
    return ImageOps.fit(frame, wanted, Image.Resampling.LANCZOS)


def _beside(file: Path) -> str:
    text = file.with_suffix(".txt")
    return text.read_text(encoding="utf-8-sig").strip() if text.is_file() else ""


def _table(folder: Path) -> dict[str, str]:
    """File name -> caption of the first table in the folder; {} without one."""
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if not found:
        return {}
    if len(found) > 1:
        raise UsageError(f"'{folder}' has {' and '.join(file.name for file in found)}. Keep one of them.")
    file, captions = found[0], {}
    for number, row in enumerate(_rows(file), 2 if file.suffix == ".csv" else 1):
        name = next((row[key] for key in NAMES if row.get(key)), None)
        if name is None or not any(key in row for key in TEXTS):
            raise UsageError(f"{file.name}, line {number}: no {' or '.join(NAMES)} with a {' or '.join(TEXTS)}; it has {list(row)}.")
        captions[str(name)] = str(next(row[key] for key in TEXTS if key in row) or "").strip()
    return captions


def _rows(file: Path) -> list[Mapping[str, object]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        if file.suffix == ".csv":
            return [{key: value for key, value in row.items() if key} for row in csv.DictReader(lines)]
        rows = [json.loads(line) for line in lines if line.strip()]
    except (UnicodeDecodeError, ValueError, csv.Error) as error:
        raise UsageError(f"'{file}' cannot be read: {error}. Expected UTF-8, a JSON object or a row a line.") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"'{file}': each line must be a JSON object with file_name and text.")
    return rows
