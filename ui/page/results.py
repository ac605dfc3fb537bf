"""What jobs gave, as the data that views draw. Files get the URLs under which the page's server offers them."""

from __future__ import annotations

import base64
import json
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hasten.errors import UsageError
from hasten.ui.engine import Engine, Job, Snapshot
from hasten.ui.engine.outputs import MANIFEST
from hasten.ui.engine.recipes import TRAINED, named
from hasten.ui.page.sentences import facts, headline, picture
from hasten.ui.views.markup import decibel, number, seconds, share

TINY = 160
"""Pictures narrower than this are enlarged without smoothing."""

NO_SIZE = (16, 9)


def url(path: Path) -> str:
    """Under which the page's server offers a file below the outputs folder."""
    return "/gradio_api/file=" + quote(path.absolute().as_posix(), safe="/:")


def data_url(png: bytes) -> str:
    """A picture that is no result: previews and samples of what still runs."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def size_of(file: Path) -> tuple[int, int]:
    """(width, height) of a PNG, by its header."""
    try:
        with file.open("rb") as stream:
            head = stream.read(24)
    except OSError:
        return NO_SIZE
    if len(head) < 24 or head[:4] != b"\x89PNG":
        return NO_SIZE
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def standing(snapshot: Snapshot) -> dict[str, Any]:
    """For the view of progress."""
    failed = snapshot.state in ("failed", "interrupted")
    return {
        "state": "stopping" if snapshot.phase == "Stopping" and snapshot.state == "running" else snapshot.state,
        "phase": {"cancelled": "Stopped", "queued": ", ".join(filter(None, ("Waiting", snapshot.note)))}.get(snapshot.state, snapshot.phase), "step": min(snapshot.step, snapshot.steps) or None, "steps": snapshot.steps or None,
        "seconds_per_step": snapshot.seconds_per_step, "seconds_left": snapshot.seconds_left, "memory_bytes": snapshot.memory,
        "skipped": snapshot.skipped, "message": snapshot.note if failed else "",
    }  # fmt: skip


def failure(job: Job, remedies: list[dict[str, Any]]) -> str:
    """Why a job gave nothing, and what is not lost. remedies: `Engine.remedies` of it."""
    kept = " What it had denoised is kept, and decoding it again takes a moment." if any(each["request"].get("latents") for each in remedies) else ""
    if job.state == "interrupted":
        return f"The process that did it was ended in the middle.{kept or ' Nothing else is lost.'}"
    return f"{job.error.get('sentence', 'It failed.')}{kept}" if job.state == "failed" else ""


def title(asked: Mapping[str, Any]) -> str:
    """A request in one line."""
    what = asked.get("prompt") or asked.get("method") or asked.get("budget") or ""
    return f"{str(asked.get('kind', 'job')).capitalize()}: {what or asked.get('model', '')}"


def recipe_words(asked: Mapping[str, Any]) -> str:
    """Which recipes, short."""
    found = [asked["recipe"]] if asked.get("recipe") else list(asked.get("recipes") or ())
    return ", ".join("edited recipe" if "\n" in name else named(name) if TRAINED.fullmatch(name) else str(name) for name in found)


class Shelf:
    """Results of an engine, read for views."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def file(self, output: str, name: str) -> Path:
        return self.engine.outputs.file(output, name)

    def read(self, output: str, name: str) -> dict[str, Any]:
        """A JSON file of a result; {} where it is gone."""
        try:
            found = json.loads(self.file(output, name).read_text(encoding="utf-8"))
        except (OSError, ValueError, UsageError):
            return {}
        return found if isinstance(found, dict) else {}

    def result(self, output: str) -> dict[str, Any]:
        """What its job gave, with its request. Raises `UsageError` where there is none."""
        return self.engine.outputs.get(output) | {"output": output}

    # --- comparisons ------------------------------------------------------------------------------

    def player(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """For the player: the first recipe beside the plain run at first."""
        runs = found["runs"]
        width, height = size_of(self.file(found["output"], found["thumb"]))
        moving = any(run["media"].endswith(".mp4") for run in runs)
        return {
            "runs": [{"label": run["recipe"], "url": url(self.file(found["output"], run["media"]))} for run in runs],
            "kind": "video" if moving else "image", "width": width, "height": height,
            "frames": max(len(run["psnr"]) for run in runs) or 1, "fps": found.get("fps", 8), "group": "compare", "pixelated": width <= TINY,
        }  # fmt: skip

    def metrics(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """For the cards."""
        return {
            "rows": [_said(run["row"], found["runs"][0]["row"]) for run in found["runs"]], "noise_floor": found.get("noise_floor"), "group": "compare",
            "by_frame": {run["row"]["recipe"]: run["psnr"] for run in found["runs"] if run["psnr"]},
        }  # fmt: skip

    def trace(self, found: Mapping[str, Any], recipe: str | None = None) -> dict[str, Any]:
        """For timeline and density: the report of a run, with a title."""
        if "runs" in found:
            run = next((run for run in found["runs"] if run["recipe"] == recipe), found["runs"][-1])
            return self.read(found["output"], run["trace"]) | {"title": f"What {run['recipe']} computed", "download": run["trace"]}
        return self.read(found["output"], found["trace"]) | {"download": "timeline.json"}

    # --- single results ---------------------------------------------------------------------------

    def picture(self, found: Mapping[str, Any]) -> str:
        """One picture or clip with its numbers, as HTML."""
        row, name = found.get("row", {}), str(found["media"])
        width, height = int(row.get("width") or 16), int(row.get("height") or 9)
        frames = f", {row['frames']} frames" if (row.get("frames") or 1) > 1 else ""
        note = f"{width} x {height}{frames}, seed {row.get('seed', '')}"
        kind = "video" if name.endswith(".mp4") else "image"
        file = f"{found.get('request', {}).get('model', 'hasten').replace('/', '-').replace(':', '-')}-{found['output'][:6]}{Path(name).suffix}"
        return picture(url(self.file(found["output"], name)), kind, "Result", note, tiny=width <= TINY, file=file)

    def preview(self, snapshot: Snapshot) -> str | None:
        """The picture of a running job, as HTML; None where there is none yet."""
        png = self.engine.preview(snapshot.preview) if snapshot.preview else None
        if png is None:
            return None
        width = struct.unpack(">I", png[16:20])[0] if len(png) > 24 else TINY
        return picture(data_url(png), "preview", "Preview", "A rough look while it runs", tiny=width <= TINY)

    def gallery(self, limit: int = 60) -> dict[str, Any]:
        """For the cards of the history."""
        return {"items": [self._card(found) for found in self.engine.outputs.list(limit)]}

    def _card(self, found: Mapping[str, Any]) -> dict[str, Any]:
        asked = found.get("request", {})
        thumb = found.get("thumb") or next(iter(found.get("samples") or ()), None)
        try:
            picture_of = url(self.file(found["id"], str(thumb))) if thumb else None
        except UsageError:
            picture_of = None
        note = seconds(number(found.get("row", {}), "seconds")) if found.get("row") else ""
        return {
            "id": found["id"], "title": title(asked), "recipe": recipe_words(asked), "model": asked.get("model", ""), "note": note,
            "when": time.strftime("%d %b %H:%M", time.localtime(found.get("made", 0))), "thumb": picture_of,
            "text": found.get("text") or {"tune": "a study", "train": "a training"}.get(asked.get("kind", ""), ""),
        }  # fmt: skip


def _said(row: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """A row; one that computes all of its few calls (a student, fewer steps) says how many those are."""
    calls, usual, fraction = number(row, "nfe"), number(plain, "nfe"), number(row, "computed_fraction")
    fewer = calls is not None and usual is not None and calls < usual and fraction is not None and fraction > 1 - 1e-6
    return {**row, "skipped": f"all but {calls:g} call{'s' if calls != 1 else ''} instead of {usual:g}"} if fewer else dict(row)


def compared(found: Mapping[str, Any], prompt: str) -> str:
    """A comparison in one line: how much faster its first recipe is, and how alike."""
    rows = [run["row"] for run in found["runs"]]
    plain, best = rows[0], rows[min(1, len(rows) - 1)]
    speedup, floor = number(best, "speedup"), number(found, "noise_floor")
    calls, usual = number(best, "nfe"), number(plain, "nfe")
    done = calls / usual if calls is not None and usual else number(best, "computed_fraction")
    like = decibel(number(best, "psnr_median"), best.get("exact_match") is True)
    words = [
        f"{best['recipe']}: {seconds(number(plain, 'seconds'))} → {seconds(number(best, 'seconds'))}",
        f"{share(round(done, 3) if done is not None else None)} of the work was done",
        f"likeness to the plain run {like}" + (f" (another seed: {decibel(floor)})" if floor is not None else ""),
    ]
    if "repeats" in found:
        words.append(f"timed {times(int(found['repeats']))}")
    return headline(f"{speedup:.3g}× as fast" if speedup else str(best["recipe"]), " · ".join(words), prompt)


def times(repeats: int) -> str:
    """How often each run of a comparison was timed."""
    if repeats > 1:
        return f"{repeats} times after a warm-up, the median"
    return "once after a warm-up, so a busy machine may shift it"


def generated(found: Mapping[str, Any]) -> str:
    """A single result in numbers."""
    row, steps, usual = found.get("row", {}), number(found, "steps"), number(found, "usual_steps")
    few = steps is not None and usual is not None and steps < usual  # all of so few calls is not all of the work
    fraction = number(row, "computed_fraction") if "tokens_per_forward" not in row and not few else None
    return facts(
        [
            ("recipe", str(row.get("recipe", ""))), ("took", seconds(number(row, "seconds"))), ("work done", share(fraction)),
            ("skipped", share(1 - fraction) if fraction is not None else "–"),
            ("steps", f"{steps:g} instead of {usual:g}" if few else ""),
            ("calls of the network", f"{row['nfe']:g}" if number(row, "nfe") is not None else ""),
            ("tokens per call", f"{row['tokens_per_forward']:.3g}" if number(row, "tokens_per_forward") is not None else ""),
        ],
        "The run in numbers",
    )  # fmt: skip


def own_files(found: Mapping[str, Any]) -> list[str]:
    """Names of a result's files that people want: no manifest, no thumbnails."""
    return [name for name in found.get("files", ()) if name not in (MANIFEST, "thumb.png")]
