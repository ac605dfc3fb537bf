"""`hasten train restore`: a small restorer of handwritten digits, by residual shifting."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli.output import JsonOption, Output
from hasten.cli.places import writable
from hasten.errors import UsageError


def train_restore(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the network and its scheduler, in diffusers' formats.")],
    data: Annotated[
        str, typer.Option(help="Folder of MNIST images, or `sklearn` for scikit-learn's bundled digits.")
    ] = "sklearn",
    steps: Annotated[int, typer.Option(metavar="N", help="Steps of the training.", min=1)] = 800,
    batch: Annotated[int, typer.Option(metavar="N", help="Pictures in a step.", min=1)] = 32,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the weights and of what is drawn in each step.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    json: JsonOption = None,
) -> None:
    """Train a small network that restores blurred and shrunk digits in a few steps (ResShift)."""
    output = Output("train restore", json)
    with output.open():
        if data != "sklearn" and not Path(data).is_dir():
            raise UsageError(f"There is no data folder {data}. Name one with MNIST images, or say --data sklearn.")
        if resume and not out.is_dir():
            raise UsageError(f"Cannot resume: there is no folder {out}. Leave --resume out to start.")
        from hasten.distill.restoration import Restoring, train

        started = time.perf_counter()
        losses: list[float] = []

        with writable(out.absolute()):
            train(
                out, data, Restoring(steps=steps, batch=batch, seed=seed), resume=resume, progress=True,
                told=lambda step, loss: losses.append(loss),
            )  # fmt: skip
        last = sum(losses[-20:]) / len(losses[-20:]) if losses else None  # resumed when all was done
        seconds = time.perf_counter() - started
        output.say(f"A restorer of digits is in {out}: hasten.distill.restoration.RestorationNet, and its scheduler.")
        output.finish([{"model": "restorer", "out": str(out), "steps": steps, "loss": last, "seconds": seconds}])
