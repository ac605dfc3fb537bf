"""`hasten demo`: the first minute. One prompt, four runs, no download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.compare import Comparison
from hasten.cli.output import JsonOption, Output
from hasten.cli.places import writable

if TYPE_CHECKING:
    from hasten.pipelines.compare import Sample

RECIPES = ["balanced", "fast:student=false"]
"""What is reused; the students that `fast` would take are shown by the next one."""
STUDENT = "fastest"
"""Shown where hasten has a student of the model."""

COLUMNS = {
    "recipe": "run",
    "seconds": "seconds",
    "speedup": "faster",
    "computed_fraction": "computed",
    "psnr_median": "PSNR",
    "ssim_median": "SSIM",
    "skipped": "skipped",
    "reads": "judge reads",
}


def demo(
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="A digit, where it moves, how fast.")] = (
        "a seven moving left, slowly"
    ),
    seed: Annotated[int, typer.Option(metavar="N", help="Noise seed.", min=0)] = 1,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where videos and report.html go.")] = Path(
        "hasten-demo"
    ),
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A bundled video model, or a folder like one.")
    ] = "tiny-video",
    json: JsonOption = None,
) -> None:
    """Generate one video plain, balanced, fast and by a student with the bundled model, and compare them.

    Nothing is downloaded or sent. Below 90 seconds on two cores.
    """
    output = Output("demo", json)
    with output.open():
        from hasten.pipelines.host import denoisers
        from hasten.pipelines.loading import check_name, open_pipeline
        from hasten.pipelines.students import student_for

        check_name(model)
        with writable(out.absolute()):
            pipe = open_pipeline(model, quiet=True)
            output.say(f"{model}: {prompt!r}, seed {seed}. Nothing is downloaded or sent.")
            output.note("A few ways with the same noise, each timed three times after a warm-up; about 40 seconds on two cores.")
            run = Comparison(output, pipe, model, out, fps=8)
            recipes = [*RECIPES, *([STUDENT] if student_for(denoisers(pipe), 1) else [])]
            rows = run.run(recipes, [prompt], [seed], repeats=3)
            for row, sample in zip(rows, run.first, strict=True):
                row |= {"prompt": prompt, "seed": seed, "skipped": left_out(sample), **reading(sample)}
            output.table(rows, COLUMNS)
            output.say(
                "\nfaster: than plain. skipped: of the network's evaluations. PSNR in dB and SSIM: likeness to plain on"
                " raw frames;\na student draws as well as its teacher, but not the same clip. judge reads: what a classifier of real handwriting sees."
            )
            run.close(rows)
        output.say(
            "Next: hasten generate tiny-video --prompt 'a three moving up, quickly' --output three.mp4"
        )
        output.finish(rows)


def left_out(sample: Sample) -> str:
    """Evaluations of the network that were not computed: `76 of 100`."""
    report = sample.report
    if "student" in report.trace.facts:
        return f"all but {report.nfe:.0f} call{'s' if report.nfe > 1 else ''} of a student"
    skipped = report.evaluations - report.nfe
    return f"{skipped:.0f} of {report.evaluations}" if skipped else "nothing"


def reading(sample: Sample) -> dict[str, Any]:
    """What a classifier trained on real digits sees, and whether that is what the prompt said."""
    from hasten.pipelines.judge import in_words

    return in_words(sample.frames, sample.prompt.text)
