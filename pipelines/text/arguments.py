"""The numbers of one generation, under the names that users of transformers, diffusers and the papers' code know.

A number that the recipe has a part for changes that part; one that nothing can take is refused, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from pydantic import ValidationError

from hasten.canvas import TextFacts
from hasten.errors import LimitError, UsageError, nearest
from hasten.limits import Limits
from hasten.part import Part
from hasten.recipe import Recipe
from hasten.samplers.commit import CommitRule, Either, Quota, Threshold, Unmask
from hasten.samplers.revise import RevisePolicy
from hasten.samplers.scores import Arbitrary, Certainty, Confidence, Draw, Margin, Score, Softened
from hasten.samplers.text_blocks import Fixed, InBlocks

P = TypeVar("P", bound=Part)

ALIASES = {
    "gen_length": "max_new_tokens", "max_denoising_steps": "steps", "num_inference_steps": "steps",
    "block_size": "block_length", "canvas_length": "block_length",
    "confidence_threshold": "threshold", "dynamic_threshold": "threshold",
    "edit_threshold": "editing_threshold",
    "alg": "remasking", "mask_id": "mask_token_id", "prompt": "prompts", "inputs": "input_ids",
}  # fmt: skip
"""Other names -> ours. LLaDA, Dream, Fast-dLLM, SDAR, diffusers' LLaDA2Pipeline and transformers' DiffusionGemma."""

ORDERS: dict[str, Score] = {
    "low_confidence": Confidence(), "maskgit_plus": Confidence(), "topk_margin": Margin(), "entropy": Certainty(),
    "random": Arbitrary(), "origin": Arbitrary(),
}  # fmt: skip
"""`remasking` of LLaDA and `alg` of Dream."""

PLAIN = Recipe(name="sequential", commit=Unmask(rule=Quota()), blocks=InBlocks(rule=Fixed()))
"""What a pipeline does without a recipe: the surest slot per evaluation, in blocks, everything computed anew."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """Numbers of one generation; None leaves them to the recipe. Meanings: `TextDiffusionPipeline.generate`."""

    steps: int | None = None
    block_length: int | None = None
    threshold: float | None = None
    editing_threshold: float | None = None
    remasking: str | None = None
    alg_temp: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    do_sample: bool | None = None
    cfg_scale: float = 0.0
    eos_penalty: float = 0.0
    min_new_tokens: int = 0

    def check(self, facts: TextFacts, limits: Limits) -> None:
        """Raise `UsageError` or `LimitError` with the first number that is out of range."""
        for name, low, high in (
            ("steps", 1, limits.max_steps), ("block_length", 1, limits.max_tokens), ("top_k", 1, None),
            ("min_new_tokens", 0, limits.max_tokens),
        ):  # fmt: skip
            whole(name, getattr(self, name), low, high)
        for name, lowest, highest in (
            ("threshold", 0, 1), ("editing_threshold", 0, 1), ("alg_temp", 0, None), ("temperature", 0, None),
            ("top_p", 0, 1), ("cfg_scale", 0, None), ("eos_penalty", 0, None),
        ):  # fmt: skip
            _number(name, getattr(self, name), lowest, highest)
        if self.top_p == 0:
            raise UsageError("top_p = 0 leaves no token. Take a share above 0, or temperature=0 for the best token.")
        if self.do_sample is False and self.temperature:
            raise UsageError(f"do_sample=False and temperature={self.temperature} contradict each other. Leave one of them out.")
        if self.do_sample and self.temperature == 0:
            raise UsageError("do_sample=True and temperature=0 contradict each other. Leave one of them out.")
        if not self.heat and (self.top_k is not None or self.top_p is not None):
            raise UsageError("top_k and top_p act on sampling, and the temperature is 0. Pass temperature= or do_sample=True.")
        if self.cfg_scale and facts.mask_id is None:
            raise UsageError("cfg_scale hides the prompt behind mask tokens, and this model has none. Leave it out.")
        if (self.eos_penalty or self.min_new_tokens) and not facts.eos_ids:
            raise UsageError("eos_penalty and min_new_tokens act on the end token, and this model has none. Pass eos_token_id=.")

    @property
    def heat(self) -> float:
        """Temperature of tokens; 0 takes the best one."""
        return self.temperature if self.temperature is not None else 1.0 if self.do_sample else 0.0

    def draw(self, seed: Any) -> Draw:
        """How tokens are drawn. seed: int64 [B]."""
        return Draw(seed, self.heat, self.top_k, self.top_p)

    def applied(self, recipe: Recipe, facts: TextFacts) -> Recipe:
        """The recipe with these numbers in its parts. Raises `UsageError` where no part takes one that was given."""
        commit = recipe.commit or PLAIN.commit
        blocks = recipe.blocks or PLAIN.blocks
        assert isinstance(commit, Unmask) and isinstance(blocks, InBlocks)
        changed: dict[str, Any] = {"commit": self._paced(self._ordered(commit)), "blocks": self._sized(blocks, facts)}
        if self.editing_threshold is not None:
            changed["revise"] = self._edited(recipe.revise)
        return Recipe(name=recipe.name, paper=recipe.paper, models=recipe.models, **(recipe.axes | changed))

    def _paced(self, commit: Unmask) -> Unmask:
        """With the threshold and the steps; both together are LLaDA2's and SDAR's "low-confidence dynamic"."""
        if self.threshold is not None:
            commit = Unmask(rule=_sharper(commit.rule, self.threshold, self.steps is not None), score=commit.score)
        return commit if self.steps is None else commit.with_steps(self.steps)

    def _ordered(self, commit: Unmask) -> Unmask:
        if self.remasking is not None:
            if self.remasking not in ORDERS:
                raise UsageError(
                    f"remasking {self.remasking!r} is unknown; allowed: {', '.join(ORDERS)}.{nearest(self.remasking, ORDERS)}"
                )
            commit = Unmask(rule=commit.rule, score=ORDERS[self.remasking])
        if self.alg_temp:
            commit = Unmask(rule=commit.rule, score=Softened(score=commit.score, temperature=self.alg_temp))
        return commit

    def _sized(self, blocks: InBlocks, facts: TextFacts) -> InBlocks:
        if self.block_length is None:
            return blocks
        if facts.block is not None and self.block_length != facts.block:
            raise UsageError(
                f"block_length = {self.block_length}, and this model was trained with blocks of {facts.block}: it would see other"
                " tokens than it knows. Leave it out; parts of a block are the block rule 'sub-blocks' of a recipe."
            )
        return InBlocks(rule=_with(blocks.rule, "size", self.block_length, "block_length"), end=blocks.end)

    def _edited(self, revise: Any) -> RevisePolicy | None:
        """With the threshold of editing; 0 is none, as in diffusers."""
        from hasten.samplers.revise_edit import Edit

        if not self.editing_threshold:
            return None if isinstance(revise, Edit) else revise
        found: RevisePolicy = Edit() if revise is None else revise
        return _with(found, "above", self.editing_threshold, "editing_threshold")


def canonical(given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments under our names. given: those whose names are not ours. known: ours, of which those that are not None
    are taken. Raises `UsageError` for an unknown name, and for one argument under two names."""
    found = {name: value for name, value in known.items() if value is not None}
    for name, value in given.items():
        ours = ALIASES.get(name)
        if ours is None:
            names = [*known, *ALIASES]
            raise UsageError(f"generate has no argument {name!r}.{nearest(name, names)} It takes {', '.join(known)}.")
        if value is None:
            continue
        if ours in found:
            raise UsageError(f"{name} is another name of {ours}, and both were given. Leave one of them out.")
        found[ours] = value
    return found


def decoding(given: dict[str, Any]) -> Decoding:
    """Takes the numbers of a `Decoding` out of `given`."""
    return Decoding(**{field.name: given.pop(field.name) for field in fields(Decoding) if field.name in given})


def whole(name: str, value: Any, low: int, high: int | None) -> None:
    """Raise unless `value` is None or a whole number from low to high (None: any)."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} must be a whole number, got {value!r}.")
    if value < low:
        raise UsageError(f"{name} must be at least {low}, got {value}.")
    if high is not None and value > high:
        raise LimitError(f"{name} may be {high:,} at most, got {value:,}.")


def _number(name: str, value: Any, low: float, high: float | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{name} must be a finite number, got {value!r}.")
    if value < low or high is not None and value > high:
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name} must be {bounds}, got {value}.")


def _sharper(rule: CommitRule, above: float, paced: bool) -> CommitRule:
    """The rule with this threshold. The plain rule, which has none, becomes one; with its quota where that has steps."""
    if isinstance(rule, Quota):
        threshold = Threshold(above=above)
        return Either(rules=(threshold, rule)) if paced or rule.steps is not None else threshold
    if isinstance(rule, Either):
        takes = [number for number, each in enumerate(rule.rules) if "above" in type(each).model_fields]
        if takes:
            parts = list(rule.rules)
            parts[takes[0]] = _with(parts[takes[0]], "above", above, "threshold")
            return Either(rules=tuple(parts))
    return _with(rule, "above", above, "threshold")


def _with(part: P, field: str, value: Any, said: str) -> P:
    """The part with another value. Raises `UsageError` where it has no such field, or the value is not for it."""
    if field not in type(part).model_fields:
        raise UsageError(
            f"{said} = {value} was given, and the recipe's {type(part).kind!r} has no such number. Leave it out, or take another"
            " recipe."
        )
    try:
        return type(part)(**(dict(part) | {field: value}))
    except ValidationError as error:
        raise UsageError(f"{said} = {value}: {error.errors()[0]['msg']}.") from None
