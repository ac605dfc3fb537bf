"""`hasten doctor`: what this machine and this model can do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.options import Device, Dtype, Revision
from hasten.cli.output import JsonOption, Output, hardware, versions
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.pipelines.doctor.backends import Check

MARKS = {"ok": "ok", "failed": "FAILED", "absent": "absent", "refused": "refused", "inapplicable": "n/a"}


def doctor(
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also check hasten's promises on this diffusers model.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what takes longer.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also check torch.compile on the model's blocks, which takes longest.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    json: JsonOption = None,
) -> None:
    """Versions, devices, and which backends give right results here; with --model, whether it passes our checks.

    The model is tried in short runs, each check is taken off it again, and at the end its plain result must be the
    same to the bit. n/a: what is asked does not arise on this model, and why. refused: hasten does not do it there.
    Exit code 1 when something that is present gives wrong results.
    """
    out = Output("doctor", json)
    with out.open():
        if compiled and model is None:
            raise UsageError("--compile belongs to a model's checks; name one with --model, or leave it out.")
        from hasten.pipelines.doctor.backends import backends
        from hasten.pipelines.doctor.conformance import conformance
        from hasten.pipelines.loading import open_pipeline, pick_device

        place = pick_device(device)
        # A model that cannot be opened is said before anything is measured.
        pipe = open_pipeline(model, revision=revision, device=device, dtype=dtype, quiet=True) if model else None
        out.say("  ".join(f"{name} {number}" for name, number in versions().items()))
        out.say("  ".join(f"{key} {value}" for key, value in hardware().items()))
        out.say(f"\nBackends on {place}, each against float64:")
        rows = _show(out, backends(place, quick=quick), {"section": "backends"})
        if pipe is not None:
            out.say(f"\n{model} ({type(pipe).__name__}):")
            rows += _show(out, conformance(pipe, quick=quick, compiled=compiled), {"section": "model", "model": model})
        wrong = [row["check"] for row in rows if row["status"] == "failed"]
        out.say(
            f"\n{len(wrong)} wrong: {', '.join(wrong)}."
            if wrong
            else "\nEverything that is present is right."
        )
        out.finish(rows)
        if wrong:
            raise typer.Exit(1)


def _show(out: Output, checks: Iterable[Check], where: dict[str, Any]) -> list[dict[str, Any]]:
    """Print each check as soon as it is done, and keep it as a row."""
    rows = []
    for found in checks:
        out.say(f"  {MARKS[found.status]:8} {found.name:34} {found.detail}")
        rows.append(where | found.to_dict())
    return rows
