"""DiffusionGemma: text written from noise, canvas by canvas, behind an encoder that keeps the prefix exactly.

There is no mask token. A canvas starts as random tokens; each evaluation accepts some slots and fills the others with
new random tokens, so that nothing is settled until the canvas is, and what comes out is the most probable token
everywhere. The loop is transformers' `DiffusionGemmaGenerationMixin.generate` (5.23), with any of our commit rules for
acceptance, with noise of its own for each text, and with texts of different lengths.

Shapes: B texts, C slots of a canvas, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache

from hasten.canvas import Canvas, TextFacts
from hasten.errors import ModelError, RefusedError, UsageError
from hasten.noise import uniform
from hasten.pipelines.text_models.family import end_tokens, first
from hasten.recipe import Recipe
from hasten.samplers.commit import CommitState, Unmask
from hasten.samplers.commit_sure import EntropyBound
from hasten.samplers.scores import Draw, Logits, Scores, ScoreState, best, measure

WITHOUT_BLOCKS = "The recipe's blocks and ends were left out: the blocks of DiffusionGemma are its canvases."


@dataclass(frozen=True, slots=True)
class Denoising:
    """How a canvas is denoised; the defaults are those of the released model.

    steps: evaluations of a canvas at most. hot, cold: temperatures at its first and (but for one step) last evaluation.
    stable: evaluations for which the most probable tokens must have stayed the same, and confident: mean entropy in
    nats below which they must be, for a canvas to be over. forever: never over before the last step. bound: of the entropies
    that accepted slots may share, where no recipe says which are accepted.
    """

    steps: int = 48
    hot: float = 0.8
    cold: float = 0.4
    stable: int = 1
    confident: float = 0.005
    forever: bool = False
    bound: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.stable < 0 or not 0 < self.cold or not 0 < self.hot or self.bound < 0:
            raise UsageError(f"Denoising takes at least 1 step and temperatures above 0, got {self}.")

    def told(self, said: Mapping[str, Any]) -> Denoising:
        """The same, but for what a `DiffusionGemmaGenerationConfig` says (`SAID`); None in it says nothing."""
        found = {ours: said[theirs] for theirs, ours in SAID.items() if said.get(theirs) is not None}
        if "bound" in found:
            sampler = found.pop("bound")
            bound = sampler.get("entropy_bound") if isinstance(sampler, Mapping) else getattr(sampler, "entropy_bound", None)
            if bound is None:
                raise UsageError(f"sampler_config must be an EntropyBoundSamplerConfig, got {sampler!r}.")
            found["bound"] = bound
        return replace(self, **found)

    def temperature(self, left: int) -> float:
        """With `left` steps to go, this one included."""
        return self.cold + (self.hot - self.cold) * left / self.steps


SAID = {
    "max_denoising_steps": "steps", "t_min": "cold", "t_max": "hot", "stability_threshold": "stable",
    "confidence_threshold": "confident", "sampler_config": "bound",
}  # fmt: skip
"""Fields of transformers' `DiffusionGemmaGenerationConfig` -> ours."""


@dataclass(frozen=True, slots=True)
class Written:
    """texts: int64 [P_b + G_b] each, the prompt and what was written, up to the first end token with it. evaluations,
    tokens int64 [B]: of the decoder for each text until it was over, and its slots computed in them. canvases int64
    [B, n]: evaluations of each text up to the end of each canvas."""

    texts: list[Tensor]
    evaluations: Tensor
    tokens: Tensor
    canvases: Tensor


OnCanvas = Callable[[int, Tensor, Tensor, bool], None]
"""Told after each evaluation: the canvas's number, its most probable tokens int64 [B, C], which texts are over with it
(bool [B]), and whether the canvas is."""


def takes(model: Any) -> bool:
    """Is this a DiffusionGemma?"""
    return isinstance(model, DiffusionGemmaForBlockDiffusion)


class GemmaLoop:
    """One generation. recipe: its `commit` accepts; DiffusionGemma has blocks, a cache and revision of its own. notes: what
    of the recipe is left out.

    A text's tokens do not depend on who else is in the batch: prompts are padded on the left with a mask and with
    positions of their own, and noise is a function of the text's seed.
    """

    def __init__(
        self, model: DiffusionGemmaForBlockDiffusion, recipe: Recipe | None = None, denoising: Denoising | None = None
    ) -> None:
        recipe = recipe or Recipe()
        others = sorted(set(recipe.axes) - {"commit", "blocks"})
        if others:
            raise RefusedError(
                f"DiffusionGemma takes {', '.join(others)} from no recipe: its encoder keeps the prefix exactly, and every"
                " slot is open until its canvas is over. Leave them out; `commit` is used."
            )
        self.notes = [WITHOUT_BLOCKS] if recipe.blocks is not None else []
        self.how = denoising or Denoising()
        commit = recipe.commit or Unmask(rule=EntropyBound(bound=self.how.bound))
        if not isinstance(commit, Unmask):
            raise UsageError(f"The recipe has commit of kind {commit.kind!r}, which is not for texts. Take 'unmask'.")
        if any(rule.guided for rule in commit.rules):
            raise RefusedError("Guided commit rules ask a second model, which DiffusionGemma's loop has not. Take another recipe.")
        self.model, self.recipe, self.rule, self.score = model, recipe, commit.rule, commit.score
        text = model.config.get_text_config(decoder=True)
        self.length, self.vocab = int(model.config.canvas_length), int(text.vocab_size)
        self.context = int(text.max_position_embeddings)
        self.eos = end_tokens(model.config, text, model.generation_config)
        self.pad = first(getattr(text, "pad_token_id", None), *self.eos, 0)
        self.facts = TextFacts(text.num_hidden_layers, self.vocab, None, self.eos, self.pad, (), False, self.length)

    @torch.no_grad()
    def run(
        self, prompts: Sequence[Tensor], new: Sequence[int], seed: Tensor, on_canvas: OnCanvas | None = None
    ) -> Written:
        """Write up to new[b] tokens behind prompts[b] (int64 [P_b]). seed int64 [B]. Waits once per evaluation.

        Raises `UsageError` for an empty prompt or batch, or lengths beyond the context, before anything is computed.
        """
        self._check(prompts, new)
        device = self.model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        ids = torch.full((len(prompts), max(len(p) for p in prompts)), self.pad, device=device)
        for row, prompt in enumerate(prompts):
            ids[row, ids.shape[1] - len(prompt) :] = prompt.to(device)
        wanted = torch.tensor(list(new), device=device)
        state = _State(seed.to(device), wanted, torch.zeros_like(lengths), wanted <= 0, on_canvas)
        counts: list[Tensor] = []
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        here = torch.arange(ids.shape[1], device=device) - (ids.shape[1] - lengths)[:, None]
        real, pieces = here >= 0, [ids]
        while len(pieces) - 1 < -(-max(new) // self.length):
            self.model.model.encoder(
                input_ids=pieces[-1], attention_mask=real, position_ids=here.clamp(min=0), past_key_values=cache
            )
            real = F.pad(real, (0, self.length), value=True)
            here = here[:, -1:] + 1 + torch.arange(self.length, device=device)
            pieces.append(self._canvas(cache, real, here, state, len(pieces) - 1))
            counts.append(state.evaluations.clone())
            written = torch.cat(pieces[1:], 1)
            ends = self._ends(written)
            state.over = state.over | (ends < written.shape[1]) | (written.shape[1] >= state.wanted)
            if bool(state.over.all()):
                break
        found = torch.cat(pieces[1:], 1) if len(pieces) > 1 else ids[:, :0]
        stops = torch.minimum(self._ends(found) + 1, torch.minimum(wanted, torch.tensor(found.shape[1], device=device)))
        texts = [
            torch.cat([prompt.to(device), found[row, :stop]])
            for row, (prompt, stop) in enumerate(zip(prompts, stops.tolist(), strict=True))
        ]
        canvases = torch.stack(counts, 1) if counts else wanted.new_zeros(len(prompts), 0)
        return Written(texts, state.evaluations, state.evaluations * self.length, canvases)

    def _canvas(self, cache: DynamicCache, real: Tensor, here: Tensor, state: _State, number: int) -> Tensor:
        """The next canvas, int64 [B, C]. Texts that are over keep what they have; it is cut off later."""
        how, rule, score, canvas = self.how, self.rule.start(), self.score.start(), self._open(len(real), real.device)
        first_clock = number * (how.steps + 1)
        canvas.ids = likely = self._noise(state.seed, first_clock)
        over, echo = state.over, None
        before: list[Tensor] = []
        for step in range(how.steps):
            given = self.model(
                decoder_input_ids=canvas.ids, self_conditioning_logits=echo, decoder_attention_mask=real,
                past_key_values=cache, decoder_position_ids=here,
            )  # fmt: skip
            state.evaluations += ~over
            logits = given.logits / how.temperature(how.steps - step)
            canvas.step = torch.full_like(canvas.step, first_clock + step + 1)
            scores = self._scored(logits, rule, score, canvas, state.seed)
            accepted = rule.select(scores, canvas)
            accepted |= best(scores.rank, canvas.masked, (~accepted.any(1)).long())
            score.note(accepted, scores, canvas)
            then = torch.where(accepted, scores.token, self._noise(state.seed, first_clock + step + 1))
            canvas.ids = torch.where(over[:, None], canvas.ids, then)
            canvas.since = canvas.since + 1
            likely = torch.where(over[:, None], likely, logits.argmax(-1))
            told = logits.to(self.model.dtype)
            echo = told if echo is None else torch.where(over[:, None, None], echo, told)
            over = over | self._settled(likely, before, scores)
            before = [*before, likely][-how.stable :] if how.stable else []
            last = bool(over.all()) or step + 1 == how.steps
            if state.on_canvas is not None:
                state.on_canvas(number, likely, over, last)
            if last:
                break
        return likely

    def _open(self, rows: int, device: torch.device) -> Canvas:
        """A canvas on which every slot is open, and stays so."""
        nothing = [torch.zeros(0, dtype=torch.int64)] * rows
        canvas = Canvas.of(nothing, [self.length] * rows, self.facts, device)
        canvas.enter(canvas.open, torch.tensor([[0, self.length]], device=device).expand(rows, -1))
        return canvas

    def _scored(self, logits: Tensor, rule: CommitState, score: ScoreState, canvas: Canvas, seed: Tensor) -> Scores:
        """What logits [B, C, V], temperature applied, say of each slot; the rule sees them, too."""
        members, scores = torch.arange(len(logits), device=logits.device), Scores.blank(canvas)
        none = torch.zeros(0, dtype=torch.int64, device=logits.device)
        every = Logits(logits, canvas.place.expand(len(logits), -1), members)
        rule.observe(measure(every, score, Draw(seed, 1.0), none, canvas, scores), canvas)
        return scores

    def _noise(self, seed: Tensor, clock: int) -> Tensor:
        """Random tokens, int64 [B, C]; at other clocks than those at which tokens are drawn."""
        slot = torch.arange(self.length, device=seed.device)
        drawn = uniform(seed[:, None], torch.full_like(slot, -1 - clock), slot, 1)[..., 0]
        return (drawn * self.vocab).long()

    def _settled(self, likely: Tensor, before: list[Tensor], scores: Scores) -> Tensor:
        """Texts whose most probable tokens have stayed the same and are sure, bool [B]."""
        if self.how.forever or len(before) < self.how.stable:
            return torch.zeros(len(likely), dtype=torch.bool, device=likely.device)
        sure = scores.entropy.mean(1) < self.how.confident
        for earlier in before:
            sure = sure & (earlier == likely).all(1)
        return sure

    def _ends(self, written: Tensor) -> Tensor:
        """Slot of the first end token, int64 [B]; the length where there is none."""
        count = written.shape[1]
        ends = torch.isin(written, torch.tensor(self.eos, dtype=torch.int64, device=written.device))
        place = torch.arange(count, device=written.device)
        if not count:
            return torch.zeros(len(written), dtype=torch.int64, device=written.device)
        return torch.where(ends, place, count).amin(1)

    def _check(self, prompts: Sequence[Tensor], new: Sequence[int]) -> None:
        if not prompts or any(len(prompt) == 0 for prompt in prompts):
            raise UsageError("DiffusionGemma needs at least one token in each prompt, such as that a text begins with.")
        if any(count < 0 for count in new):
            raise UsageError(f"Numbers of tokens to write must not be negative, got {list(new)}.")
        canvases = -(-max(new) // self.length) * self.length
        longest = max(len(prompt) for prompt in prompts) + canvases
        if longest > self.context:
            raise UsageError(
                f"The longest prompt and {canvases} tokens in canvases of {self.length} are {longest} tokens, and the"
                f" context is {self.context}. Shorten the prompt or write less."
            )
        if self.model.training:
            raise ModelError("This DiffusionGemma is in training mode. Call model.eval() first.")


@dataclass(slots=True)
class _State:
    """seed, wanted, evaluations int64 [B]; over bool [B]: texts that are finished. on_canvas: who reads along."""

    seed: Tensor
    wanted: Tensor
    evaluations: Tensor
    over: Tensor
    on_canvas: OnCanvas | None

