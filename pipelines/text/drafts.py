"""Drafts: texts as they may stand some steps later, evaluated in one call with the texts as they are.

What is drafted is what the commit rule would write if the last evaluation still held; a `Verifier` says how far that came
true. Shapes: B texts, K drafts of each, L slots; m texts in one call, R slots of each whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.caching.kv import Rows, TokenKV
from hasten.canvas import Canvas, Row, TextFacts
from hasten.errors import RecipeError, RefusedError
from hasten.pipelines.text import calls
from hasten.pipelines.text.calls import Wanted
from hasten.samplers.commit import Unmask
from hasten.samplers.revise import RevisePolicy
from hasten.samplers.scores import Draw, Logits, Scores, measure
from hasten.samplers.text_blocks import InBlocks
from hasten.samplers.verify import Verifier

if TYPE_CHECKING:
    from hasten.pipelines.text.loop import TextLoop

Choose = Callable[[Scores, Canvas], Tensor]
"""What the commit rule writes, bool [B, L], given what is known of a canvas."""


def refuse(
    verifier: Verifier, commit: Unmask, blocks: InBlocks, kv: TokenKV, revise: RevisePolicy | None, facts: TextFacts
) -> None:
    """Raises `RecipeError` for parts whose decisions drafts would change, `RefusedError` for a model without masks."""
    why = None
    if commit.remembers:
        why = f"{commit.rule.kind!r} with {commit.score.kind!r} decides by steps that were. Take a rule without memory"
    elif blocks.end is not None and blocks.end.remembers:
        why = f"the end rule {blocks.end.kind!r} asks what was predicted in them. Take 'end-token'"
    elif blocks.rule.moves:
        why = f"the block rule {blocks.rule.kind!r} moves its block after each. Take 'fixed'"
    elif revise is not None:
        why = f"the reviser {revise.kind!r} would have changed them. Leave it out"
    elif not kv.steady:
        why = f"the cache {kv.kind!r} computes other tokens in each. Take 'dual', 'prefix' or 'recompute'"
    if why is not None:
        raise RecipeError(
            f"{verifier.kind!r} checks drafts, which stand for steps that were not taken; {why}, or leave verify out."
        )
    if facts.mask_id is None:
        raise RefusedError(f"{verifier.kind!r} drafts into masks, and this model has noise instead. Leave verify out.")


class Drafts:
    """A verifier's part in one generation."""

    def __init__(self, verifier: Verifier, commit: Unmask, draw: Draw, canvas: Canvas, facts: TextFacts) -> None:
        self.state = verifier.start(facts)
        self.timed = draw.temperature > 0 or commit.timed
        canvas.drafts = torch.full_like(canvas.drafts, verifier.most)

    @staticmethod
    def number(row: Row) -> int:
        """How many drafts of a text are evaluated, the text itself among them: each has a slot more written, and one is
        left open. At the first step of a block nothing is known to draft from."""
        return max(1, min(row.drafts, row.left)) if row.since > 0 else 1

    def check(self, loop: TextLoop, call: Rows, numbers: list[int], wanted: Wanted, before: Scores) -> None:
        """Evaluate drafts of the texts of `call`, `numbers` of each, and make the right one of each the text.

        before: what the last evaluation gave. `loop.scores` gets what the right draft's evaluation says.
        """
        canvas, most = loop.canvas, max(numbers)
        members = torch.tensor(call.members, device=canvas.ids.device)
        tried = torch.ones_like(canvas.step)
        tried[members] = torch.tensor(numbers, device=tried.device)
        many = _ladder(canvas, before, tried, most, loop.choose)
        scores = self._scores(loop, call, numbers, many, most, wanted)
        then = loop.choose(scores, many)
        shape = (len(canvas.ids), most, canvas.slots)
        after = torch.where(then, scores.token, many.ids).view(shape)
        level = torch.arange(most, device=tried.device)
        passed = self.state.passed(many.ids.view(shape), after) & (level < tried[:, None])
        if self.timed:  # a draft that skips a step was evaluated as of another step
            passed = passed.long().cumprod(1).bool()
        at = _walk(canvas, many, scores, passed)
        among = torch.zeros_like(canvas.open).index_fill(0, members, True)
        loop.scores.merge(scores.take(torch.arange(len(at), device=at.device) * most + at), among)
        self.state.learn(passed, tried, canvas)

    def _scores(
        self, loop: TextLoop, call: Rows, numbers: list[int], many: Canvas, most: int, wanted: Wanted
    ) -> Scores:
        """What one evaluation of all drafts says, [B * K, L]."""
        canvas = loop.canvas
        device = canvas.ids.device
        members = torch.tensor(call.members, device=device)
        if call.keep == "none":  # nothing is shared: each draft is a text of its own
            now, copies = calls.copies(call, numbers, many, most, wanted, loop.facts, loop.store)
        else:
            texts = many.ids.view(len(canvas.ids), most, -1)
            now = calls.drafts(call, texts, numbers, canvas, wanted, loop.facts, loop.store)
            copies = (members[:, None] * most + torch.arange(most, device=device)).flatten()
        values = loop.evaluate(now, loop.store)
        loop.count(members, now)
        scores = Scores.blank(many)
        draw = replace(loop.draw, seed=loop.draw.seed.repeat_interleave(most))
        logits = Logits(values.reshape(len(copies), -1, values.shape[-1]), now.target.reshape(len(copies), -1), copies)
        measure(logits, loop.score, draw, loop.forbidden, many, scores)
        return scores


def _ladder(canvas: Canvas, known: Scores, numbers: Tensor, most: int, choose: Choose) -> Canvas:
    """`most` drafts of each text, one after the other: B * K texts. A text has `numbers` (int64 [B]) different ones at
    most, fewer where the rule writes several slots; the rest repeat the last."""
    text, texts = canvas, [canvas]
    for level in range(1, most):
        chosen = choose(known, text)
        goes_on = (text.eligible & ~chosen).any(1) & (numbers > level)
        text = replace(text)
        text.write(chosen & goes_on[:, None], known.token, known.confidence)
        text.step, text.since = text.step + 1, text.since + 1
        texts.append(text)
    return Canvas(
        **{x.name: torch.stack([getattr(text, x.name) for text in texts], 1).flatten(0, 1) for x in fields(Canvas)}
    )


def _walk(canvas: Canvas, many: Canvas, scores: Scores, passed: Tensor) -> Tensor:
    """Write what decoding writes on its way through the drafts `passed`, as it would have; returns the number of the last
    one, int64 [B]."""
    most = passed.shape[1]
    first = torch.arange(len(passed), device=passed.device) * most
    at = torch.zeros_like(first)
    for level in range(1, most):
        goes = passed[:, level]
        new = many.masked[first + at] & ~many.masked[first + level] & goes[:, None]
        canvas.write(new, scores.token[first + at], scores.confidence[first + at])
        canvas.step, canvas.since = canvas.step + goes, canvas.since + goes
        at = torch.where(goes, level, at)
    return at
