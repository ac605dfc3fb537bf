"""What previews of latents cost: processor time of a picture, and of runs with and without them.

python benchmarks/ui_preview.py [--runs 5] [--json FILE]

Runs alternate. Processor seconds of this process are compared, which other programs on the machine do not change. A picture is
made twice a second at most; its cost beside a step of a large model is told by the sizes at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hasten.ui.engine import Snapshot, read
from hasten.ui.engine.desk import Desk
from hasten.ui.engine.linear_map import LinearMap
from hasten.ui.engine.place import Place
from hasten.ui.engine.preview import as_png

ASKED = {"kind": "generate", "prompt": "a seven", "recipe": "plain", "steps": 20}
MODELS = ("tiny-image", "tiny-video")
LATENTS = {"Wan 480 x 832": (16, 60, 104), "Wan 720 x 1280": (16, 90, 160), "FLUX 1024 x 1024": (16, 128, 128)}
"""Name -> C, h, w of one frame."""


def busy(desk: Desk, model: str, preview: bool, number: int) -> tuple[float, int]:
    """(processor seconds of the denoising, pictures shown)."""
    began: list[float] = []
    ended: list[float] = []
    shown: set[str] = set()

    def tell(snapshot: Snapshot) -> None:
        if snapshot.phase == "Denoising" and not began:
            began.append(time.process_time())
        if snapshot.phase == "Decoding" and not ended:
            ended.append(time.process_time())
        if snapshot.preview:
            shown.add(snapshot.preview)

    desk.perform(f"{number:016x}", read({**ASKED, "model": model, "preview": preview}), tell, lambda: False)
    return ended[0] - began[0], len(shown)


def compared(desk: Desk, model: str, runs: int) -> dict[str, Any]:
    """Medians over alternating runs."""
    busy(desk, model, True, 0)  # the map is fitted, and everything is warm
    pairs = [(busy(desk, model, False, 1), busy(desk, model, True, 2)) for _ in range(runs)]
    plain, shown = (statistics.median(each[side][0] for each in pairs) for side in (0, 1))
    spread = max(each[0][0] for each in pairs) / min(each[0][0] for each in pairs) - 1
    return {
        "model": model, "seconds": shown, "seconds_without": plain, "overhead": shown / plain - 1, "spread_without": spread,
        "pictures": statistics.median(each[1][1] for each in pairs), "n": runs,
    }  # fmt: skip


def pictured(name: str, runs: int = 20) -> dict[str, Any]:
    """Processor milliseconds of one picture."""
    channels, h, w = LATENTS[name]
    made = LinearMap("bench", channels, 8)
    made.learn(torch.randn(1, channels, h, w), torch.rand(1, h * 8, w * 8, 3).numpy())
    z, took = torch.randn(channels, h, w), []
    for _ in range(runs):
        began = time.process_time()
        as_png(made.picture(z))
        took.append(1000 * (time.process_time() - began))
    return {"latents": name, "milliseconds": statistics.median(took), "n": runs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        place = Place(Path(home))
        place.make()
        rows: list[dict[str, Any]] = []
        for made in (*(partial(pictured, name) for name in LATENTS), *(partial(compared, Desk(place), model, given.runs) for model in MODELS)):
            rows.append(made())
            print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if given.json is not None:
        from hasten.cli.output import hardware, versions

        document = {"command": "benchmarks/ui_preview.py", "versions": versions(), "hardware": hardware(), "rows": rows}
        given.json.write_text(json.dumps(document, indent=1) + "\n")
