"""`hasten train filter`: `hasten train learn2pd` in one go, without a folder to resume from, and for prompts in a chat template."""

from __future__ import annotations

import json as jsons
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hasten.cli.options import Device, Dtype
from hasten.cli.output import JsonOption, Output
from hasten.cli.places import writable
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.samplers.filter import Form

NEW = 128
"""Slots to generate behind a prompt of a file where nothing is said."""


def train_filter(
    model: Annotated[str, typer.Option(metavar="MODEL", help="A bundled text model, a folder with one, or a hub id.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The filter, a .safetensors file of a few KiB.")],
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts like those it will be used on, one a line. Default: what the model learned."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Python sources for code prompts. Default: the standard library.")
    ] = None,
    form: Annotated[
        str, typer.Option(help="slots: looks at a slot and its neighbours. block: Learn2PD's, at the block's confidences.")
    ] = "slots",
    false_commits: Annotated[
        float, typer.Option(metavar="SHARE", help="Expected share of a text's tokens that it may write wrong.")
    ] = 0.01,
    texts: Annotated[int, typer.Option(metavar="N", help="Texts to generate, unless --prompts says which.", min=1)] = 600,
    new: Annotated[
        int | None, typer.Option(metavar="N", help=f"Tokens behind each prompt of --prompts. Default: {NEW}.", min=1)
    ] = None,
    chat: Annotated[bool, typer.Option(help="Put the prompts of --prompts into the tokenizer's chat template.")] = False,
    oracle: Annotated[bool, typer.Option(help="Learn from states in which all that is final is written, as Learn2PD does.")] = False,
    mask_token_id: Annotated[
        int | None, typer.Option(metavar="ID", help="The mask token of a model whose config does not name it.", min=0)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the prompts, of the weights and of what is held back.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    json: JsonOption = None,
) -> None:
    """Train a filter that tells which tokens are final already, for the recipes learned-filter and learn2pd."""
    output = Output("train filter", json)
    with output.open():
        from hasten.distill.methods.learn2pd import Learn2PD, fit
        from hasten.distill.text import filter as text_filter
        from hasten.distill.text.filter_prompts import given, own
        from hasten.pipelines.loading import silence
        from hasten.pipelines.recipes import recipe
        from hasten.pipelines.text_models.families import choose
        from hasten.pipelines.text_models.loading import open_text

        started = time.perf_counter()
        _check(out, form, data)
        _agree(prompts is not None, data=data is not None, new=new is not None, chat=chat)
        lines = _lines(prompts) if prompts is not None else None
        text_filter.check(texts if lines is None else len(lines), [new or NEW], false_commits)
        silence()
        network, tokenizer = open_text(model, None, device, dtype)
        host = choose(network, tokenizer, mask_token_id=mask_token_id)
        asked = (
            own(_learned(network, model), tokenizer, texts, host.facts, seed, data)
            if lines is None
            else given(lines, tokenizer, new or NEW, host.facts, chat=chat)
        )
        output.note(f"{model}: one token at a time behind {asked.about}")
        with writable(out.absolute().parent):
            method = Learn2PD(form=cast("Form", form), false_commits=false_commits, oracle=oracle)
            card = fit(host, asked, recipe(method.writes), out, method, seed=seed, model=_name(model), told=output.note)
        for line in said(card, out, network):
            output.say(line)
        if not card["recall"]:
            output.warn("No token passes. Allow more false commits, or give more prompts.")
        output.finish([{**card, "out": str(out), "seconds": time.perf_counter() - started}])


def said(card: dict[str, Any], out: Path, network: Any) -> list[str]:
    """The card in words, and how the filter is used."""
    from hasten.pipelines.text.filters import FILES

    name = "learned-filter" if card["filter"] == "slots" else "learn2pd"
    folder = Path(getattr(network.config, "_name_or_path", "") or ".")
    home = out.name == FILES[cast("Form", card["filter"])] and out.absolute().parent.resolve() == folder.resolve()
    known = name if home else f"{name}:weights={out}"
    return [
        f"A filter of the form {card['filter']} from {card['states']:,} states of {card['texts']} texts is in {out}.",
        (
            f"Tokens are written from probability {card['above']:.4f} on. Of {card['kept']} texts kept for choosing that,"
            f" {card['recall']:.0%} of the right tokens pass at each step, and {card['false']:.2%} of the slots would have been"
            f" written wrong ({card['false_commits']:.2%} allowed on new texts)."
        ),
        f'Use it: pipe.generate(prompts=..., recipe="{known}")',
    ]


def _check(out: Path, form: str, data: Path | None) -> None:
    """What can be said before anything is loaded."""
    if form not in ("slots", "block"):
        raise UsageError(f"--form {form}: there are slots and block. slots serves blocks of any size, block is Learn2PD's own.")
    if out.suffix != ".safetensors" or out.is_dir():
        raise UsageError(f"--out {out}: a filter is a .safetensors file. Name one, such as filter-{form}.safetensors.")
    if data is not None and not data.is_dir():
        raise UsageError(f"There is no data folder {data}. Name one with Python sources, or leave --data out.")


def _agree(prompts: bool, *, data: bool, new: bool, chat: bool) -> None:
    """Options that go with --prompts, or without."""
    if prompts and data:
        raise UsageError("--data is for code prompts, and --prompts brings prompts of its own. Leave one of them out.")
    if not prompts and (new or chat):
        raise UsageError(f"--{'new' if new else 'chat'} goes with --prompts; list tasks and code need none. Leave it out.")


def _lines(file: Path) -> list[str]:
    from hasten.cli.prompts import collect

    return [prompt.text for prompt in collect([], file, 0)]


def _learned(network: Any, model: str) -> dict[str, Any]:
    """What the model was trained on, if its folder says so. Raises `UsageError` if not."""
    file = Path(getattr(network.config, "_name_or_path", "") or ".") / "hasten.json"
    try:
        found: dict[str, Any] = jsons.loads(file.read_text(encoding="utf-8"))["data"]
        return dict(found)
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"Nobody knows what {model} is used for: it has no card that says what it was trained on. Pass --prompts FILE with"
            " prompts like yours, one a line."
        ) from None


def _name(model: str) -> str:
    """The model's name for the card: no paths of this machine."""
    return Path(model).resolve().name if Path(model).is_dir() else model
