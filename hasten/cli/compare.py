"""`hasten compare`: plain against recipes, on the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.options import Call, Device, Dtype, Fps, Lora, ModelArgument, Offload, Revision
from hasten.cli.output import JsonOption, Output
from hasten.cli.places import writable
from hasten.cli.values import assignments
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.pipelines.compare import Sample


def compare(
    model: ModelArgument,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What to generate; may be repeated.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One prompt a line, or JSON lines.")
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|FILE", help="May be repeated. Default: balanced and fast."),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(metavar="N", help="May be repeated. Default: 0.")] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Solver steps. Default: the model's.")
    ] = None,
    height: Annotated[int | None, typer.Option(metavar="N", help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(metavar="N", help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(metavar="N", help="Frames of a video.")] = None,
    guidance: Annotated[float | None, typer.Option(metavar="X", help="Guidance scale.")] = None,
    call: Call = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where videos and report.html go.")] = Path(
        "hasten-compare"
    ),
    fps: Fps = 16,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = "none",
    lora: Lora = None,
    revision: Revision = None,
    json: JsonOption = None,
) -> None:
    """Run a model plain and with recipes: speed, similarity, what was skipped, and the videos side by side."""
    output = Output("compare", json)
    with output.open():
        from hasten.cli.prompts import collect
        from hasten.pipelines.generate import arguments_of
        from hasten.pipelines.loading import check_name, open_pipeline
        from hasten.pipelines.recipes import recipe as find_recipe

        wanted = collect(prompt or [], prompts, 0)
        if any(item.seed for item in wanted):
            raise UsageError("compare takes its seeds from --seed; leave them out of the prompts file.")
        chosen = [find_recipe(which) for which in recipe or ["balanced", "fast"]]
        check_name(model)
        own = {"steps": steps, "height": height, "width": width, "frames": frames, "guidance": guidance}
        further = assignments(call or [], "--call")
        with writable(out.absolute()):
            pipe = open_pipeline(
                model, revision=revision, device=device, dtype=dtype, offload=offload, lora=lora, quiet=True
            )
            run = Comparison(output, pipe, model, out, fps)
            rows = run.run(
                chosen, [item.text for item in wanted], seed or [0], **arguments_of(pipe, own), **further
            )
            output.table(rows)
            run.close(rows)
        output.finish(rows)


class Comparison:
    """A comparison whose runs are written to a folder as they come."""

    def __init__(self, output: Output, pipe: Any, model: str, folder: Path, fps: float) -> None:
        self.output, self.pipe, self.model, self.folder, self.fps = output, pipe, model, folder, fps
        self.paths: list[Path] = []
        self.first: list[Sample] = []
        self._several = False
        self._total = self._done = 0

    def run(
        self, recipes: list[Any], prompts: list[str], seeds: list[int], **call: Any
    ) -> list[dict[str, Any]]:
        """Compare, write each run, and give the rows."""
        from hasten.pipelines.compare import compare as service

        self._several = len(prompts) * len(seeds) > 1
        self._total = len(prompts) * len(seeds) * (len(recipes) + 1)
        rows = service(self.pipe, recipes, prompts, seeds, on_sample=self._keep, **call)
        return [{"model": self.model, **row} for row in rows]

    def _keep(self, sample: Sample) -> None:
        from hasten.cli.sheet import write_sample

        self._done += 1
        self.output.note(f"{self._done} of {self._total}: {sample.recipe}, {sample.seconds:.1f} s")
        path = write_sample(sample, self.folder, fps=self.fps, several=self._several)
        if sample.prompt.index == 0:
            self.first.append(sample)
            self.paths.append(path)

    def close(self, rows: list[dict[str, Any]]) -> None:
        """Write the side-by-side picture and the pages, about the first prompt, and say where everything is."""
        from hasten.cli.sheet import write_report, write_together

        together = write_together(self.first, self.folder, fps=self.fps)
        pages = write_report(self.first, self.paths, rows, self.folder, self.model, fps=self.fps)
        for sentence in dict.fromkeys(note for sample in self.first for note in sample.report.warnings):
            self.output.warn(sentence)
        self.output.say(f"\nSide by side: {together}\nReport:       {', '.join(map(str, pages))}")
