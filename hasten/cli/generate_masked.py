"""`hasten generate` for masked image models: classes in, PNG files out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from hasten.cli.output import Output, versions
from hasten.cli.places import Places
from hasten.errors import UsageError, nearest

if TYPE_CHECKING:
    from hasten.pipelines.generate import Prompt
    from hasten.pipelines.masked_images import MaskedImageOutput, MaskedImagePipeline
    from hasten.recipe import Recipe

TOGETHER = 8
"""Images in one batch. What an image becomes does not depend on it."""


@dataclass(frozen=True, slots=True)
class MaskedTask:
    """What is to be drawn. recipe: a name, a file or None for `maskgit`. changes: dotted keys of it. unfit: options that
    have no meaning here, by name."""

    what: ClassVar[str] = "a masked image model"
    arguments: ClassVar[tuple[str, ...]] = ("guidance_scale", "temperature")
    """Of the pipeline, that `--call` can set."""

    model: str
    recipe: str | None
    changes: Mapping[str, Any]
    prompts: tuple[Prompt, ...]
    call: Mapping[str, Any]
    places: Places
    metadata: bool = True
    device: str | None = None
    dtype: str | None = None
    unfit: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `UsageError` for options that have no meaning for these images, before anything is loaded."""
        for name, value in self.unfit.items():
            if value is not None:
                raise UsageError(self._unfit(name, value))
        for key in self.call:
            if key not in self.arguments:
                raise UsageError(
                    f"--call {key}: {self.model}, {self.what}, has {', '.join(self.arguments)}.{nearest(key, self.arguments)}"
                )
        self.places.check(video=False)

    def _unfit(self, name: str, value: Any) -> str:
        """A sentence about an option without meaning."""
        if name == "steps":
            return f"--steps {value}: steps of masked images are the recipe's: --recipe maskgit:steps={value}"
        return f"--{name} has no meaning for {self.model}, {self.what}. Leave it out."

    def run(self, prompts: Iterable[Prompt], out: Output) -> list[dict[str, Any]]:
        """Draw these prompts' images, write them, and describe each in a row."""
        mine = list(prompts)
        if not mine:  # more processes than prompts
            return []
        from hasten.pipelines.loading import pick_device, pick_dtype, silence
        from hasten.pipelines.masked_images import MaskedImagePipeline
        from hasten.pipelines.recipes import recipe as find
        from hasten.pipelines.tiny_models import call_defaults

        recipe = find(self.recipe or "maskgit").replace(dict(self.changes))
        place = pick_device(self.device)
        silence()
        pipe = MaskedImagePipeline.from_pretrained(self.model, device=place, dtype=pick_dtype(self.dtype, place))
        classes = [pipe.words.class_of(prompt.text) for prompt in mine]
        call, rows = call_defaults(pipe) | dict(self.call), []
        for first in range(0, len(mine), TOGETHER):
            part = slice(first, first + TOGETHER)
            for row in self._draw(pipe, recipe, call, mine[part], classes[part]):
                rows.append(row)
                out.say(f"{row['file']}: {row['seconds']:.1f} s, {100 * row['computed_fraction']:.0f} % of the work computed")
        return rows

    def _draw(
        self, pipe: MaskedImagePipeline, recipe: Recipe, call: dict[str, Any], prompts: list[Prompt], classes: list[int]
    ) -> list[dict[str, Any]]:
        import time

        import torch

        generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
        began = time.perf_counter()
        made = pipe(classes, recipe=recipe, generator=generators, output_type="np", **call)
        seconds = (time.perf_counter() - began) / len(prompts)
        return [self._row(pipe, recipe, call, made, number, prompt, seconds) for number, prompt in enumerate(prompts)]

    def _row(
        self, pipe: MaskedImagePipeline, recipe: Recipe, call: dict[str, Any], made: MaskedImageOutput, number: int,
        prompt: Prompt, seconds: float,
    ) -> dict[str, Any]:  # fmt: skip
        from hasten.pipelines import media

        facts = {
            "prompt": prompt.text, "seed": prompt.seed, "model": self.model, "recipe": recipe,
            "guidance_scale": call.get("guidance_scale"), "versions": versions(),
        }  # fmt: skip
        path = self.places.name(prompt.index, prompt.seed, False)
        image = made.images[number][None]
        written = media.save(image, path, metadata=facts if self.metadata else None)
        evaluations = int(made.tally.evaluations[number])
        branches = 1 if call.get("guidance_scale", 1.0) == 1 else 2
        whole = evaluations * (pipe.codebook.slots + 1)
        return {
            "index": prompt.index,
            "model": self.model,
            "recipe": recipe.name or "custom",
            "prompt": prompt.text,
            "seed": prompt.seed,
            "file": str(written[0]),
            "seconds": seconds,
            "computed_fraction": int(made.tally.tokens[number]) / whole,
            "nfe": branches * evaluations,
            "token_forwards": branches * int(made.tally.tokens[number]),
            "height": image.shape[1],
            "width": image.shape[2],
        }
