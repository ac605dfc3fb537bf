"""Make an image and leave out evaluations of the unconditional branch: guidance, not caching.

    python examples/image.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import hasten
from hasten.pipelines import media, tiny_models


def main(folder: Path, steps: int = 50) -> Path:
    pipe = hasten.load("tiny-image")  # both branches go through the network as one batch
    call = tiny_models.call_defaults("tiny-image") | {"num_inference_steps": steps}
    prompt = "a thick three at the top left"

    with hasten.accelerate(pipe, "linear-ag") as run:
        image = pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="np", **call).images[0]

    print(run.report())
    facts = {"prompt": prompt, "seed": 0, "recipe": run.recipe}
    return media.save(np.asarray(image)[None], folder / "three.png", metadata=facts)[0]


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "hasten-example")
    target.mkdir(parents=True, exist_ok=True)
    print(main(target))
