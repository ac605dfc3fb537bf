"""The same noise plain and with each recipe: `hasten.compare`, with its runs kept as they come."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hasten.ui.engine.desk import Desk
from hasten.ui.engine.latents import tiled
from hasten.ui.engine.outputs import Making, safe
from hasten.ui.engine.report import Report
from hasten.ui.engine.request import Compare
from hasten.ui.engine.work.generate import call_of, check_pictures, facts, rate

if TYPE_CHECKING:
    from hasten.pipelines.compare import Sample

OTHER_SEED = 7919
"""Added to the seed for the noise floor."""


def compare(ask: Compare, desk: Desk, report: Report) -> dict[str, Any]:
    """Result: {"output", "runs": [{"recipe", "media", "trace", "row", "psnr", "warnings"}], "noise_floor", "repeats", "thumb", "fps"}.

    The first run is the plain one. psnr: of each frame against it, None where identical. noise_floor: PSNR in dB of another seed
    against it, which is what likeness is without any common noise.
    """
    from hasten.pipelines.compare import compare as service
    from hasten.pipelines.generate import plan

    recipes = [desk.recipe(text) for text in ask.recipes]
    with desk.pipeline(ask.model, ask.lora, report, lambda: _where(pipe, report)) as pipe, tiled(pipe, ask.decoding == "tiles"), desk.outputs.making(ask) as out:
        check_pictures(pipe, ask.model)
        call = plan(pipe, call_of(ask), desk.limits)
        runs = _Runs(ask, out, report, call, ["plain", *(recipe.name for recipe in recipes)])
        runs.begin()
        values = {key: value for key, value in call.items() if key != "output_type"}
        rows = service(pipe, recipes, [ask.prompt], [ask.seed], repeats=ask.repeats, limits=desk.limits, on_sample=runs.keep, **values)
        report.phase("Noise floor", runs.steps)
        floor = runs.floor(pipe, call)
        out.facts = {
            "runs": [{**run, "row": {"model": ask.model, **row, **read}} for run, row, read in zip(runs.done, rows, runs.readings(desk), strict=True)],
            "noise_floor": floor, "repeats": ask.repeats, "thumb": out.thumb(runs.samples[0].frames), "fps": rate(len(runs.samples[0].frames)),
        }  # fmt: skip
    return {"output": out.id, **out.facts}


class _Runs:
    """The runs of one comparison, each kept when it is done."""

    def __init__(self, ask: Compare, out: Making, report: Report, call: dict[str, Any], names: list[str]) -> None:
        self.ask, self.out, self.report, self.call, self.names = ask, out, report, call, names
        self.steps = int(call.get("num_inference_steps", 0))
        self.samples: list[Sample] = []
        self.done: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Say which run is next. The first one comes behind two steps of each, which are not timed."""
        number = len(self.samples)
        if number < len(self.names):
            warming = "Warming up, then run" if number == 0 else "Run"
            self.report.phase(f"{warming} {number + 1} of {len(self.names)}: {self.names[number]}", self.steps)
        elif self.ask.repeats > 1:
            self.report.phase(f"Timing again, {self.ask.repeats - 1} x {len(self.names)} runs", self.steps)

    def keep(self, sample: Sample) -> None:
        """Write a run, and show it."""
        self.samples.append(sample)
        name = safe(f"{len(self.samples) - 1}-{sample.recipe}")
        frames = self.out.media(name, sample.frames, fps=rate(len(sample.frames)), about=facts(self.ask, sample.report.recipe, self.call))  # type: ignore[arg-type]
        trace = self.out.json(f"{name}.json", sample.report.to_dict())
        self.done.append({
            "recipe": sample.recipe, "media": frames, "trace": trace, "psnr": self._by_frame(sample), "warnings": sample.report.warnings,
        })  # fmt: skip
        told = {"recipe": sample.recipe, "seconds": sample.seconds, "computed_fraction": sample.report.computed_fraction}
        self.report.data(rows=[*self.report.now.data.get("rows", []), told])
        self.begin()

    def _by_frame(self, sample: Sample) -> list[float | None]:
        from hasten.metrics import psnr

        plain = self.samples[0].frames
        each = [psnr(a[None], b[None]) for a, b in zip(sample.frames, plain, strict=True)] if sample is not self.samples[0] else []
        return [value if math.isfinite(value) else None for value in each]

    def readings(self, desk: Desk) -> list[dict[str, Any]]:
        """What a judge of digits sees in each run; nothing for models that were not made to draw them."""
        if desk.models.card(self.ask.model).where != "bundled":
            return [{} for _ in self.samples]
        from hasten.pipelines.judge import in_words

        return [in_words(sample.frames, self.ask.prompt) for sample in self.samples]

    def floor(self, pipe: Any, call: dict[str, Any]) -> float | None:
        """PSNR of another seed; None where it cannot be told from this one."""
        import torch

        from hasten.metrics import psnr
        from hasten.pipelines.generate import frames_of

        generator = torch.Generator("cpu").manual_seed((self.ask.seed + OTHER_SEED) % 2**63)
        other = frames_of(pipe(prompt=self.ask.prompt, generator=generator, **call))
        value = psnr(other, self.samples[0].frames)
        return value if math.isfinite(value) else None


def _where(pipe: Any, report: Report) -> None:
    """Which step of the present run a denoiser is called for, as its scheduler counts."""
    index, times = getattr(pipe.scheduler, "step_index", None), getattr(pipe.scheduler, "timesteps", None)
    if times is not None:
        report.step(int(index or 0), len(times))
