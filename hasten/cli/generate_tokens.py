"""`hasten generate` for images that a causal model writes row by row: classes in, PNG files out."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hasten.cli.generate_masked import MaskedTask
from hasten.cli.output import Output, versions
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.pipelines.decode_own.token_images import TokenImagePipeline
    from hasten.pipelines.generate import Prompt
    from hasten.recipe import Recipe


@dataclass(frozen=True, slots=True)
class TokensTask(MaskedTask):
    """What is to be drawn. recipe: one that drafts, by name or as a file; None writes token by token."""

    what: ClassVar[str] = "a language model of image tokens"
    arguments: ClassVar[tuple[str, ...]] = ("temperature", "top_k")

    def check(self) -> None:
        """As above; and for `--set` without a recipe."""
        MaskedTask.check(self)
        if self.changes and self.recipe is None:
            raise UsageError(
                f"--set {next(iter(self.changes))}: without a recipe {self.model} writes token by token, and there is nothing to change."
                " Name one, for example --recipe speculative-jacobi:row=8."
            )

    def _unfit(self, name: str, value: Any) -> str:
        return f"--{name} has no meaning for {self.model}, {self.what}. Leave it out."

    def run(self, prompts: Iterable[Prompt], out: Output) -> list[dict[str, Any]]:
        """Draw these prompts' images one by one, write them, and describe each in a row."""
        mine = list(prompts)
        if not mine:  # more processes than prompts
            return []
        from hasten.pipelines.decode_own.token_images import TokenImagePipeline
        from hasten.pipelines.loading import pick_device, pick_dtype, silence
        from hasten.pipelines.recipes import recipe as find
        from hasten.pipelines.tiny_models import call_defaults

        recipe = None if self.recipe is None else find(self.recipe).replace(dict(self.changes))
        place = pick_device(self.device)
        silence()
        pipe = TokenImagePipeline.from_pretrained(self.model, device=place, dtype=pick_dtype(self.dtype, place))
        classes = [pipe.words.class_of(prompt.text) for prompt in mine]
        call, rows = call_defaults(pipe) | dict(self.call), []
        for prompt, number in zip(mine, classes, strict=True):
            row = self._one(pipe, recipe, call, prompt, number)
            rows.append(row)
            out.say(f"{row['file']}: {row['seconds']:.1f} s, {row['tokens_per_forward']:.2f} tokens per forward")
        return rows

    def _one(
        self, pipe: TokenImagePipeline, recipe: Recipe | None, call: dict[str, Any], prompt: Prompt, number: int
    ) -> dict[str, Any]:
        from hasten.pipelines import media

        began = time.perf_counter()
        made = pipe(number, recipe=recipe, seed=prompt.seed, output_type="np", **call)
        seconds = time.perf_counter() - began
        facts = {"prompt": prompt.text, "seed": prompt.seed, "model": self.model, "recipe": recipe, "versions": versions()}
        path = self.places.name(prompt.index, prompt.seed, False)
        written = media.save(made.images, path, metadata=facts if self.metadata else None)
        slots = pipe.codebook.slots
        return {
            "index": prompt.index,
            "model": self.model,
            "recipe": "plain" if recipe is None else recipe.name or "custom",
            "prompt": prompt.text,
            "seed": prompt.seed,
            "file": str(written[0]),
            "seconds": seconds,
            "computed_fraction": made.forwards / slots,
            "nfe": made.forwards,
            "tokens_per_forward": slots / made.forwards,
            "height": made.images.shape[1],
            "width": made.images.shape[2],
        }
