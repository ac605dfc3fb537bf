"""Texts for tests: a tiny masked language model with random weights, the loop around it, and scripted scores.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.canvas import Canvas, TextFacts
from hasten.pipelines.text.loop import TextLoop
from hasten.pipelines.text_models.host import TextHost
from hasten.recipe import Recipe
from hasten.samplers.scores import Draw, Scores

VOCAB, PAD_ID, MASK_ID, EOS_ID, FIRST = 96, 0, 1, 2, 3
"""Tokens of the tiny model; prompts are made of FIRST and above."""


def facts(block: int | None = None, shifted: bool = False, layers: int = 2) -> TextFacts:
    """What the engine knows of the tiny model."""
    return TextFacts(layers, VOCAB, MASK_ID, (EOS_ID,), PAD_ID, (PAD_ID,), shifted, block)


@cache
def _llama(seed: int) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def tiny_llama(block: int | None = None, shifted: bool = False, seed: int = 0) -> TextHost:
    """A Llama with random weights that reads text in all directions (or block-causally), with sharp enough logits."""
    return TextHost(_llama(seed), facts(block, shifted))


def prompts(lengths: Sequence[int], seed: int = 1) -> list[Tensor]:
    """Random prompts, int64 [lengths[b]] each."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(FIRST, VOCAB, (length,), generator=g) for length in lengths]


def generate(
    host: TextHost, prompts: Sequence[Tensor], new: Sequence[int] | int, recipe: Recipe, temperature: float = 0.0,
    seed: int | Sequence[int] = 0, **given: Any,
) -> TextLoop:  # fmt: skip
    """Generate; the finished loop. seed: of the first text, the others count on from it, or one for each."""
    lengths = [new] * len(prompts) if isinstance(new, int) else list(new)
    canvas = Canvas.of(prompts, lengths, host.facts)
    seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
    loop = TextLoop(host, recipe, canvas, Draw(torch.tensor(list(seeds)), temperature), **given)
    loop.run()
    return loop


def texts(loop: TextLoop) -> list[list[int]]:
    """What was generated for each text, prompts left out."""
    canvas = loop.canvas
    return [canvas.ids[row, canvas.start[row] : canvas.end[row]].tolist() for row in range(len(canvas.ids))]


def alone(
    host: TextHost, prompts: Sequence[Tensor], new: Sequence[int], recipe: Recipe, temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:  # fmt: skip
    """The texts that `generate` gives when each prompt is a batch of its own."""
    single = [
        generate(host, [prompt], [count], recipe, temperature, seed + row)
        for row, (prompt, count) in enumerate(zip(prompts, new, strict=True))
    ]
    return [texts(loop)[0] for loop in single]


def open_canvas(starts: Sequence[int], new: Sequence[int], blocks: Sequence[tuple[int, int]] | None = None) -> Canvas:
    """A canvas whose texts are in `blocks` (slots [low, high); all that is generated, if None). Prompts are of
    FIRST."""
    made = Canvas.of([torch.full((start,), FIRST) for start in starts], new, facts())
    span = torch.stack([made.start, made.end], 1) if blocks is None else torch.tensor(list(blocks))
    made.enter(made.open.clone(), span)
    return made


def scripted(
    canvas: Canvas, confidence: Sequence[Sequence[float]], **given: Sequence[Sequence[float]] | Tensor
) -> Scores:
    """Scores that say what they are told, for the open slots of the active blocks.

    confidence: for each text, of its open slots in order; fewer: the rest is 0, more: they are not used. `token`,
    `second`, `entropy`, `guide`, `rank` likewise, or as [B, L]; rank is the confidence where it is not given, token
    5, second 0, entropy -log(confidence).
    """
    scores = Scores.blank(canvas)
    scores.seen = canvas.eligible.clone()
    scores.token = torch.full_like(canvas.ids, 5)
    scores.second = torch.zeros_like(scores.confidence)
    scores.confidence = _spread(canvas, confidence, torch.zeros_like(scores.confidence))
    scores.entropy = -scores.confidence.log()
    for name, value in given.items():
        old = getattr(scores, name)
        setattr(scores, name, value if isinstance(value, Tensor) else _spread(canvas, value, torch.zeros_like(old)))
    if "rank" not in given:
        scores.rank = torch.where(scores.seen, scores.confidence, -float("inf"))
    return scores


def _spread(canvas: Canvas, values: Sequence[Sequence[float]], into: Tensor) -> Tensor:
    for row, given in enumerate(values):
        slots = canvas.eligible[row].nonzero()[: len(given), 0]
        into[row, slots] = torch.tensor(list(given)[: len(slots)], dtype=into.dtype)
    return into


def picked(canvas: Canvas, chosen: Tensor) -> list[list[int]]:
    """The slots of `chosen` (bool [B, L]) for each text, counted among its open slots."""
    return [chosen[row][canvas.eligible[row]].nonzero()[:, 0].tolist() for row in range(len(chosen))]
