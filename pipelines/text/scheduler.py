"""hasten's commit rules and revisers inside diffusers' `LLaDA2Pipeline`.

    pipe = LLaDA2Pipeline(model=model, scheduler=RecipeScheduler("credit"), tokenizer=tokenizer)

Shapes: B texts, L slots of a block, V tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from diffusers import BlockRefinementScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementSchedulerOutput
from torch import Tensor

from hasten.canvas import DONE, MASK, PROMPT, Canvas, TextFacts
from hasten.errors import RefusedError, UsageError
from hasten.noise import seeds
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.recipe import Recipe, from_yaml
from hasten.samplers.commit import Quota, Unmask
from hasten.samplers.revise import RevisePolicy, Reviser, at_least
from hasten.samplers.scores import Draw, Logits, Scores, measure
from hasten.samplers.text_blocks import Fixed, InBlocks
from hasten.samplers.text_ends import AtEndToken


class RecipeScheduler(BlockRefinementScheduler):  # type: ignore[misc]
    """A scheduler whose `step` writes what a recipe's commit rule takes and its reviser changes.

    recipe: a name, or a recipe as YAML; `of` takes a `Recipe`. Its axes commit and revise act; blocks must be fixed ones,
    because the pipeline cuts them (block_length: their size where the call names none; None: the recipe's, else 32).
    Caches and drafts are not a scheduler's affair; `hasten.accelerate(pipe, recipe)` adds an exact cache.

    Differs from diffusers' scheduler: mask tokens are never written; a block ends with the evaluation that fills it (the
    pipeline would evaluate every full block once more) unless the reviser holds it; confidence is that of softmax without
    temperature; each text has noise of its own. `num_inference_steps` paces rules that have a quota; threshold,
    editing_threshold and minimal_topk of the call are diffusers' own rule and do nothing here: the recipe has its own.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, recipe: str = "", block_length: int | None = None, num_inference_steps: int = 32) -> None:
        found = _named(recipe)
        self.commit, self.revise = _parts(found)
        super().__init__(block_length=block_length or _size(found), num_inference_steps=num_inference_steps)
        self._block: _Block | None = None
        self._seed: Tensor | None = None
        self._evaluations = 0

    @classmethod
    def of(cls, recipe: str | Path | Recipe, block_length: int | None = None) -> Self:
        """The scheduler for a recipe, whichever way it is named."""
        made: Self = cls(find_recipe(recipe).to_yaml(), block_length)
        return made

    def set_timesteps(self, num_inference_steps: int, device: Any = None, block_length: int | None = None) -> None:
        """A new run of the pipeline begins."""
        super().set_timesteps(num_inference_steps, device, block_length)
        self._block, self._seed, self._evaluations = None, None, 0

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, *, mask_token_id: int | None = None,
        temperature: float = 0.0, top_p: float | None = None, top_k: int | None = None, sampling_method: str = "auto",
        threshold: float | None = None, editing_threshold: float | None = None, minimal_topk: int | None = None,
        prompt_mask: Tensor | None = None, generator: torch.Generator | None = None, return_dict: bool = True,
    ) -> BlockRefinementSchedulerOutput | tuple[Tensor, ...]:  # fmt: skip
        """One evaluation's worth of writing, as in `BlockRefinementScheduler.step`. model_output [B, L, V], sample int64
        [B, L], prompt_mask bool [L]. Raises `RefusedError` for a model without mask tokens."""
        if mask_token_id is None:
            raise RefusedError(
                "RecipeScheduler writes into masks, and this model has no mask token. Keep diffusers' own scheduler for models"
                " of uniform noise."
            )
        if self._seed is None or len(self._seed) != len(sample):
            self._seed = seeds(generator, len(sample)).to(sample.device)
        if self._block is None or int(timestep) == 0 or self._block.canvas.ids.shape != sample.shape:
            facts = TextFacts(layers=0, vocab=model_output.shape[-1], mask_id=mask_token_id)
            self._block = _Block(self._paced(), self.revise, facts, sample, prompt_mask, self._evaluations, self._seed)
        heat = 0.0 if sampling_method == "greedy" else temperature
        self._evaluations += 1
        given = self._block.step(model_output, sample, Draw(self._seed, heat, top_k or None, top_p))
        if not return_dict:
            return given
        return BlockRefinementSchedulerOutput(*given)

    def check_block_should_continue(
        self, step_idx: int, masks_remaining: bool, editing_enabled: bool, editing_transfer_index: Tensor, post_steps: int,
        max_post_steps: int, finished: Tensor,
    ) -> bool:  # fmt: skip
        """Is anything of the block left to do? The arguments tell what stood there before the last step; the block itself
        knows what stands there now."""
        return self._block is not None and bool((self._block.goes_on() & ~finished).any())

    def _paced(self) -> Unmask:
        try:
            return self.commit.with_steps(self.num_inference_steps)
        except UsageError:  # the rule finds out itself how many it needs
            return self.commit


class _Block:
    """The active block of all texts, as a canvas of its own: slot 0 is its first token."""

    def __init__(
        self, commit: Unmask, revise: RevisePolicy | None, facts: TextFacts, sample: Tensor, prompt: Tensor | None, since: int,
        seed: Tensor,
    ) -> None:  # fmt: skip
        texts, slots = sample.shape
        given = int(prompt.sum()) if prompt is not None else 0
        nothing = torch.zeros(given, dtype=torch.int64)
        self.canvas = canvas = Canvas.of([nothing] * texts, [slots - given] * texts, facts, sample.device)
        assert facts.mask_id is not None
        self.mask_id, self.rule, self.score = facts.mask_id, commit.rule.start(), commit.score.start()
        self._show(sample)
        canvas.enter(canvas.open, torch.stack([canvas.start, canvas.end], 1))
        canvas.step = canvas.step + since  # noise goes by the step; blocks must not share theirs
        self.revise = Reviser(revise, facts, canvas, seed) if revise is not None else None
        self.forbidden = torch.tensor([self.mask_id], dtype=torch.int64, device=sample.device)

    def _show(self, sample: Tensor) -> None:
        """Take over what stands in the pipeline's block: it freezes texts that are over."""
        canvas = self.canvas
        canvas.ids = sample
        written = torch.where(sample == self.mask_id, MASK, DONE)
        canvas.status = torch.where(canvas.status == PROMPT, PROMPT, written).to(torch.uint8)

    def step(self, logits: Tensor, sample: Tensor, draw: Draw) -> tuple[Tensor, ...]:
        """prev_sample, transfer_index, editing_transfer_index, sampled_tokens, sampled_probs, the logits."""
        canvas = self.canvas
        self._show(sample)
        scores = Scores.blank(canvas)
        slots = canvas.place.expand(len(sample), -1)
        members = torch.arange(len(sample), device=sample.device)
        known = measure(Logits(logits, slots, members), self.score, draw, self.forbidden, canvas, scores)
        self.rule.observe(known, canvas)
        chosen = self.rule.select(scores, canvas) & scores.among(canvas)
        least = self.revise.least(scores, chosen, canvas) if self.revise is not None else None
        chosen = at_least(least, chosen, scores, canvas)
        canvas.write(chosen, scores.token, scores.confidence)
        self.score.note(chosen, scores, canvas)
        changed = torch.zeros_like(chosen) if self.revise is None else self.revise.revise(scores, chosen, canvas)
        canvas.step, canvas.since = canvas.step + 1, canvas.since + 1
        return canvas.ids, chosen, changed, scores.token, scores.confidence, logits

    def goes_on(self) -> Tensor:
        """Texts in which something is open, or held for another look; bool [B]."""
        left = self.canvas.masked.any(1)
        holds = self.revise.holds(self.canvas) if self.revise is not None else None
        return left if holds is None else left | holds


def _named(recipe: str) -> Recipe:
    """A name, or YAML. Nothing is diffusers' own default: a quota."""
    if not recipe:
        return Recipe()
    return from_yaml(recipe) if "\n" in recipe else find_recipe(recipe)


def _size(recipe: Recipe) -> int:
    rule = recipe.blocks.rule if isinstance(recipe.blocks, InBlocks) else None
    return rule.size if isinstance(rule, Fixed) else 32


def cuts_alike(recipe: Recipe) -> bool:
    """Are its blocks such as LLaDA2Pipeline cuts them: all of one size, and over at the end token?"""
    blocks = recipe.blocks
    if blocks is None:
        return True
    return isinstance(blocks, InBlocks) and isinstance(blocks.rule, Fixed) and isinstance(blocks.end, AtEndToken | None)


def _parts(recipe: Recipe) -> tuple[Unmask, RevisePolicy | None]:
    """The commit rule and the reviser. Raises `UsageError` for what only a loop of hasten's own can do."""
    name = f"Recipe {recipe.name!r}" if recipe.name else "The recipe"
    others = [axis for axis in recipe.axes if axis not in ("commit", "revise", "blocks")]
    commit, revise = recipe.commit or Unmask(rule=Quota()), recipe.revise
    if others or not isinstance(commit, Unmask):
        raise UsageError(
            f"{name} sets {', '.join(others) or 'another kind of commit'}, which a scheduler cannot do. Use"
            " hasten.TextDiffusionPipeline(pipe.model, pipe.tokenizer, recipe), or hasten.accelerate(pipe, recipe) for a cache."
        )
    if not cuts_alike(recipe):
        raise UsageError(
            f"{name} has blocks or ends of its own, and LLaDA2Pipeline cuts blocks of one size. Use"
            " hasten.TextDiffusionPipeline(pipe.model, pipe.tokenizer, recipe)."
        )
    if any(rule.guided for rule in commit.rules):
        raise UsageError(f"{name} asks a guiding model, which a scheduler does not have. Use hasten.TextDiffusionPipeline.")
    if commit.score.sees == "rest" or any(rule.sees == "rest" for rule in commit.rules):
        raise UsageError(f"{name} looks behind the active block, and a scheduler gets its logits only. Use another recipe.")
    if revise is not None and (not isinstance(revise, RevisePolicy) or revise.shadows):
        raise UsageError(f"{name} revises with evaluations of its own, which a scheduler cannot ask for. Use another recipe.")
    return commit, revise
