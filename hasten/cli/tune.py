"""`hasten tune`: name a quality budget and some minutes, get the fastest composition that was measured to keep it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.options import Call, Device, Dtype, Lora, Offload, Revision
from hasten.cli.output import JsonOption, Output
from hasten.cli.places import writable
from hasten.cli.values import assignments
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.pipelines.tune.result import Tuned

CHANGE, SEARCHED = "What to generate", "What is searched"

COLUMNS = {
    "recipe": "composition", "speedup": "speed-up", "nfe": "evaluations", "goal_worst": "worst", "goal_median": "median",
    "goal_interval": "95 % interval", "kept_text": "keep it", "n": "runs", "note": "note",
}  # fmt: skip


def tune(
    model: Annotated[str, typer.Option(metavar="MODEL", help="A bundled model, a folder with a model, or a hub id.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="One prompt a line, or JSON lines with prompt and seed. Every third is held out; of texts, two in three."
            " Needed but for lossless.",
            rich_help_panel=CHANGE,
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            metavar="WHAT", help="psnr>=30, latent_error<=0.05 or ssim>=0.98, against the plain run; of texts exact_match>=0.99; of causal"
            " language models lossless.",
        ),
    ] = "psnr>=30",
    time: Annotated[str, typer.Option(metavar="LONG", help="For everything: 10m, 90s, 1h30m.")] = "10m",
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the recipe goes.")] = Path("recipe.yaml"),
    study: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Journal of the search, continued if there is one. Default: beside --out.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the search. Prompts without a seed have their line's number.")] = 0,
    attention: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Sparse attention that may be added; may be repeated.", rich_help_panel=SEARCHED)
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME|FILE", help="Recipe of a student, of lossless its folder, too; may be repeated.", rich_help_panel=SEARCHED)
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Measure the caches of diffusers and cache-dit, too.", rich_help_panel=SEARCHED)
    ] = False,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Solver steps of the plain run.", rich_help_panel=CHANGE)] = None,
    height: Annotated[int | None, typer.Option(metavar="N", help="Pixels.", rich_help_panel=CHANGE)] = None,
    width: Annotated[int | None, typer.Option(metavar="N", help="Pixels.", rich_help_panel=CHANGE)] = None,
    frames: Annotated[int | None, typer.Option(metavar="N", help="Of a video.", rich_help_panel=CHANGE)] = None,
    guidance: Annotated[float | None, typer.Option(metavar="X", help="Guidance scale.", rich_help_panel=CHANGE)] = None,
    keep: Annotated[bool, typer.Option(help="Keep a copy where a Budget on this machine finds it (HASTEN_HOME).", rich_help_panel=SEARCHED)] = True,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Texts at once, of a language model. Default: 8; 1 for lossless.", min=1, rich_help_panel=CHANGE)
    ] = None,
    call: Call = None,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = "none",
    lora: Lora = None,
    revision: Revision = None,
    json: JsonOption = None,
) -> None:
    """Search the fastest composition of solver, steps, guidance and cache that keeps a quality budget.

    A study that was interrupted or killed goes on where it was when the same command is given again; several at once share it.
    """
    output = Output("tune", json)
    with output.open():
        from hasten.cli.prompts import collect
        from hasten.pipelines.loading import check_name, open_pipeline
        from hasten.pipelines.text_models.loading import writes_text
        from hasten.pipelines.tune.goal import Goal, seconds_of
        from hasten.pipelines.tune.run import tune as service

        seconds = seconds_of(time)
        if budget == "lossless":
            from hasten.cli.tune_decode import DecodeTask

            pictures = {"steps": steps, "height": height, "width": width, "frames": frames, "guidance": guidance, "attention": attention,
                        "peers": peers, "lora": lora, "offload": offload != "none", "study": study, "revision": revision}  # fmt: skip
            called = assignments(call or [], "--call")
            drafts = DecodeTask(model, seconds, out, prompts, called, batch or 1, adapter or (), device, dtype, pictures, keep)
            raise typer.Exit(int(drafts.run(output).recipe is None))
        if prompts is None:
            raise UsageError("Name the prompts to tune for: --prompts FILE, one on each line.")
        unseeded = collect([], prompts, -1)  # -1: no seed of its own, so its number is taken
        pairs = [(item.text, item.index if item.seed == -1 else item.seed) for item in unseeded]
        if out.suffix not in (".yaml", ".yml"):
            raise UsageError(f"--out {out}: a recipe is a .yaml file, got {out.suffix or 'no suffix'!r}.")
        folder = study if study is not None else out.with_suffix(".study")
        own = {"steps": steps, "height": height, "width": width, "frames": frames, "guidance": guidance}
        if writes_text(model, revision):
            from hasten.cli.tune_text import TOGETHER, TextTask

            unfit = own | {"attention": attention, "adapter": adapter, "peers": peers, "lora": lora, "offload": offload != "none"}
            told = assignments(call or [], "--call")
            task = TextTask(model, budget, seconds, out, folder, told, batch or TOGETHER, seed, device, dtype, revision, unfit, keep)
            raise typer.Exit(int(task.run([text for text, _ in pairs], output).recipe is None))
        Goal.read(budget)  # before the model is opened
        check_name(model)
        with writable(out.absolute().parent, folder.absolute()):
            pipe = open_pipeline(model, revision=revision, device=device, dtype=dtype, offload=offload, lora=lora, quiet=True)
            try:
                found = service(
                    pipe, pairs, budget, seconds=seconds, study=folder, out=out, model=model, call=arguments(pipe, pairs, own, call),
                    peers=peers, attention=attention or (), adapters=adapter or (), seed=seed, keep=keep, say=output.note,
                )  # fmt: skip
            except KeyboardInterrupt:
                output.warn(f"Interrupted. The study is kept in {folder}; this continues it:\n  hasten {shlex.join(sys.argv[1:])}")
                raise typer.Exit(130) from None
        show(found, output, out)
        output.finish([{"model": model, **row} for row in found.rows()], **document(found))
    if found.recipe is None:
        raise typer.Exit(1)


def arguments(pipe: Any, pairs: list[tuple[str, int]], own: dict[str, Any], further: list[str] | None) -> dict[str, Any]:
    """What the pipeline is called with, all checked as `hasten generate` does."""
    from hasten.pipelines.generate import Prompt, Request, plan

    wanted = tuple(Prompt(text, seed, number) for number, (text, seed) in enumerate(pairs))
    call = plan(pipe, Request(wanted, extra=assignments(further or [], "--call"), **own))
    return {key: value for key, value in call.items() if key != "output_type"}


def show(found: Tuned, output: Output, out: Path) -> None:
    """The front, what held-out prompts said, and what else is to be known."""
    rows = [row | {"kept_text": f"{row['kept']:.0%}", "goal_interval": between(row)} for row in found.rows()]
    worst = {"goal_worst": f"worst {found.goal.measure}", "recipe": "composition"}
    for where, title in (("tuning", "Front, on the tuning prompts"), ("held out", "On held-out prompts")):
        if part := [row for row in rows if row["where"] == where]:
            output.say(f"\n{title}")
            output.table(part, COLUMNS | worst)
    output.say("")
    for sentence in found.sentences():
        output.say(sentence)
    if found.recipe is not None:
        output.say(f"The recipe is in {out}: hasten generate ... --recipe {out}")


def between(row: dict[str, Any]) -> str:
    ends = row["goal_interval"]
    return f"{ends[0]:.3g} to {ends[1]:.3g}" if ends else ""


def document(found: Tuned) -> dict[str, Any]:
    """What the JSON says besides the rows."""
    best, control = found.best, found.control
    return {
        "budget": str(found.goal), "best": best and best.measured.name, "fewer_steps": control and control.measured.name,
        "noise_floor": found.noise_floor, "plain_seconds": found.plain_seconds, "spent": found.spent, "notes": found.why,
        "interactions": [
            {"axes": each.axes, "alone": each.alone, "together": each.together, "ratio": each.ratio} for each in found.interactions
        ],
        "given_up": [{"recipe": name, "why": why} for name, why in found.given_up],
        "recipe": found.recipe and found.recipe.model_dump(),
    }  # fmt: skip
