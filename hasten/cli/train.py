"""`hasten train`: train the small models from scratch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli.output import JsonOption, Output
from hasten.cli.places import writable
from hasten.cli.values import assignments
from hasten.errors import HastenError, ResumeError, UsageError

app = typer.Typer(help="Train the small models from scratch.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Train the small models from scratch."""


@app.command("pretrain")
def pretrain(
    config: Annotated[str, typer.Option(help="YAML file, or the name of a bundled one such as tiny-video.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the finished pipeline.")],
    data: Annotated[
        str, typer.Option(help="Folder of MNIST images, or `sklearn` for its bundled digits.")
    ] = "sklearn",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the configuration: denoiser.steps=100."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Train a tiny video or image model on handwritten digits that move."""
    output = Output("train pretrain", json)
    with output.open():
        from hasten.distill.pretrain import pretrain as run
        from hasten.distill.pretrain_config import load_config

        if data != "sklearn" and not Path(data).is_dir():
            raise UsageError(
                f"There is no data folder {data}. Name one with MNIST images, or say --data sklearn."
            )
        if resume and not out.is_dir():
            raise UsageError(f"Cannot resume: there is no folder {out}. Leave --resume out to start.")
        started = time.perf_counter()
        try:
            settings = load_config(config, assignments(set_ or [], "--set"))
            with writable(out.absolute()):
                folder = run(settings, out=out, data=data, resume=resume)
        except HastenError:
            raise
        except (FileNotFoundError, FileExistsError, ModuleNotFoundError) as error:
            raise UsageError(_sentence(error)) from error
        except (
            ValueError
        ) as error:  # the trainer's word for a configuration or a checkpoint that does not fit
            kind = ResumeError if "resume" in str(error) else UsageError
            raise kind(_sentence(error)) from error
        seconds = time.perf_counter() - started
        output.say(
            f"{settings.name} is in {folder}. Use it: hasten generate {folder} --prompt 'a seven moving left'"
        )
        output.finish([{"model": settings.name, "folder": str(folder), "seconds": seconds}])


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."
