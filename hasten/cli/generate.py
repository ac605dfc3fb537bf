"""`hasten generate`: prompts in, files out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.generate_masked import MaskedTask
from hasten.cli.generate_search import check_recipe, default_recipe, noise_choice, say_search, searched_row
from hasten.cli.generate_text import TextTask
from hasten.cli.generate_tokens import TokensTask
from hasten.cli.options import Call, Device, Dtype, Fps, Lora, ModelArgument, Offload, Revision
from hasten.cli.output import JsonOption, Output, versions
from hasten.cli.places import Places, writable
from hasten.cli.progress import bar
from hasten.cli.values import assignments
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.pipelines.generate import Request, Result
    from hasten.pipelines.generate_searched import NoiseChoice
    from hasten.pipelines.session import Session
    from hasten.recipe import Recipe

CHANGE, SEARCH, FILES = "What to generate", "Search over noises", "Files"


def generate(
    model: ModelArgument,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="May be repeated.", rich_help_panel=CHANGE)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="One prompt a line, or JSON lines with prompt and seed.",
            rich_help_panel=CHANGE,
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to keep out.", rich_help_panel=CHANGE)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Noise seed.", rich_help_panel=CHANGE)] = 0,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Solver steps. Default: the model's.", rich_help_panel=CHANGE),
    ] = None,
    height: Annotated[int | None, typer.Option(metavar="N", help="Pixels.", rich_help_panel=CHANGE)] = None,
    width: Annotated[int | None, typer.Option(metavar="N", help="Pixels.", rich_help_panel=CHANGE)] = None,
    frames: Annotated[
        int | None, typer.Option(metavar="N", help="Of a video.", rich_help_panel=CHANGE)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(metavar="X", help="Guidance scale.", rich_help_panel=CHANGE)
    ] = None,
    call: Call = None,
    search: Annotated[
        str | None,
        typer.Option(
            metavar="HOW", help="Try several noises and keep the best: random, zero-order or paths.", rich_help_panel=SEARCH
        ),
    ] = None,
    candidates: Annotated[
        int,
        typer.Option(metavar="N", help="What the search may cost, in whole runs.", min=1, max=10_000, rich_help_panel=SEARCH),
    ] = 8,
    verifier: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Who chooses: digits (default for bundled models), sharpness, or your own module:function or file.py:function,"
            " which is imported and run.",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="How to go faster; see hasten recipes. Default: balanced; none for texts."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change the recipe, for example reuse.rule.share=0.3."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A .mp4, .gif or .png file, or a folder; .txt or .jsonl for texts."
            " Default: hasten-output; texts: the terminal.",
            rich_help_panel=FILES,
        ),
    ] = None,
    fps: Fps = 16,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What was skipped, as .html, .json or .txt.", rich_help_panel=FILES
        ),
    ] = None,
    metadata: Annotated[
        bool, typer.Option(help="Put prompt, seed and recipe into the files.", rich_help_panel=FILES)
    ] = True,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = "none",
    lora: Lora = None,
    revision: Revision = None,
    json: JsonOption = None,
) -> None:
    """Generate videos, images or texts from prompts, accelerated by a recipe.

    With `accelerate launch -m hasten generate --prompts FILE ...` the prompts are split over processes.
    """
    out = Output("generate", json)
    with out.open():
        from hasten.cli.prompts import collect
        from hasten.cli.ranks import Ranks
        from hasten.pipelines.generate import Request
        from hasten.pipelines.loading import check_name, open_pipeline
        from hasten.pipelines.masked_codes import is_masked_image, is_token_image
        from hasten.pipelines.recipes import recipe as find_recipe
        from hasten.pipelines.text_models.loading import writes_text

        wanted = collect(prompt or [], prompts, seed)
        by_row = is_token_image(model)
        if by_row or is_masked_image(model):
            none: dict[str, Any] = {"steps": steps, "negative-prompt": negative_prompt, "height": height, "width": width}
            none |= {"frames": frames, "lora": lora, "report": report, "offload": None if offload == "none" else offload}
            none |= {"search": search, "verifier": verifier} | ({"guidance": guidance} if by_row else {})
            places = Places.of(output or Path("hasten-output"), len(wanted))
            arguments = assignments(call or [], "--call") | ({} if guidance is None else {"guidance_scale": guidance})
            masked = (TokensTask if by_row else MaskedTask)(
                model, recipe, assignments(set_ or [], "--set"), wanted, arguments, places, metadata, device, dtype, none
            )
            _generate_masked(masked, out)
            return
        if writes_text(model, revision):
            unfit = {"negative-prompt": negative_prompt, "height": height, "width": width, "frames": frames, "lora": lora}
            unfit |= {"search": search, "verifier": verifier}
            more = {"steps": steps, "cfg_scale": guidance}
            arguments = assignments(call or [], "--call") | {key: value for key, value in more.items() if value is not None}
            text = TextTask(
                model, recipe, assignments(set_ or [], "--set"), wanted, arguments, output, report, device, dtype, revision,
                unfit | {"offload": None if offload == "none" else offload},
            )  # fmt: skip
            _generate_text(text, out)
            return
        places = Places.of(output or Path("hasten-output"), len(wanted))
        choice = noise_choice(model, search, verifier, candidates)
        chosen = find_recipe(recipe or default_recipe(choice)).replace(assignments(set_ or [], "--set"))
        check_recipe(choice, chosen)
        check_name(model)
        ranks = Ranks.start(device)
        request = Request(
            prompts=ranks.share(wanted),
            negative_prompt=negative_prompt,
            steps=steps,
            height=height,
            width=width,
            frames=frames,
            guidance=guidance,
            extra=assignments(call or [], "--call"),
        )
        task = _Task(model, chosen, request, places, fps, report, metadata, choice)
        with writable(places.folder.absolute(), *report_folder(report)):
            pipe = open_pipeline(
                model,
                revision=revision,
                device=ranks.device(device),
                dtype=dtype,
                offload=offload,
                lora=lora,
                quiet=True,
            )
            mine = task.run(pipe, out, quiet=not ranks.first)
            rows = sorted(ranks.gather(mine), key=lambda row: row["index"])
        if ranks.first:
            out.finish(rows)
        ranks.close()


def _generate_text(task: TextTask, out: Output) -> None:
    """The same for texts, which need no pipeline of diffusers."""
    from hasten.cli.ranks import Ranks

    task.check()
    ranks = Ranks.start(task.device)
    folders = [path.absolute().parent for path in (task.output,) if path is not None]
    with writable(*folders, *report_folder(task.report)):
        here = replace(task, device=ranks.device(task.device))
        mine = here.run(ranks.share(task.prompts), out, quiet=not ranks.first)
        rows = sorted(ranks.gather(mine), key=lambda row: row["index"])
        if ranks.first:
            task.save(rows)
    if ranks.first:
        out.finish(rows)
    ranks.close()


def _generate_masked(task: MaskedTask, out: Output) -> None:
    """The same for masked images."""
    from hasten.cli.ranks import Ranks

    task.check()
    ranks = Ranks.start(task.device)
    with writable(task.places.folder.absolute()):
        mine = replace(task, device=ranks.device(task.device)).run(ranks.share(task.prompts), out)
        rows = sorted(ranks.gather(mine), key=lambda row: row["index"])
    if ranks.first:
        out.finish(rows)
    ranks.close()


@dataclass(frozen=True, slots=True)
class _Task:
    """What is to be done once the pipeline is open."""

    model: str
    recipe: Recipe
    request: Request
    places: Places
    fps: int
    report: Path | None
    metadata: bool
    choice: NoiseChoice | None = None

    def run(self, pipe: Any, out: Output, *, quiet: bool) -> list[dict[str, Any]]:
        """Generate, write, and describe each result in a row."""
        if not self.request.prompts:  # more processes than prompts
            return []
        from hasten.pipelines import generate as service
        from hasten.pipelines.accelerate import accelerate

        planned = service.plan(pipe, self.request)  # what it refuses is refused before anything is put onto the pipeline
        if self.choice is not None:
            self.choice.check(pipe, [prompt.text for prompt in self.request.prompts], planned)
        self.places.check(service.makes_video(pipe))
        rows, shown = [], None
        with (
            accelerate(pipe, self.recipe) as session,
            bar(out, Path(self.model).name, shown=not quiet) as show,
        ):
            call = service.plan(pipe, self.request)  # a student has steps and guidance of its own
            for result in service.generate(pipe, session, self.request, on_progress=show, search=self.choice):
                row = self._write(result, session, call)
                rows.append(row)
                shown = result.run if result.searched else None
                out.say(
                    f"{row['file']}: {row['seconds']:.1f} s, {100 * row['computed_fraction']:.0f} % of the work computed"
                )
                if "search" in row:
                    say_search(out, row["search"], session)
        for note in session.trace.notes:
            out.warn(note)
        if self.report is not None and not quiet:
            report = session.report()
            (report if shown is None else report.of(shown)).save(self.report)
        return rows

    def _write(self, result: Result, session: Session, call: dict[str, Any]) -> dict[str, Any]:
        from hasten.pipelines import media

        several = len(result.frames) > 1
        path = self.places.name(result.prompt.index, result.prompt.seed, several)
        facts = {
            "prompt": result.prompt.text,
            "negative_prompt": self.request.negative_prompt,
            "seed": result.prompt.seed,
            "model": self.model,
            "recipe": self.recipe,
            "steps": call.get("num_inference_steps"),
            "guidance_scale": call.get("guidance_scale"),
            "versions": versions(),
        }
        more: dict[str, Any] = {}
        if self.choice is not None and result.searched is not None:
            more = {"search": searched_row(self.choice, result, session)}
            facts |= {"seed": result.searched.best.seed} if self.choice.how == "random" else {}
            facts["search"] = {key: value for key, value in more["search"].items() if key != "candidates"}
        written = media.save(result.frames, path, fps=self.fps, metadata=facts if self.metadata else None)
        frames, height, width, _ = result.frames.shape
        accounts = [session.report().of(run) for run in result.runs or [result.run]]
        asked, nfe = sum(each.evaluations for each in accounts), math.fsum(each.nfe for each in accounts)
        return {
            "index": result.prompt.index,
            "model": self.model,
            "recipe": self.recipe.name or "custom",
            "prompt": result.prompt.text,
            "seed": result.prompt.seed,
            "file": str(written[0]),
            "seconds": result.seconds,
            "computed_fraction": accounts[0].computed_fraction if len(accounts) == 1 else nfe / max(1, asked),
            "nfe": nfe,
            "bytes_held": accounts[0].bytes_held,
            "frames": frames,
            "height": height,
            "width": width,
        } | more


def report_folder(path: Path | None) -> list[Path]:
    """The folder of `--report`, to be checked before any work; `UsageError` for an unknown kind of report."""
    if path is None:
        return []
    if path.suffix not in (".html", ".json", ".txt"):
        raise UsageError(f"--report {path}: name a .html, .json or .txt file.")
    return [path.absolute().parent]
