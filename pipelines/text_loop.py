"""The loop of text diffusion: look, plan, evaluate, score, write, revise, go on.

What every method must keep is kept here, once: each open text writes at least one slot per step, prompts are never
touched, mask tokens are never written, revisions cannot undo a step or go on for ever, and a text's tokens do not depend
on who else is in the batch (each has noise, blocks and caches of its own). The host waits for the device once per step.

Shapes: B texts, L slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hasten.caching.kv import Recompute, Rows, TokenKV
from hasten.caching.store import KVStore, Pass
from hasten.canvas import DONE, Canvas, Row
from hasten.errors import RecipeError, UsageError
from hasten.pipelines import text_pass
from hasten.pipelines.text_host import TextHost
from hasten.pipelines.text_pass import Wanted
from hasten.recipe import Recipe
from hasten.samplers.commit import Quota, Unmask
from hasten.samplers.revise import RevisePolicy
from hasten.samplers.scores import Draw, Logits, Scores, best, measure
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

        Raises `UsageError` where the commit rule wants a guide and there is none, and `RecipeError` where drafts are to
        be verified with a rule or score that remembers earlier evaluations.
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
        if recipe.verify is not None and commit.remembers:
            raise RecipeError(
                f"{recipe.verify.kind!r} checks drafts, which stand for steps that were not taken; {commit.rule.kind!r} with"
                f" {commit.score.kind!r} decides by steps that were. Take a rule without memory, or leave verify out."
            )
        self.blocks = blocks.rule.start(self.facts)
        self.end = blocks.end.start(self.facts) if blocks.end is not None else None
        self.kv = kv.start(self.facts, self.store)
        assert recipe.revise is None or isinstance(recipe.revise, RevisePolicy)
        assert recipe.verify is None or isinstance(recipe.verify, Verifier)
        self.revise = recipe.revise.start(self.facts) if recipe.revise is not None else None
        self.verify = recipe.verify.start(self.facts) if recipe.verify is not None else None
        self.budget = recipe.revise.budget if recipe.revise is not None else 0
        self.revised = torch.zeros_like(canvas.committed)
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
        with self.host.attached():
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
        if self.kv.ahead:
            planned = self.rule.planned(canvas, self.kv.ahead + 1)
            assert planned is not None
            self.kv.rank(self.scores.rank, planned, canvas)
        if self.guide is not None:
            proposed = torch.where(canvas.masked & self.scores.seen, self.scores.token, canvas.ids)
            self.scores.guide = self.guide(proposed, canvas)
        chosen = self._choose()
        canvas.write(chosen, self.scores.token, self.scores.confidence)
        self.score.note(chosen, self.scores, canvas)
        erased = self._revise(chosen)
        self.kv.changed(chosen, erased, canvas)
        canvas.step = canvas.step + was
        canvas.since = canvas.since + was
        self._finish(was)

    # --- evaluation ---------------------------------------------------------------------------------

    def _split(self, call: Rows, rows: list[Row]) -> list[Rows]:
        """With a verifier: texts at the first step of a block are evaluated as they are, the others as drafts."""
        if self.verify is None:
            return [call]
        fresh = [rows[member].since == 0 for member in call.members]
        if all(fresh) or not any(fresh):
            return [call]
        return [call.only([i for i, first in enumerate(fresh) if first is kind]) for kind in (True, False)]

    def _evaluate(self, call: Rows, rows: list[Row], before: Scores) -> None:
        canvas = self.canvas
        wanted = self._wanted(call, rows)
        members = torch.tensor(call.members, device=canvas.ids.device)
        if self.verify is not None and rows[call.members[0]].since > 0:
            self._verify(call, wanted, members, before)
            return
        now = text_pass.plain(call, canvas, wanted, self.facts, self.store)
        logits = Logits(self.evaluate(now, self.store), now.target, members)
        known = measure(logits, self.score, self.draw, self.forbidden, canvas, self.scores)
        self.rule.observe(known, canvas)
        self._count(members, now)
        self.kv.seen(call, canvas)

    def _verify(self, call: Rows, wanted: Wanted, members: Tensor, before: Scores) -> None:
        """Evaluate drafts of these texts, and make the right one of each the text."""
        canvas, verify = self.canvas, self.verify
        assert verify is not None
        drafts = verify.drafts(before, canvas)
        number = drafts.shape[1]
        many = canvas.take(torch.arange(len(canvas.ids), device=members.device).repeat_interleave(number))
        flat = drafts.flatten(0, 1)
        many.write(flat, before.token.repeat_interleave(number, 0), before.confidence.repeat_interleave(number, 0))
        texts = many.ids.view(len(canvas.ids), number, -1)
        now = text_pass.drafts(call, texts, canvas, wanted, self.facts, self.store)
        values = self.evaluate(now, self.store)
        each = values.view(len(members) * number, -1, values.shape[-1])
        copies = (members[:, None] * number + torch.arange(number, device=members.device)).flatten()
        scores = Scores.blank(many)
        draw = Draw(self.draw.seed.repeat_interleave(number), self.draw.temperature, self.draw.top_k, self.draw.top_p)
        measure(
            Logits(each, now.target.view(len(copies), -1), copies), self.score, draw, self.forbidden, many, scores
        )
        then = self._at_least_one(self.rule.select(scores, many), scores, many).view_as(drafts)
        right = verify.accept(drafts, texts, scores, then, canvas)
        mine = torch.arange(len(canvas.ids), device=members.device) * number + right
        taken = torch.zeros_like(canvas.open).index_fill(0, members, True)
        accepted = flat[mine] & taken[:, None]
        canvas.write(accepted, before.token, before.confidence)
        self.scores.merge(scores.take(mine), taken)
        self._count(members, now)
        self.kv.seen(replace(call, keep="scratch"), canvas)  # drafts leave nothing in the store
        self.kv.changed(accepted, torch.zeros_like(accepted), canvas)

    def _wanted(self, call: Rows, rows: list[Row]) -> Wanted:
        """Whose logits this call is asked for."""
        canvas = self.canvas
        mine = [rows[member] for member in call.members]
        rest = self.sees_rest or self.sees_rest_first and any(row.since == 0 for row in mine)
        slots = (canvas.masked & canvas.open[:, None]) if rest else canvas.eligible
        most = max(row.masks if rest else row.left for row in mine)
        if self.sees_written:
            slots = slots | canvas.active & (canvas.status == DONE)
            most += max(row.high - row.low for row in mine)
        return Wanted(slots, most)

    def _count(self, members: Tensor, now: Pass) -> None:
        tokens = (now.slots < self.canvas.slots).sum(1)
        self.tally.evaluations[members] += 1
        self.tally.tokens[members] += tokens
        self.tally.layers[members] += tokens * self.facts.layers if now.work is None else now.work

    # --- decisions ----------------------------------------------------------------------------------

    def _choose(self) -> Tensor:
        return self._at_least_one(self.rule.select(self.scores, self.canvas), self.scores, self.canvas)

    def _at_least_one(self, chosen: Tensor, scores: Scores, canvas: Canvas) -> Tensor:
        among = scores.among(canvas)
        chosen = chosen & among
        return chosen | best(scores.rank, among, (~chosen.any(1)).long())

    def _revise(self, chosen: Tensor) -> Tensor:
        """Take slots back; returns those whose token is no longer what it was, bool [B, L]."""
        canvas, scores = self.canvas, self.scores
        changed = torch.zeros_like(chosen)
        if self.revise is None:
            return changed
        asked = self.revise.revise(scores, chosen, canvas)
        may = (canvas.status == DONE) & canvas.active & ~chosen & (self.revised < self.budget)
        if asked.replace is not None and asked.token is not None:
            swap = asked.replace & may & (asked.token != canvas.ids)
            canvas.write(swap, asked.token, scores.confidence)
            changed |= swap
        if asked.erase is not None and self.facts.mask_id is not None:
            most = (chosen.sum(1) - 1).clamp(min=0)
            gone = best(-scores.present.nan_to_num(1.0), asked.erase & may & ~changed, most)
            canvas.erase(gone, self.facts.mask_id)
            changed |= gone
        self.revised = self.revised + changed
        return changed

    def _finish(self, was: Tensor) -> None:
        """Cut texts that are over, and let the others go on to their next block."""
        canvas = self.canvas
        end = self.end.ends(canvas, self.scores) if self.end is not None else None
        if end is not None:
            canvas.cut(end, self.facts.pad_id)
        self._advance(was)

    def _advance(self, was: Tensor) -> None:
        canvas = self.canvas
        holds = self.revise.holds(canvas) if self.revise is not None else None
        stays = canvas.eligible.any(1) if holds is None else canvas.eligible.any(1) | holds
        canvas.enter(was & ~stays & canvas.masked.any(1), self.blocks.next(canvas))
        canvas.open = was & (stays | canvas.masked.any(1))
