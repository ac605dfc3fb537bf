"""`hasten generate` for masked language models: prompts in, texts out."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.atomic import atomic_write
from hasten.cli.output import Output
from hasten.errors import UsageError, nearest

if TYPE_CHECKING:
    from hasten.pipelines.generate import Prompt
    from hasten.pipelines.text.output import TextOutput
    from hasten.pipelines.text.pipeline import TextPipeline
    from hasten.pipelines.text.session import TextDiffusionSession

TOGETHER = 8
"""Texts in one batch. What a text becomes does not depend on it."""

RESERVED = (
    "prompts", "prompt", "messages", "input_ids", "inputs", "attention_mask", "generator", "recipe", "streamer",
    "stopping_criteria", "output_type", "return_dict_in_generate",
)  # fmt: skip
"""Arguments of `generate` that the command sets itself, or that no text can spell."""


@dataclass(frozen=True, slots=True)
class TextTask:
    """What is to be written. recipe: a name, a file or None for one token per evaluation. changes: dotted keys of it.
    output: a .txt or .jsonl file, None for standard output. call: further arguments of `generate`."""

    model: str
    recipe: str | None
    changes: Mapping[str, Any]
    prompts: tuple[Prompt, ...]
    call: Mapping[str, Any]
    output: Path | None = None
    report: Path | None = None
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    unfit: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `UsageError` for options that have no meaning for texts, before anything is loaded."""
        for name, value in self.unfit.items():
            if value is not None:
                raise UsageError(f"--{name} is for images and videos, and {self.model} writes texts. Leave it out.")
        self._check_call()
        if self.output is not None and self.output.suffix not in (".txt", ".jsonl"):
            raise UsageError(f"--output {self.output}: texts go to a .txt or .jsonl file, or without --output to the terminal.")
        if self.output is not None and self.output.suffix == ".txt" and len(self.prompts) > 1:
            raise UsageError(f"--output {self.output}: several texts go to a .jsonl file, one a line.")

    def _check_call(self) -> None:
        from hasten.pipelines.text.arguments import ALIASES
        from hasten.pipelines.text.diffusion import TextDiffusionPipeline

        known = {*inspect.signature(TextDiffusionPipeline.generate).parameters, *ALIASES} - {"self", "others", *RESERVED}
        for key in self.call:
            if key in RESERVED or key.startswith("callback"):
                raise UsageError(f"--call cannot set {key!r}; the command sets it itself.")
            if key not in known:
                raise UsageError(f"--call {key}: texts have no such argument.{nearest(key, known)}")

    def open(self) -> TextPipeline:
        """The pipeline, with the recipe on it."""
        from hasten.pipelines.loading import silence
        from hasten.pipelines.recipes import recipe as find
        from hasten.pipelines.text.diffusion import TextDiffusionPipeline
        from hasten.pipelines.text.job import acts_on_texts

        found = find(self.recipe).replace(dict(self.changes)) if self.recipe is not None else None
        if found is None and self.changes:
            raise UsageError("--set changes a recipe, and there is none. Name it with --recipe.")
        if found is not None:
            acts_on_texts(found)
        silence()
        return TextDiffusionPipeline.from_pretrained(
            self.model, found, device=self.device, dtype=self.dtype, revision=self.revision
        )

    def run(self, prompts: Iterable[Prompt], out: Output, *, quiet: bool) -> list[dict[str, Any]]:
        """Write these prompts' texts, and describe each in a row."""
        from hasten.pipelines.accelerate import accelerate

        mine = list(prompts)
        if not mine:  # more processes than prompts
            return []
        pipe, rows = self.open(), []
        with accelerate(pipe, pipe.recipe) as session:
            for first in range(0, len(mine), TOGETHER):
                rows += self._write(pipe, mine[first : first + TOGETHER], session)
                for row in rows[first:]:
                    out.say(row["text"] if len(mine) == 1 else f"--- {row['prompt']}\n{row['text']}")
        if not quiet:
            self._tell(session, out)
        return rows

    def _write(self, pipe: TextPipeline, prompts: list[Prompt], session: TextDiffusionSession) -> list[dict[str, Any]]:
        import torch

        generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
        given = pipe.generate(prompts=[prompt.text for prompt in prompts], generator=generators, **self.call)
        return [self._row(given, number, prompt) for number, prompt in enumerate(prompts)]

    def _row(self, given: TextOutput, number: int, prompt: Prompt) -> dict[str, Any]:
        report = given.report
        cost = report.generations[0]
        anew, sequential = cost.anew[number], cost.sequential[number]
        return {
            "index": prompt.index,
            "model": self.model,
            "recipe": self.recipe or "sequential",
            "prompt": prompt.text,
            "seed": prompt.seed,
            "text": given.texts[number] if given.texts is not None else None,
            "tokens": int(given.lengths[number]),
            "nfe": int(given.nfe[number]),
            "tokens_per_forward": float(given.tokens_per_forward[number]),
            "token_layers": float(given.token_layers[number]),
            "computed_fraction": cost.computed[number] / anew if anew else 1.0,
            "of_sequential": cost.computed[number] / sequential if sequential else 1.0,
            "seconds": cost.seconds / len(cost.written),
            "bytes_held": report.bytes_held,
        }

    def _tell(self, session: TextDiffusionSession, out: Output) -> None:
        found = session.report()
        out.note(
            f"{found.written:,} tokens in {found.evaluations:,} evaluations ({found.tokens_per_forward:.2f} each),"
            f" {found.of_sequential:.0%} of the work of one token per evaluation"
        )
        if self.recipe is None and found.cache == "recompute":
            out.note("Without a recipe nothing is saved: see hasten recipes, for example --recipe text-balanced.")
        for warning in found.warnings:
            out.warn(warning)
        if self.report is not None:
            found.save(self.report)

    def save(self, rows: list[dict[str, Any]]) -> None:
        """Put the texts into the output file, whole or not at all."""
        if self.output is None:
            return
        if self.output.suffix == ".txt":
            atomic_write(self.output, rows[0]["text"] + "\n")
        else:
            atomic_write(self.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
