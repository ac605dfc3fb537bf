"""`hasten export serve`: the settings with which a server does what a recipe does."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli.output import JsonOption, Output
from hasten.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from hasten.pipelines.handover.served import Served

app = typer.Typer(help="Hand over to other programs.", no_args_is_help=True)


class Server(StrEnum):
    """Servers with a counterpart."""

    vllm = "vllm"
    sglang = "sglang"


@app.callback()
def _export() -> None:
    """Hand over to other programs."""


@app.command("serve")
def serve(
    model: Annotated[str, typer.Option(metavar="MODEL", help="A bundled text model, a folder with a model, or a hub id.")],
    to: Annotated[Server, typer.Option(help="The server.")],
    recipe: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="What the server shall do; hasten recipes lists them.")] = None,
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Result of hasten bench decode --json: how many drafts pay at which batch size.")
    ] = None,
    heads: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Instead of a recipe: the student of a hasten train medusa, for vLLM.")
    ] = None,
    heads_to: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the heads go in the layout that vLLM loads.")] = None,
    json: JsonOption = None,
) -> None:
    """How to start vLLM or SGLang so that it drafts as a recipe does; what has no counterpart is refused with the reason."""
    output = Output("export serve", json)
    with output.open():
        found = _heads(model, to, heads, heads_to, recipe) if heads is not None else _recipe(model, to, recipe, measured)
        output.say(found.command)
        for note in found.notes:
            output.note(note)
        row = {"model": model, "recipe": recipe, "server": found.server}
        output.finish([row], config=found.config, argv=found.argv, notes=list(found.notes))


def _recipe(model: str, to: Server, recipe: str | None, measured: Path | None) -> Served:
    from hasten.pipelines.handover.lengths import of_file
    from hasten.pipelines.handover.served import place
    from hasten.pipelines.handover.sglang import serve_sglang
    from hasten.pipelines.handover.vllm import serve_vllm

    if recipe is None:
        raise UsageError("Name a --recipe, such as look-up:width=1, or --heads of a hasten train medusa.")
    lengths = {} if measured is None else of_file(measured, recipe)
    return (serve_vllm if to is Server.vllm else serve_sglang)(recipe, place(model), lengths)


def _heads(model: str, to: Server, heads: Path, into: Path | None, recipe: str | None) -> Served:
    from hasten.pipelines.handover.medusa import serve_medusa
    from hasten.pipelines.handover.served import place
    from hasten.pipelines.text_models.loading import open_text

    if to is not Server.vllm:
        raise RefusedError("SGLang has no Medusa heads. Hand them over to vLLM: --to vllm.")
    if into is None or recipe is not None:
        raise UsageError("--heads needs --heads-to FOLDER, and no --recipe.")
    return serve_medusa(open_text(model)[0], place(model), heads, into)

