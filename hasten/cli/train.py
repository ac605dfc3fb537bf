"""`hasten train`: students, LoRAs, the small models from scratch, and commit filters."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.cli import train_method
from hasten.cli.output import JsonOption, Output
from hasten.cli.places import writable
from hasten.cli.train_filter import train_filter
from hasten.cli.train_restore import train_restore
from hasten.cli.values import assignments
from hasten.errors import HastenError, ResumeError, UsageError

app = typer.Typer(help="Train students of any model, LoRAs on your own pictures, and the small models from scratch.", no_args_is_help=True)
app.command("filter")(train_filter)
app.command("restore")(train_restore)
train_method.add(app)


@app.callback()
def _group() -> None:
    """Train students of any model, LoRAs on your own pictures, and the small models from scratch."""


@app.command("pretrain")
def pretrain(
    config: Annotated[
        str, typer.Option(help="YAML file, or the name of a bundled one such as tiny-video or tiny-dllm.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the finished model.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Pictures: folder of MNIST images, or `sklearn` (default) for its bundled digits."
            " Text: folder of Python sources, or `stdlib` (default)."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the configuration: denoiser.steps=100."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Train a tiny video, image or masked image model on handwritten digits, or a text model on Python and list tasks."""
    output = Output("train pretrain", json)
    with output.open():
        from hasten.distill.pretrain.text_config import load_any

        if resume and not out.is_dir():
            raise UsageError(f"Cannot resume: there is no folder {out}. Leave --resume out to start.")
        started = time.perf_counter()
        try:
            settings = load_any(config, assignments(set_ or [], "--set"))
            source = _source(settings.kind, data)
            with writable(out.absolute()):
                folder = _run(settings, out, source, resume)
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
        output.say(f"{settings.name} is in {folder}. Use it: {_use(settings.kind, folder)}")
        output.finish([{"model": settings.name, "folder": str(folder), "seconds": seconds}])


def _source(kind: str, data: str | None) -> str:
    """What to train on; `UsageError` for a folder that is not there."""
    usual, what = ("stdlib", "Python sources") if kind == "text" else ("sklearn", "MNIST images")
    if data is None or data == usual or Path(data).is_dir():
        return data or usual
    raise UsageError(f"There is no data folder {data}. Name one with {what}, or say --data {usual}.")


def _run(settings: Any, out: Path, data: str, resume: bool) -> Path:
    """The trainer of this kind of model; the finished model's folder."""
    from hasten.distill.pretrain.masked_images_config import MaskedImageConfig
    from hasten.distill.pretrain.text_config import TextPretrainConfig

    if isinstance(settings, MaskedImageConfig):
        from hasten.distill.pretrain.masked_images import pretrain_masked

        return pretrain_masked(settings, out=out, data=data, resume=resume)
    if isinstance(settings, TextPretrainConfig):
        from hasten.distill.pretrain.texts import pretrain_text

        return pretrain_text(settings, out=out, data=data, resume=resume)
    from hasten.distill.pretrain.pictures import pretrain as pretrain_pictures

    return pretrain_pictures(settings, out=out, data=data, resume=resume)


def _use(kind: str, folder: Path) -> str:
    if kind == "text":
        return f"transformers.AutoModelForCausalLM.from_pretrained('{folder}')"
    if kind == "masked-image":
        return f"MaskedImagePipeline.from_pretrained('{folder}')"
    if kind == "image-tokens":
        return f"TokenImagePipeline.from_pretrained('{folder}')"
    return f"hasten generate {folder} --prompt 'a seven moving left'"


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."
