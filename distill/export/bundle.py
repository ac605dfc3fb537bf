"""Put a finished training's student among those that come with hasten.

    python -m hasten.distill.export.bundle TRAINING NAME ROWS.json [--calls K] [--into FOLDER]

The adapter is stored in half precision. With --calls it is sampled by so many calls, not by those it was trained for. ROWS.json is what `hasten bench distill --json` wrote; the card has the rows of this
training. `training.json` says how it was trained, what that cost, and how the loss went.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasten.atomic import atomic_write
from hasten.distill.bench.table import in_card
from hasten.distill.data import store
from hasten.distill.export.student import Student, student_of
from hasten.distill.loop import cost
from hasten.distill.loop.state import replace_folder
from hasten.distill.trained import open_trained
from hasten.errors import UsageError
from hasten.pipelines.lora import BUNDLED

LICENCE = "apache-2.0"
POINTS = 50
"""Of the loss curve."""


def bundle(training: Path, name: str, rows: list[dict[str, Any]], calls: int | None = None, into: Path = BUNDLED) -> Path:
    """Write `into/NAME`. calls: by how many it is sampled, None for what it was trained for.

    Raises `UsageError` where `rows` has none of this training, or it trained all weights or rounded ones.
    """
    trained = open_trained(training)
    if trained.config.student.full:
        raise UsageError(f"'{training}' trained all weights; what comes with hasten are adapters.")
    table = in_card(rows, training)
    if not any(row["who"] == "student" for row in table):
        raise UsageError(f"The rows have none of '{training.name}'. Measure it first: hasten bench distill --student {training}.")
    student = student_of(
        trained.trainer, trained.pipe, trained.config.model, call=trained.call, name=name, table=table, licence=LICENCE
    )
    if not isinstance(student, Student) or student.weights is None or student.steps is None:
        raise UsageError(f"'{training}' ({trained.config.method.kind}) made no adapter that is sampled by a few calls.")
    steps = student.steps if calls is None else student.steps.even(calls, trained.host.path, student.steps.how)
    halved = replace(student, steps=steps, weights={key: value.half() for key, value in student.weights.items()})

    def write(part: Path) -> None:
        halved.save(part)
        atomic_write(part / "training.json", json.dumps(_facts(training), indent=1) + "\n")

    replace_folder(into / name, write)
    return into / name


def _facts(training: Path) -> dict[str, Any]:
    """Configuration, cost and a thinned log of this training; folders of the machine it ran on are left out."""
    config = json.loads((training / "config.json").read_text())
    made = store.facts(Path(config["data"].get("file") or training / "data.safetensors"))
    begun = config["student"].get("start")
    config["student"] |= {"start": Path(begun).name if begun else None}
    for key in ("file", "prompts"):
        value = config["data"].get(key)
        config["data"] |= {key: Path(value).name if isinstance(value, str) and value else value}
    lines = [json.loads(line) for line in (training / "log.jsonl").read_text().splitlines()]
    kept = lines[:: max(1, len(lines) // POINTS)]
    return {"config": config, "data": made, "cost": cost.read(training), "loss": [[line["step"], line["loss"]] for line in kept]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("training", type=Path)
    parser.add_argument("name")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--calls", type=int)
    parser.add_argument("--into", type=Path, default=BUNDLED)
    told = parser.parse_args()
    print(bundle(told.training, told.name, json.loads(told.rows.read_text())["rows"], told.calls, told.into))


if __name__ == "__main__":
    main()
