"""`hasten profile`: measure a model's blocks, and write the recipes that the measurements give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.options import Call, Device, Dtype, Offload, Revision
from hasten.cli.output import JsonOption, Output
from hasten.cli.values import assignments
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.pipelines.profile import Profile

DEFAULT_PROMPTS = 3


def profile(
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A bundled model, a diffusers folder, or a hub id.")
    ] = "tiny-video",
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="May be repeated. Default: ours, for bundled models.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="One prompt a line.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Noise seed of the first prompt.", min=0)] = 1000,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Solver steps. Default: the model's.", min=4)
    ] = None,
    height: Annotated[int | None, typer.Option(metavar="N", help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(metavar="N", help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(metavar="N", help="Of a video.")] = None,
    guidance: Annotated[float | None, typer.Option(metavar="X", help="Guidance scale.")] = None,
    call: Call = None,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The .yaml of the block set; the others stand beside it.")
    ] = Path("profile.yaml"),
    share: Annotated[float, typer.Option(metavar="X", help="Part of the blocks to leave out.", min=0.01, max=1)] = 0.5,
    computed: Annotated[
        float, typer.Option(metavar="X", help="Share of the steps that TeaCache is to compute.", min=0.05, max=1)
    ] = 0.5,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = "none",
    revision: Revision = None,
    json: JsonOption = None,
) -> None:
    """Measure which blocks of a model move from step to step, and write recipes for it.

    FILE.yaml leaves out the blocks that move least (ProfilingDiT), FILE.teacache.yaml has TeaCache's polynomial,
    FILE.magcache.yaml MagCache's ratios. Use them with hasten generate --recipe FILE.
    """
    output = Output("profile", json)
    with output.open():
        from hasten.atomic import atomic_write
        from hasten.cli.places import writable
        from hasten.pipelines.generate import Request
        from hasten.pipelines.loading import check_name, open_pipeline
        from hasten.pipelines.profile import profile as measure

        if out.suffix not in (".yaml", ".yml"):
            raise UsageError(f"--out {out}: name a .yaml file.")
        check_name(model)
        with writable(out.absolute().parent):
            pipe = open_pipeline(model, revision=revision, device=device, dtype=dtype, offload=offload, quiet=True)
            wanted = _prompts(pipe, prompt or [], prompts, seed)
            output.note(f"{len(wanted)} full runs of {model}.")
            request = Request(
                wanted, None, steps, height, width, frames, guidance, assignments(call or [], "--call")
            )
            found = measure(pipe, request, output.note)
            made = found.recipes(share=share, computed=computed)
            rows = []
            for name, recipe in made.items():
                file = out if name == "profiling-dit" else out.with_suffix(f".{name}.yaml")
                atomic_write(file, recipe.to_yaml())
                rows.append({"model": model, "recipe": recipe.name, "file": str(file)})
        _say(output, found, made["profiling-dit"].reuse)
        output.table(rows, {"recipe": "recipe", "file": "file"})
        output.finish(rows, profile=found.to_dict())


def _prompts(pipe: Any, texts: list[str], file: Path | None, seed: int) -> tuple[Any, ...]:
    """The prompts asked for; for a bundled model without any, a few of our own."""
    from hasten.cli.bench import own_prompts
    from hasten.cli.prompts import collect
    from hasten.pipelines.generate import Prompt, makes_video
    from hasten.pipelines.tiny_models import call_defaults

    if texts or file is not None:
        return tuple(collect(texts, file, seed))
    if not call_defaults(pipe):
        raise UsageError("hasten profile needs prompts for this model: give --prompt TEXT or --prompts FILE.")
    own = own_prompts(makes_video(pipe))[:DEFAULT_PROMPTS]
    return tuple(Prompt(text, seed + i, i) for i, text in enumerate(own))


def _say(output: Output, found: Profile, reuse: Any) -> None:
    """The measurements, block by block."""
    lift = found.foreground if isinstance(found.foreground, list) else None
    chosen = set(getattr(reuse.span, "blocks", ()))
    rows = [
        {"block": i, "change": change, "foreground": lift[i] if lift else None, "left out": "yes" if i in chosen else ""}
        for i, change in enumerate(found.change)
    ]
    output.table(rows, {"block": "block", "change": "change", "foreground": "foreground", "left out": "left out"})
    if len(found.served) > 1:
        parts = [f"{name} was measured at steps {first} to {last}" for name, (first, last) in found.served.items()]
        output.note(f"{' and '.join(parts)} of {found.steps}; the recipes hold for both.")
    if isinstance(found.foreground, str):
        output.note(f"Attention to salient tokens was not measured: {found.foreground}.")
    _, _, fit = found.polynomial()
    output.say(f"TeaCache's polynomial explains {100 * fit:.0f} % of the output's change (R squared).")
