"""`hasten bench compose`: minutes of tuning against every single method, every peer and fewer steps."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli.options import Device, Dtype
from hasten.cli.output import JsonOption, Output


def compose(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="tiny-image, tiny-flux or tiny-video.")] = "tiny-image",
    time: Annotated[str, typer.Option(metavar="TIME", help="How long to tune: 10m, 90s.")] = "10m",
    held: Annotated[int, typer.Option(metavar="N", help="Held-out prompts that everything is measured on.", min=2, max=24)] = 12,
    thin: Annotated[int, typer.Option(metavar="N", help="Every N-th setting of each peer only.", min=1)] = 1,
    study: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the study is kept, to go on with it.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    json: JsonOption = None,
) -> None:
    """Tune, then compare with every single-method preset, the peers' best and fewer steps, at 30, 35 and 40 dB."""
    output = Output("bench compose", json)
    with output.open():
        from hasten.cli.bench import _bundled
        from hasten.distill.bench.contest import prompts
        from hasten.pipelines.bench.compose import bars, bench_compose, rows
        from hasten.pipelines.generate import makes_video
        from hasten.pipelines.tune.goal import seconds_of

        pipe, call = _bundled("compose", model, device, dtype)
        known = prompts("video" if makes_video(pipe) else "image", 80)
        texts = [known[37 * k % len(known)] for k in range(3 * held)]  # digits, places and ways mixed
        with tempfile.TemporaryDirectory() as folder:
            found = bench_compose(
                pipe, call, texts, model=model, seconds=seconds_of(time), folder=study or Path(folder), held=held, thin=thin,
                tell=output.note,
            )  # fmt: skip
        made, verdicts = rows(found, model), bars(found)
        output.table(
            [dict(row) for row in made if row["n"]],
            {"recipe": "recipe", "what": "what", "speedup": "speed-up", "nfe": "evaluations", "psnr_median": "PSNR dB",
             "psnr_worst": "worst", "psnr_converged": "to converged", "keeps": "keeps", "tuned_for": "tuned for", "n": "runs"},
        )  # fmt: skip
        output.say("")
        output.table([{"bar": bar.bar, "met": bar.verdict, "detail": bar.detail} for bar in verdicts])
        tuned = found.tuned
        assert tuned is not None
        output.finish(
            [dict(row) for row in made], call=call, held=held, tuning_seconds=tuned.spent, trials=len(tuned.trials),
            front=[tuned.row(trial.measured) for trial in tuned.front], noise_floor=found.floor,
            plain_to_converged=found.plain_converged, bars=[bar.to_dict() for bar in verdicts],
            recipes={entry.measured.name: entry.recipe for entry in found.entries if entry.what == "tuned"},
        )  # fmt: skip
