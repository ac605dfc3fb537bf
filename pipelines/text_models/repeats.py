"""Does a model give back what it is given? Revisers that ask about written tokens need one that does.

Models are trained to fill masks; what they say where none is, is up to how else they were trained. LLaDA2.1 was taught to
repeat what is right there and to replace what is not. Where that was not taught, the logits of written slots mean nothing,
and a reviser that goes by them destroys a text.

Shapes: B texts, L slots, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.caching.kv import Recompute
from hasten.caching.store import KVStore
from hasten.canvas import Canvas
from hasten.pipelines.text import calls
from hasten.pipelines.text.calls import Wanted
from hasten.pipelines.text_models.host import TextHost

LEAST = 0.8
"""Of a prompt's tokens. A model that was taught to repeat does so nearly always, and what it does not repeat it takes for
wrong: with fewer, a reviser changes more than it can put right. The bundled ones, taught masks alone, give back a third."""

ENOUGH = 8
"""Tokens that are asked about at least; fewer say nothing."""


def sentence(share: float, kind: str) -> str:
    """What is said when a reviser is left out."""
    return (
        f"The reviser {kind!r} was left out: it asks the model about tokens that are written, and this one gives back only"
        f" {share:.0%} of those it is given ({LEAST:.0%} are needed), so it was taught masks alone. 'narrow-out' asks with"
        " masks."
    )


def repeats(host: TextHost, prompts: Sequence[Tensor]) -> float | None:
    """The share of the tokens of `prompts` (int64 [P_b] each) that the model predicts where they stand; None where there are
    too few of them. One evaluation of the prompts."""
    facts = host.facts
    given = [prompt for prompt in prompts if len(prompt) > int(facts.shifted)]
    if sum(len(prompt) - int(facts.shifted) for prompt in given) < ENOUGH:
        return None
    canvas = Canvas.of(given, [0] * len(given), facts, host.device)
    canvas.open = torch.ones_like(canvas.open)
    store = KVStore(len(given), canvas.slots, canvas.ids.device)
    same = torch.zeros((), device=canvas.ids.device)
    asked = torch.zeros((), device=canvas.ids.device)
    never = torch.tensor(sorted({*facts.forbidden, *([] if facts.mask_id is None else [facts.mask_id])}), device=host.device)
    with host.attached():
        for call in Recompute().start(facts, store).plan(canvas, canvas.look()):
            now = calls.plain(call, canvas, Wanted(canvas.used, canvas.slots), facts, store)
            token = host.run(now, store).float().index_fill(-1, never.long(), -float("inf")).argmax(-1)
            real = now.target < canvas.slots
            stands = canvas.ids[now.members[:, None], now.target.clamp(max=canvas.slots - 1)]
            same = same + ((token == stands) & real).sum()
            asked = asked + real.sum()
    return float(same / asked)
