"""What `demo` and `compare` leave behind: a file per run, one to look at side by side, a report per recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.pipelines.compare import Sample

GAP = 4
LEAST_HEIGHT = 192
"""Side-by-side pictures smaller than this are enlarged without smoothing, to be seen at all."""


def file_name(recipe: str) -> str:
    """A recipe's name as part of a file's: what some systems do not allow there becomes a dash (auto:psnr=35)."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", recipe)


def write_sample(sample: Sample, folder: Path, *, fps: float, several: bool) -> Path:
    """Write one run as MP4 or PNG; prompt and seed stand in the name when there are several of them."""
    from hasten.pipelines.media import save

    suffix = ".mp4" if len(sample.frames) > 1 else ".png"
    number = f"{sample.prompt.index:03d}-{sample.prompt.seed}-" if several else ""
    facts = {
        "prompt": sample.prompt.text,
        "seed": sample.prompt.seed,
        "recipe": sample.report.recipe,
        "versions": dict(sample.report.versions),
    }
    return save(sample.frames, folder / f"{number}{file_name(sample.recipe)}{suffix}", fps=fps, metadata=facts)[0]


def write_together(samples: Sequence[Sample], folder: Path, *, fps: float) -> Path:
    """All runs of one prompt beside each other, as GIF or PNG."""
    import numpy

    from hasten.pipelines.media import save

    scale = max(1, LEAST_HEIGHT // samples[0].frames.shape[1])
    enlarged = [s.frames.repeat(scale, axis=1).repeat(scale, axis=2) for s in samples]
    white = numpy.ones_like(enlarged[0][:, :, : GAP * 2])
    row = [part for video in enlarged for part in (video, white)][:-1]
    suffix = ".gif" if len(samples[0].frames) > 1 else ".png"
    name = "-".join(file_name(s.recipe) for s in samples) if len(samples) < 4 else "side-by-side"
    return save(numpy.concatenate(row, axis=2), folder / f"{name}{suffix}", fps=min(fps, 50), metadata={})[0]


def write_report(
    samples: Sequence[Sample], paths: Sequence[Path], rows: Sequence[dict[str, Any]], folder: Path, model: str, *, fps: float
) -> list[Path]:
    """A page per recipe, with all runs to be compared in it and the numbers of all; the first is `report.html`."""
    from dataclasses import replace

    from hasten.atomic import atomic_write
    from hasten.cli.output import cell, shown, strict
    from hasten.ui.views import page
    from hasten.ui.views.metrics import metrics

    numbers = [{title: cell(key, row) for key, title in shown(rows).items()} for row in rows]
    runs = list(zip(samples, paths, strict=True))
    cards = metrics({"rows": strict(list(rows)), "by_frame": _by_frame(samples)})
    written = []
    for number, sample in enumerate(samples[1:]):
        extras = {"model": model, "metrics": numbers, "prompt": sample.prompt.text, "seed": sample.prompt.seed}
        name = "report.html" if number == 0 else f"report-{file_name(sample.recipe)}.html"
        shown_first = [runs[0], runs[number + 1], *runs[1 : number + 1], *runs[number + 2 :]]
        text = page.of_report(replace(sample.report, extras=extras), [_player(shown_first, fps), cards])
        written.append(atomic_write(folder / name, text))
    return written


def _player(runs: Sequence[tuple[Sample, Path]], fps: float) -> str:
    """All runs of a prompt in one player, the first two to begin with, or a sentence where files are too large for a page."""
    from hasten.errors import UsageError
    from hasten.ui.views.markup import empty
    from hasten.ui.views.page import embedded
    from hasten.ui.views.player import player

    frames, height, width = runs[0][0].frames.shape[:3]
    try:
        shown = [{"label": sample.recipe, "url": embedded(path)} for sample, path in runs]
    except UsageError as error:
        return empty("player", "Comparison", str(error))
    return player(
        {"runs": shown, "kind": "video" if frames > 1 else "image", "width": width, "height": height, "frames": frames, "fps": fps}
    )


def _by_frame(samples: Sequence[Sample]) -> dict[str, list[float | None]]:
    """PSNR in dB of each frame of each recipe to the plain run; None where a frame is identical."""
    import math

    from hasten.metrics import psnr_by_frame

    found = {sample.recipe: psnr_by_frame(sample.frames, samples[0].frames) for sample in samples[1:]}
    return {name: [value if math.isfinite(value) else None for value in values] for name, values in found.items()}
