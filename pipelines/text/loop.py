"""The loop of text diffusion: look, plan, evaluate, score, write, revise, go on.

What every method must keep is kept here, once: each open text writes at least one slot per step, prompts are never
touched, mask tokens are never written, revisions cannot undo a step or go on for ever, and a text's tokens do not depend
on who else is in the batch (each has noise, blocks and caches of its own). The host waits for the device once per step.

It ends: every step of an open text writes an open slot of its block or, when a reviser holds a full block, changes one. A
text with n slots to write is over within n steps without a reviser, and within (budget + 1) n with one (`Reviser` has
the proof); blocks only go on to slots that are still open. Drafts make steps fewer, and blocks that move are a part of
the same count.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hasten.caching.kv import Recompute, Rows, TokenKV
from hasten.caching.store import KVStore, Pass
from hasten.canvas import DONE, Canvas, Row
from hasten.errors import RecipeError, UsageError
from hasten.pipelines.text import calls, drafts
from hasten.pipelines.text.calls import Wanted
from hasten.pipelines.text_models.host import TextHost
from hasten.recipe import Recipe
from hasten.samplers.commit import Quota, Unmask
from hasten.samplers.revise import RevisePolicy, Reviser, at_least
from hasten.samplers.scores import Draw, Logits, Scores, measure
from hasten.samplers.text_blocks import Fixed, InBlocks
from hasten.samplers.verify import Verifier

OnStep = Callable[[int, Canvas, Scores, list[Row]], bool | None]
"""Called after each step with its number, the canvas, what was known, and where the texts stood; True stops."""

OnLook = Callable[[list[Row], Tensor, Tensor], dict[int, int]]
"""Called before each step, and once at the end, with where the texts stand, their ids and status (`Canvas.read`, on the
host): gives texts that are to end now, and one past the last slot of each, up to which all is written."""

Evaluate = Callable[[Pass, KVStore], Tensor]
"""Logits [m, R, V] of a call, as `TextHost.run` gives them."""

Guide = Callable[[Tensor, Canvas], Tensor]
"""What a guiding model would write into each slot, int64 [B, L], given ids int64 [B, L] in which every slot that may be
written has the token proposed for it; -1 where it says nothing."""


@dataclass(slots=True)
class Tally:
    """What a generation cost. evaluations, tokens int64 [B]: calls of the model that a text took part in, and its tokens
    computed in them (all layers of each, unless `layers` says otherwise). layers float [B]: computed tokens times the
    share of layers that computed them. rows: where the texts stood before each step."""

    evaluations: Tensor
    tokens: Tensor
    layers: Tensor
    rows: list[list[Row]] = field(default_factory=list)


class TextLoop:
    """One generation: a canvas, a model and the parts of a recipe. Call `run`."""

    def __init__(
        self, host: TextHost, recipe: Recipe, canvas: Canvas, draw: Draw, guide: Guide | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:  # fmt: skip
        """evaluate: in place of `host.run`, for what is done to logits before anything decides on them.

        Raises `UsageError` where the commit rule wants a guide and there is none, and `RecipeError` where drafts cannot
        be verified with the other parts.
        """
        self.host, self.canvas, self.draw, self.facts = host, canvas, draw, host.facts
        self.evaluate = evaluate or host.run
        commit = recipe.commit or Unmask(rule=Quota())
        blocks = recipe.blocks or InBlocks(rule=Fixed())
        kv = recipe.kv or Recompute()
        assert isinstance(commit, Unmask) and isinstance(blocks, InBlocks) and isinstance(kv, TokenKV)
        self.store = KVStore(len(canvas.ids), canvas.slots, canvas.ids.device)
        self.rule, self.score, self.guide = commit.rule.start(), commit.score.start(), guide
        if guide is None and any(rule.guided for rule in commit.rules):
            raise UsageError(f"The commit rule {commit.rule.kind!r} asks a guiding model, and there is none. Pass guide=.")
        self.blocks = blocks.rule.start(self.facts)
        self.end = blocks.end.start(self.facts) if blocks.end is not None else None
        self.kv, self.layered = kv.start(self.facts, self.store), kv.layered
        if self.kv.ahead and self.rule.planned(canvas, 1) is None:
            raise RecipeError(
                f"kv {kv.kind!r} fixes the slots of several evaluations at once, and the commit rule {commit.rule.kind!r} does"
                " not know beforehand how many it writes. Take a rule with a quota, or another cache."
            )
        assert recipe.revise is None or isinstance(recipe.revise, RevisePolicy)
        if kv.layered and recipe.revise is not None and recipe.revise.shadows:
            raise RecipeError(
                f"kv {kv.kind!r} computes other tokens in each layer, and {recipe.revise.kind!r} adds masks to every call that"
                " it keeps nothing of. Take another cache or another reviser."
            )
        assert recipe.verify is None or isinstance(recipe.verify, Verifier)
        self.revise = Reviser(recipe.revise, self.facts, canvas, draw.seed) if recipe.revise is not None else None
        self.shadows = recipe.revise is not None and recipe.revise.shadows
        self.verify: drafts.Drafts | None = None
        if recipe.verify is not None:
            drafts.refuse(recipe.verify, commit, blocks, kv, recipe.revise, self.facts)
            self.verify = drafts.Drafts(recipe.verify, commit, self.draw, canvas, self.facts)
        self.sees_rest = any(
            part is not None and part.sees == "rest" for part in (*commit.rules, commit.score, blocks.end)
        )  # fmt: skip
        self.sees_rest_first = self.sees_rest or blocks.rule.sees == "rest"
        self.sees_written = any(rule.written for rule in commit.rules) or recipe.revise is not None and recipe.revise.written
        forbidden = {*self.facts.forbidden, *([self.facts.mask_id] if self.facts.mask_id is not None else [])}
        self.forbidden = torch.tensor(sorted(forbidden), dtype=torch.int64, device=canvas.ids.device)
        zeros = torch.zeros(len(canvas.ids), dtype=torch.int64, device=canvas.ids.device)
        self.tally = Tally(zeros, zeros.clone(), zeros.double())
        self.scores = Scores.blank(canvas)

    def run(self, on_step: OnStep | None = None, on_look: OnLook | None = None) -> Canvas:
        """Write until every text is over, or `on_step` returns True."""
        canvas = self.canvas
        self._advance(canvas.open.clone())
        with self.host.attached(), self.host.layers.attached() if self.layered else nullcontext():
            number = 0
            while True:
                told = self.kv.tell(canvas)
                rows = canvas.look(told) if on_look is None else self._shown(on_look, told)
                if not any(row.open for row in rows):
                    return canvas
                self.tally.rows.append(rows)
                self.step(rows)
                if on_step is not None and on_step(number, canvas, self.scores, rows):
                    return canvas
                number += 1

    def _shown(self, on_look: OnLook, told: Tensor | None) -> list[Row]:
        """Look, let `on_look` read along, and end the texts that it says are over."""
        canvas = self.canvas
        rows, ids, status = canvas.read(told)
        over = on_look(rows, ids, status)
        if over:
            ends = [over.get(number, row.end) for number, row in enumerate(rows)]
            canvas.cut(torch.tensor(ends, device=canvas.ids.device), self.facts.pad_id)
            canvas.open = canvas.open & ~torch.tensor([number in over for number in range(len(rows))], device=canvas.ids.device)
            rows = [replace(row, end=over[i], left=0, masks=0, open=False) if i in over else row for i, row in enumerate(rows)]
        return rows

    def step(self, rows: list[Row]) -> None:
        """One step of every open text."""
        canvas = self.canvas
        was = canvas.open.clone()
        before, self.scores = self.scores, Scores.blank(canvas)
        for call in self.kv.plan(canvas, rows):
            for part in self._split(call, rows):
                self._evaluate(part, rows, before)
        self.blocks.settle(canvas, self.scores)
        self.kv.sure(torch.where(self.scores.seen & canvas.masked, self.scores.confidence, float("nan")), canvas)
        if self.kv.ahead:
            planned = self.rule.planned(canvas, self.kv.ahead + 1)
            assert planned is not None
            self.kv.rank(self.scores.rank, planned, canvas)
        if self.guide is not None:
            proposed = torch.where(canvas.masked & self.scores.seen, self.scores.token, canvas.ids)
            self.scores.guide = self.guide(proposed, canvas)
        chosen = self.rule.select(self.scores, canvas) & self.scores.among(canvas)
        least = self.revise.least(self.scores, chosen, canvas) if self.revise is not None else None
        chosen = at_least(least, chosen, self.scores, canvas)
        canvas.write(chosen, self.scores.token, self.scores.confidence)
        self.score.note(chosen, self.scores, canvas)
        erased = torch.zeros_like(chosen) if self.revise is None else self.revise.revise(self.scores, chosen, canvas)
        self.kv.changed(chosen, erased, canvas)
        canvas.step = canvas.step + was
        canvas.since = canvas.since + was
        self._finish(was)

    # --- evaluation ---------------------------------------------------------------------------------

    def _split(self, call: Rows, rows: list[Row]) -> list[Rows]:
        """With a verifier: texts that have drafts to check, and those that have none."""
        if self.verify is None:
            return [call]
        several = [self.verify.number(rows[member]) > 1 for member in call.members]
        if all(several) or not any(several):
            return [call]
        return [call.only([i for i, more in enumerate(several) if more is kind]) for kind in (False, True)]

    def _evaluate(self, call: Rows, rows: list[Row], before: Scores) -> None:
        canvas = self.canvas
        wanted, shadows = self._wanted(call, rows)
        if self.verify is not None and self.verify.number(rows[call.members[0]]) > 1:
            numbers = [self.verify.number(rows[member]) for member in call.members]
            masked = canvas.masked
            self.verify.check(self, call, numbers, wanted, before)
            self.kv.seen(replace(call, keep="scratch"), canvas)  # drafts leave nothing in the store
            self.kv.changed(masked & ~canvas.masked, torch.zeros_like(masked), canvas)
            return
        members = torch.tensor(call.members, device=canvas.ids.device)
        now = calls.plain(call, canvas, wanted, self.facts, self.store, shadows)
        logits = Logits(self.evaluate(now, self.store), now.target, members)
        known = measure(logits, self.score, self.draw, self.forbidden, canvas, self.scores)
        self.rule.observe(known, canvas)
        self.count(members, now)
        self.kv.seen(call, canvas)

    def _wanted(self, call: Rows, rows: list[Row]) -> tuple[Wanted, Wanted | None]:
        """Whose logits this call is asked for, and written slots whose logits are asked for as if they were open."""
        canvas = self.canvas
        mine = [rows[member] for member in call.members]
        slots, most = canvas.eligible, max(row.left for row in mine)
        if self.sees_rest or self.sees_rest_first:
            all_of = canvas.open if self.sees_rest else canvas.open & (canvas.since == 0)
            slots = slots | canvas.masked & all_of[:, None]
            most = max(row.masks if self.sees_rest or row.since == 0 else row.left for row in mine)
        if not self.sees_written:
            return Wanted(slots, most), None
        written = canvas.active & (canvas.status == DONE)
        several = max(row.high - row.low - row.left for row in mine)
        if not self.shadows:
            return Wanted(slots | written, most + several), None
        return Wanted(slots, most), Wanted(written, several) if several else None

    def count(self, members: Tensor, now: Pass) -> None:
        """Add a call to what the generation cost. members int64 [m]: the texts, each once."""
        tokens = (now.slots < self.canvas.slots).sum(1)
        work = (tokens * self.facts.layers).double() if now.work is None else now.work
        self.tally.evaluations[members] += 1
        self.tally.tokens.index_add_(0, now.members, tokens)
        self.tally.layers.index_add_(0, now.members, work)

    # --- decisions ----------------------------------------------------------------------------------

    def choose(self, scores: Scores, canvas: Canvas) -> Tensor:
        """What the commit rule writes, bool [B, L]: at least one slot of every text that has one."""
        return at_least(None, self.rule.select(scores, canvas) & scores.among(canvas), scores, canvas)

    def _finish(self, was: Tensor) -> None:
        """Cut texts that are over, and let the others go on to their next block."""
        canvas = self.canvas
        end = self.end.ends(canvas, self.scores) if self.end is not None else None
        if end is not None:
            canvas.cut(end, self.facts.pad_id)
        moved = self.blocks.slide(canvas)
        if moved is not None:
            canvas.move(was & canvas.masked.any(1), moved, self.blocks.outer(canvas, moved))
        self._advance(was)

    def _advance(self, was: Tensor) -> None:
        canvas = self.canvas
        holds = self.revise.holds(canvas) if self.revise is not None else None
        stays, more = canvas.eligible.any(1), canvas.masked.any(1)
        if holds is not None:
            stays = stays | holds
        span = self.blocks.next(canvas)
        canvas.enter(was & ~stays & more, span, self.blocks.outer(canvas, span))
        canvas.open = was & (stays | more)
