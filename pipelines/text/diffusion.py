"""`TextDiffusionPipeline`: a masked language model, a tokenizer and a recipe; texts come out.

    pipe = hasten.load("tiny-dllm")
    print(pipe.generate(prompts="def add(a, b):", max_new_tokens=64, threshold=0.9).texts[0])
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch

from hasten.errors import UsageError
from hasten.limits import Limits
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.text import generation_config as configs
from hasten.pipelines.text.arguments import PLAIN, canonical, decoding, whole
from hasten.pipelines.text.callback import on_step_end
from hasten.pipelines.text.job import Job, fitting
from hasten.pipelines.text.loop import OnStep
from hasten.pipelines.text.output import TextOutput
from hasten.pipelines.text.pipeline import TextPipeline
from hasten.pipelines.text.prompts import check, collect
from hasten.pipelines.text.session import TextDiffusionSession
from hasten.pipelines.text.stream import criteria, streamers
from hasten.pipelines.text_models import families
from hasten.pipelines.text_models.guide import Guide
from hasten.pipelines.text_models.host import TextHost
from hasten.pipelines.text_models.probe import probe as ask
from hasten.pipelines.tune.fingerprint import of_text
from hasten.recipe import Recipe
from hasten.report_diffusion import TextDiffusionReport

NEW_TOKENS = 128
"""Tokens to generate where nothing is said, if the model has positions for them: LLaDA's default."""


class TextDiffusionPipeline(TextPipeline):
    """Generates text with a masked language model.

    model: any of the families that hasten knows (LLaDA, LLaDA-MoE, LLaDA2, Dream, SDAR, Fast-dLLM v2, MDLM, BD3-LM, and
    Llama and Qwen classes whose config says so), in evaluation mode; it stays as it is. tokenizer: for prompts, messages
    and texts; tokens alone need none. recipe: a name, a `Recipe` or the path of a YAML file; None writes the surest
    token per evaluation and computes everything anew, which is what recipes are compared with.

    guide: a small causal model with the same tokenizer, for recipes that ask one; guide_tokenizer: its tokenizer, to
    check that. limits: what a call may ask for. mask_token_id, block, shifted: what the model's config does not say.
    probe: ask the model with a few small evaluations whether it is what it is taken for; what it is not is in `notes`.

    Raises `ModelError` for a model that is not known or has no mask token, `RefusedError` for one that is not what it
    says, `UsageError` for a recipe that does not act on texts.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, recipe: str | Path | Recipe | None = None, *, guide: Any = None,
        guide_tokenizer: Any = None, limits: Limits | None = None, mask_token_id: int | None = None,
        block: int | None = None, shifted: bool | None = None, probe: bool = True,
    ) -> None:  # fmt: skip
        family = families.choose(model, tokenizer, mask_token_id=mask_token_id, block=block, shifted=shifted)
        found = ask(family, tokenizer) if probe else None
        self.model, self.tokenizer = model, tokenizer
        self.host: TextHost = family if found is None else found.host
        self.notes = found.sentences if found is not None else []
        self.limits = limits or Limits()
        self.recipe: Recipe = fitting(PLAIN if recipe is None else find_recipe(recipe), self.host, tokenizer)
        self.guide = Guide(guide, family.facts, guide_tokenizer, tokenizer) if guide is not None else None
        self.interrupt = False
        self._known: dict[str, Any] = {}
        self.sessions: list[TextDiffusionSession] = []

    @classmethod
    def of(cls, model: Any, tokenizer: Any, recipe: str | Path | Recipe | None = None, **more: Any) -> TextPipeline:
        """The pipeline for a model that is loaded: a `DiffusionGemmaPipeline` for a DiffusionGemma."""
        if not families.starts_from_noise(model):
            return cls(model, tokenizer, recipe, **more)
        # Here, because the oldest transformers that we take do not have this model yet.
        from hasten.pipelines.text.gemma_pipeline import DiffusionGemmaPipeline

        return DiffusionGemmaPipeline.of(model, tokenizer, recipe, **more)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.host.device

    def to(self, device: str | torch.device) -> Self:
        """Move the model, and the guide."""
        self.model.to(device)
        if self.guide is not None:
            self.guide.model.to(device)
        return self

    def generate(
        self, input_ids: Any = None, attention_mask: Any = None, *, prompts: str | Sequence[str] | None = None,
        messages: Any = None, max_new_tokens: int | Sequence[int] | None = None, recipe: str | Path | Recipe | None = None,
        steps: int | None = None, block_length: int | None = None, threshold: float | None = None,
        editing_threshold: float | None = None, remasking: str | None = None, alg_temp: float | None = None,
        temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
        do_sample: bool | None = None, cfg_scale: float | None = None, eos_penalty: float | None = None,
        min_new_tokens: int | None = None, mask_token_id: int | None = None, eos_token_id: Any = None,
        pad_token_id: int | None = None, generator: Any = None, streamer: Any = None, stopping_criteria: Any = None,
        callback_on_step_end: Any = None, callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        output_type: str | None = None, output_history: bool | None = None, return_dict_in_generate: bool | None = None,
        generation_config: Any = None, **others: Any,
    ) -> TextOutput:  # fmt: skip
        """Generate a text behind each prompt; a `TextOutput`, or its `sequences` with return_dict_in_generate=False.

        Texts of a batch do not know of each other: each gets what it would get alone.

        input_ids, attention_mask: int64 [B, P] padded on either side with a mask, or lists of any lengths; or prompts: one
        text or several; or messages: one conversation or several, in the tokenizer's chat template. max_new_tokens: for
        all, or for each; by default 128, or what the model's context leaves.

        recipe: for this call. The next change the parts of the recipe, and are refused where it has no such part: steps:
        evaluations for a text. block_length. threshold: confidence from which slots are written, 0 to 1; with steps, at
        least so many. editing_threshold: confidence from which written tokens are replaced; 0 never. remasking:
        low_confidence, random, or Dream's alg: topk_margin, entropy, ...; alg_temp: noise in that order.

        temperature: of tokens, 0 takes the best; top_k, top_p, do_sample as in transformers. generator: one, or one for
        each text. cfg_scale: w of LLaDA's guidance by hiding the prompt, 0 is none. eos_penalty: nats taken off end
        tokens; min_new_tokens: before which there is none. mask_token_id, eos_token_id, pad_token_id: in place of the
        model's.

        streamer: transformers' protocol, for one text, or a list with one for each: gets tokens when they are final, and
        every canvas in `put_draft` if it has that. stopping_criteria: called for each text alone, ids [1, n], at every
        token. callback_on_step_end(pipe, step, timestep, tensors): which tensors, see `callback.TENSORS`.
        output_type: "text", or "seq" for tokens alone. output_history: keep every canvas.

        generation_config: a transformers.GenerationConfig or a dictionary; its fields stand for arguments that are not given.
        What the model's own generation_config.json says of drawing tokens counts last.

        The papers' and libraries' other names are understood, too (`arguments.ALIASES`: gen_length, block_size,
        num_inference_steps, confidence_threshold, alg, ...). Raises `UsageError` or `LimitError` before anything is
        computed, and nothing is ignored in silence.
        """
        own = {name: value for name, value in locals().items() if name not in ("self", "others", "generation_config")}
        given = configs.layered(canonical(others, own), configs.settings(generation_config, own))
        given, drawn = self._as_the_model_says(given)
        output = self._job(given, drawn).run()
        self.noted(output.report, given.get("recipe"))
        return output if given.get("return_dict_in_generate", True) else output.sequences  # type: ignore[return-value]

    __call__ = generate

    # --- what a call comes to ---------------------------------------------------------------------

    def _as_the_model_says(self, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The arguments, with what the model's generation_config.json says of drawing tokens; and a sentence if it does."""
        both = configs.layered(given, configs.of_model(self.model))
        used = {name: value for name, value in both.items() if name not in given}
        return both, [configs.sentence(used)] if used else []

    def _job(self, given: dict[str, Any], notes: Sequence[str] = ()) -> Job:
        """The call's arguments, under our names, checked and put together. notes: for the report."""
        limits, host = self.allowed, self._host(given)
        facts, numbers = host.facts, decoding(given)
        numbers.check(facts, limits)
        prompts = collect(
            given.get("input_ids"), given.get("attention_mask"), given.get("prompts"), given.get("messages"), self.tokenizer, facts
        )
        usual = [max(1, min(NEW_TOKENS, facts.context - length)) for length in prompts.lengths]
        new = _lengths(given.get("max_new_tokens", usual), len(prompts.ids), limits)
        check(prompts, new, facts, limits)
        chosen = self.chosen(given.get("recipe"), max(new))
        recipe = numbers.applied(chosen, facts)
        if self.guide is not None:
            self.guide.check(max(map(sum, zip(prompts.lengths, new, strict=True))))
        return Job(
            host, self.tokenizer, prompts, new, fitting(recipe, host, self.tokenizer), numbers, limits,
            generator=given.get("generator"), guide=self.guide if _asks_guide(recipe) else None,
            streamers=streamers(given.get("streamer"), len(prompts.ids)), criteria=criteria(given.get("stopping_criteria")),
            on_step=self._on_step(given), history=bool(given.get("output_history")),
            words=_wants_words(given.get("output_type")), notes=[*self.notes, *notes, *self._elsewhere(chosen, max(new))],
        )  # fmt: skip

    def _elsewhere(self, recipe: Recipe, length: int) -> list[str]:
        """A sentence where a tuned recipe was measured on something else. length: of the longest text."""
        if recipe.tuned is None:
            return []
        self._known = self._known or of_text(self.model, self.tokenizer)
        said = recipe.tuned.remark(recipe.name, self._known | {"length": length})
        return [said] if said else []

    def fitted(self, recipe: Recipe) -> Recipe:
        return fitting(recipe, self.host, self.tokenizer)

    def nothing(self, recipe: Recipe) -> TextDiffusionReport:
        return TextDiffusionReport([], recipe, type(self.model).__name__, self.host.family, notes=list(self.notes))

    def _host(self, given: dict[str, Any]) -> TextHost:
        """The model as this call describes it."""
        facts = self.host.facts
        for name in ("mask_token_id", "pad_token_id"):
            whole(name, given.get(name), 0, facts.vocab - 1)
        mask, pad, eos = given.get("mask_token_id"), given.get("pad_token_id"), given.get("eos_token_id")
        ends = None if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        for token in ends or ():
            whole("eos_token_id", token, 0, facts.vocab - 1)
        if mask is None and pad is None and ends is None:
            return self.host
        host = copy.copy(self.host)
        host.facts = replace(
            facts, mask_id=facts.mask_id if mask is None else mask, pad_id=facts.pad_id if pad is None else pad,
            eos_ids=facts.eos_ids if ends is None else ends,
            forbidden=facts.forbidden if mask is None else tuple(sorted({*facts.forbidden, mask} - {facts.mask_id})),
        )  # fmt: skip
        return host

    def _on_step(self, given: dict[str, Any]) -> OnStep:
        self.interrupt = False
        callback = on_step_end(self, given.get("callback_on_step_end"), given.get("callback_on_step_end_tensor_inputs"))

        def after(*step: Any) -> bool:
            if callback is not None:
                callback(*step)
            return self.interrupt

        return after


def _lengths(given: Any, texts: int, limits: Limits) -> list[int]:
    """Tokens to generate for each text."""
    if not isinstance(given, int | Sequence) or isinstance(given, str):
        raise UsageError(f"max_new_tokens is a whole number, or one for each text, got {given!r}.")
    each = [given] * texts if isinstance(given, int) else list(given)
    if len(each) != texts:
        raise UsageError(f"There are {texts} texts and {len(each)} numbers in max_new_tokens. Pass one number, or one for each.")
    for value in each:
        whole("max_new_tokens", value, 1, limits.max_tokens)
    return each


def _asks_guide(recipe: Recipe) -> bool:
    commit = recipe.commit
    return any(rule.guided for rule in getattr(commit, "rules", []))


def _wants_words(output_type: str | None) -> bool:
    if output_type not in (None, "text", "seq", "ids"):
        raise UsageError(f"output_type must be text or seq, got {output_type!r}.")
    return output_type in (None, "text")
