"""Make a video with the bundled model, accelerated, and write the video and the report.

    python examples/generate_video.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import hasten
from hasten.pipelines import media, tiny_models


def main(folder: Path, steps: int = 50) -> Path:
    pipe = hasten.load("tiny-video")  # or WanPipeline.from_pretrained(...)
    call = tiny_models.call_defaults("tiny-video") | {"num_inference_steps": steps}
    prompt = "a seven moving left, slowly"

    with hasten.accelerate(pipe, "balanced") as run:
        video = pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="np", **call).frames[0]

    report = run.report()
    print(report)
    report.save(folder / "report.html")
    return media.save(video, folder / "seven.mp4", metadata={"prompt": prompt, "seed": 0, "recipe": run.recipe})[0]


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "hasten-example")
    target.mkdir(parents=True, exist_ok=True)
    print(main(target))
