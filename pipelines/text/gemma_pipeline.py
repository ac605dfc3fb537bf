"""`DiffusionGemmaPipeline`: as `TextDiffusionPipeline`, for the model that starts from noise.

Shapes: B texts, P tokens of the longest prompt, G of the longest text that was written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from hasten.canvas import TextFacts
from hasten.errors import ModelError, UsageError
from hasten.limits import Limits
from hasten.noise import seeds
from hasten.pipelines.host import hardware
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.text import generation_config as configs
from hasten.pipelines.text.arguments import ALIASES, canonical, whole
from hasten.pipelines.text.output import TextOutput
from hasten.pipelines.text.pipeline import TextPipeline
from hasten.pipelines.text.prompts import Prompts, check, collect
from hasten.pipelines.text.session import TextDiffusionSession
from hasten.pipelines.text.stream import streamers
from hasten.pipelines.text_models.gemma import SAID, Denoising, GemmaLoop, Written, takes
from hasten.recipe import Recipe
from hasten.report_diffusion import Generation, TextDiffusionReport

FAMILY = "DiffusionGemma"

NEW_TOKENS = 256
"""Tokens to generate where nothing is said: transformers' default for this model."""


class DiffusionGemmaPipeline(TextPipeline):
    """Generates text with a `DiffusionGemmaForBlockDiffusion`, in evaluation mode.

    recipe: its `commit` says which slots are accepted at an evaluation; None takes those of least entropy, as
    transformers does. denoising: numbers of evaluations and temperatures; None: what the model's generation_config.json
    says, else transformers' defaults. Raises `ModelError` for another model, `RefusedError` for a recipe that has more
    than `commit` and blocks, of which the latter are left out with a note.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, recipe: str | Path | Recipe | None = None, *,
        denoising: Denoising | None = None, limits: Limits | None = None,
    ) -> None:  # fmt: skip
        if not takes(model):
            name = type(model).__name__
            raise ModelError(f"{name} is no DiffusionGemmaForBlockDiffusion. Use TextDiffusionPipeline.")
        self.model, self.tokenizer, self.limits = model, tokenizer, limits or Limits()
        said = configs.fields(model.generation_config)
        self.denoising = denoising or Denoising().told(said)
        self.facts = GemmaLoop(model).facts
        self.recipe: Recipe = self.fitted(Recipe() if recipe is None else find_recipe(recipe))
        self.sessions: list[TextDiffusionSession] = []

    @classmethod
    def of(cls, model: Any, tokenizer: Any, recipe: str | Path | Recipe | None = None, **more: Any) -> Self:
        """The pipeline for a model that is loaded. Raises `UsageError` for arguments that masked models alone have."""
        unknown = sorted(set(more) - {"denoising", "limits", "probe"})
        if unknown:
            raise UsageError(
                f"{', '.join(unknown)} say{'s' if len(unknown) == 1 else ''} nothing to DiffusionGemma, which has no mask token"
                " and blocks of its own. Its pipeline takes recipe, denoising and limits."
            )
        return cls(model, tokenizer, recipe, denoising=more.get("denoising"), limits=more.get("limits"))

    def fitted(self, recipe: Recipe) -> Recipe:
        GemmaLoop(self.model, recipe)
        return recipe

    def nothing(self, recipe: Recipe) -> TextDiffusionReport:
        return TextDiffusionReport([], recipe, type(self.model).__name__, FAMILY, "encoder")

    def generate(
        self, input_ids: Any = None, attention_mask: Any = None, *, prompts: str | Sequence[str] | None = None,
        messages: Any = None, max_new_tokens: int | None = None, recipe: str | Path | Recipe | None = None,
        steps: int | None = None, eos_token_id: Any = None, pad_token_id: int | None = None, generator: Any = None,
        streamer: Any = None, return_dict_in_generate: bool | None = None, generation_config: Any = None, **others: Any,
    ) -> TextOutput:  # fmt: skip
        """Generate a text behind each prompt; a `TextOutput`, or its `sequences` with return_dict_in_generate=False.

        Texts of a batch do not know of each other. Arguments as `TextDiffusionPipeline.generate`; steps (or
        max_denoising_steps): evaluations of a canvas at most; max_new_tokens: 256 by default. A streamer gets tokens
        when their canvas is over, and each evaluation's most probable ones in `put_draft` if it has that.
        generation_config: as there, with the fields of `DiffusionGemmaGenerationConfig` besides. Raises `UsageError` or
        `LimitError` before anything is computed.
        """
        own = {name: value for name, value in locals().items() if name not in ("self", "others", "generation_config")}
        for name in others:
            if ALIASES.get(name, name) not in own:
                raise UsageError(
                    f"{name} says nothing to DiffusionGemma. Acceptance is the recipe's `commit`, temperatures and the"
                    f" end of a canvas are in `Denoising`; generate takes {', '.join(own)}."
                )
        given = canonical(others, own)
        how, further = self._told(generation_config, own, given)
        given = configs.layered(given, further)
        new, steps = given.get("max_new_tokens", NEW_TOKENS), given.get("steps")
        whole("max_new_tokens", new, 1, self.allowed.max_tokens)
        whole("steps", steps, 1, self.allowed.max_steps)
        facts = self._facts(given)
        asked = collect(
            given.get("input_ids"), given.get("attention_mask"), given.get("prompts"), given.get("messages"), self.tokenizer, facts
        )
        each = [new] * len(asked.ids)
        check(asked, each, facts, self.allowed)
        loop = GemmaLoop(self.model, self.chosen(given.get("recipe")), how if steps is None else replace(how, steps=steps))
        loop.facts, loop.eos, loop.pad = facts, facts.eos_ids, facts.pad_id
        reader = _Reader(streamers(given.get("streamer"), len(asked.ids)), asked, each, loop)
        began = time.perf_counter()
        found = loop.run(asked.ids, each, seeds(given.get("generator"), len(asked.ids)), reader)
        output = self._output(found, asked, loop, time.perf_counter() - began)
        self.noted(output.report, given.get("recipe"))
        return output if given.get("return_dict_in_generate", True) else output.sequences  # type: ignore[return-value]

    __call__ = generate

    def _told(self, config: Any, own: dict[str, Any], given: dict[str, Any]) -> tuple[Denoising, dict[str, Any]]:
        """How canvases are denoised, and further arguments, by a `generation_config=`; arguments that are given win."""
        said = configs.fields(config)
        mine = {name: said.pop(name) for name in SAID if name in said and name != "max_denoising_steps"}
        if "sampler_config" in mine and self.chosen(given.get("recipe")).commit is not None:
            if "recipe" not in given:
                raise UsageError(
                    "generation_config has a sampler_config, and the recipe a commit rule: both say which slots are accepted."
                    " Leave one of them out."
                )
            del mine["sampler_config"]
        return self.denoising.told(mine), configs.settings(said, own)

    def _facts(self, given: dict[str, Any]) -> TextFacts:
        """What the loop must know of the model, with the call's end and padding tokens."""
        vocab, eos, pad = self.facts.vocab, given.get("eos_token_id"), given.get("pad_token_id")
        ends = self.facts.eos_ids if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        for token in ends:
            whole("eos_token_id", token, 0, vocab - 1)
        whole("pad_token_id", pad, 0, vocab - 1)
        return replace(self.facts, eos_ids=ends, pad_id=self.facts.pad_id if pad is None else pad)

    def _output(self, found: Written, asked: Prompts, loop: GemmaLoop, seconds: float) -> TextOutput:
        written = [text[len(ids) :] for text, ids in zip(found.texts, asked.ids, strict=True)]
        longest = max(len(text) for text in written)
        sequences = torch.full((len(written), asked.width + longest), loop.pad, device=self.model.device)
        commits = torch.full((len(written), longest), -1)
        for row, (ids, text) in enumerate(zip(asked.ids, written, strict=True)):
            sequences[row, asked.width - len(ids) : asked.width + len(text)] = found.texts[row]
            canvas = torch.arange(len(text), device=found.canvases.device) // loop.length
            commits[row, : len(text)] = (found.canvases[row][canvas] - 1).cpu()
        lengths, nfe = torch.tensor([len(text) for text in written]), found.evaluations.cpu()
        cost = self._cost(found, asked, lengths.tolist(), loop, seconds)
        words = None
        if self.tokenizer is not None:
            words = [self.tokenizer.decode(text.tolist(), skip_special_tokens=True) for text in written]
        report = TextDiffusionReport(
            [cost], loop.recipe, type(self.model).__name__, FAMILY, "encoder", True, 0, list(loop.notes),
            hardware(str(self.model.device)),
        )  # fmt: skip
        return TextOutput(
            sequences, words, lengths, nfe, lengths / nfe.clamp(min=1), commits,
            torch.tensor(cost.computed, dtype=torch.float64), False, (), report,
        )  # fmt: skip

    def _cost(self, found: Written, asked: Prompts, written: list[int], loop: GemmaLoop, seconds: float) -> Generation:
        """Tokens times layers: the decoder's canvases, and the encoder's prompts and canvases but the last."""
        layers, size = self.facts.layers, loop.length
        computed, anew, sequential = [], [], []
        for row, counts in enumerate(found.canvases.tolist()):
            own = [after - before for before, after in zip([0, *counts], counts, strict=False)]
            prompt, used = asked.lengths[row], sum(count > 0 for count in own)
            computed.append(float(layers * (sum(own) * size + prompt + size * max(0, used - 1))))
            anew.append(float(layers * sum(count * (prompt + (n + 1) * size) for n, count in enumerate(own))))
            sequential.append(float(layers * written[row] * (prompt + used * size)))
        evaluations = tuple(found.evaluations.tolist())
        return Generation(
            max(evaluations), tuple(asked.lengths), tuple(written), evaluations, tuple(computed), tuple(anew),
            tuple(sequential), seconds,
        )  # fmt: skip


class _Reader:
    """Hands canvases on to streamers, one for each text, or none."""

    def __init__(self, given: list[Any], prompts: Prompts, new: Sequence[int], loop: GemmaLoop) -> None:
        self.streamers, self.size, self.ends = given, loop.length, set(loop.eos)
        self.left = list(new)
        for streamer, ids in zip(given, prompts.ids, strict=False):
            streamer.put(ids[None])

    def __call__(self, number: int, likely: Tensor, over: Tensor, last: bool) -> None:
        if not self.streamers:
            return
        for row, (streamer, tokens) in enumerate(zip(self.streamers, likely.cpu(), strict=True)):
            if self.left[row] <= 0:
                continue
            if not last:
                if hasattr(streamer, "put_draft"):
                    streamer.put_draft(value=tokens[None, : self.left[row]])
                continue
            ends = [place + 1 for place, token in enumerate(tokens.tolist()) if token in self.ends]
            end = ends[0] if ends else len(tokens) + 1
            streamer.put(tokens[: min(end, self.left[row], len(tokens))])
            self.left[row] = 0 if end <= len(tokens) else self.left[row] - len(tokens)
            if self.left[row] <= 0:
                streamer.end()
