"""A tuning that kills itself in the middle of its fourth trial: `python -m tests.pipelines.tune.killed FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from hasten.pipelines.tune.run import tune
from hasten.pipelines.tune.trials import Bench, Measured
from tests.hosts import UNET_CALL, small_unet

PROMPTS = ["a seven", "a one", "the cat", "a red dog"]
LAST = 4


def main(folder: Path) -> None:
    measure, count = Bench.measure, 0

    def until_the_last(self: Bench, *args: Any, **kwargs: Any) -> Measured:
        nonlocal count
        count += 1
        if count == LAST:
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(self, *args, **kwargs)

    Bench.measure = until_the_last  # type: ignore[method-assign]
    tune(small_unet(), PROMPTS, "psnr>=25", seconds=1200, study=folder, model="small", call=UNET_CALL, say=print)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
