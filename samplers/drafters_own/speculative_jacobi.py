"""Speculative Jacobi decoding: a window of guesses is read at once, and what the model says behind each is the law of the next
guess in that place. No other model and no training; for images, whose tokens have many equally good values.

Shapes: B rows, W places of the window, V tokens.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.samplers.decode.line import Line
from hasten.samplers.decode.proposal import Proposal, nothing
from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Outcome
from hasten.samplers.drafters_own.same_noise import PlaceNoise
from hasten.samplers.drafters_own.trees import last_node, usable

NEVER = -1e9
"""Logit of what is not guessed; finite, as processors take differences."""


class SpeculativeJacobi(Drafter):
    """A guess at place i is drawn from what the model said there in the last round, behind guesses that may have been wrong (Teng et
    al., arXiv 2410.01699). It is accepted with min(1, p / q), where q is the law it was drawn from; so texts follow the model's law.

    noise: how the guesses of two rounds hang together. "fresh": not at all, as in the paper. "coupled": a guess stays as often as
    both laws allow (maximal coupling, arXiv 2510.24211). "same": each place has its own noise, and the verifier has to be
    `same-noise`; then accepted is what does not change. nodes: places of the window. row: tokens of a row of the image; places
    that nobody has said anything of are guessed like those above them (1: like the last token).

    All places are guessed at once. Processors that look at the prefix see the last round's guesses in it.
    """

    kind: ClassVar[str] = "speculative-jacobi"
    nodes: int = Field(16, ge=1)
    noise: Literal["fresh", "coupled", "same"] = "coupled"
    row: int = Field(1, ge=1)

    @property
    def shape(self) -> Literal["tree", "chain"]:
        return "chain"

    def start(self, facts: Facts) -> DrafterState:
        return _JacobiState(self, facts)


class _JacobiState(DrafterState):
    def __init__(self, part: SpeculativeJacobi, facts: Facts) -> None:
        self.part, self.facts = part, facts
        self.shared = PlaceNoise.of(facts) if part.noise == "same" and facts.sampled else None
        self.seen: Outcome | None = None

    def propose(self, context: Context, nodes: int) -> Proposal:
        steps = min(nodes, context.reach)
        if steps < 1:
            return nothing(context.last)
        fill = self._fill(context, steps)
        logits, at, there = self._said(fill)
        place = torch.arange(steps, device=fill.device).expand_as(fill)
        assumed = fill if self.seen is None else torch.where(there, self.seen.proposal.tokens.gather(1, at), fill)
        line = Line(context.last, logits, usable(context, place + 1), self.facts.warp, assumed, self.part.kind)
        if not self.facts.sampled:
            return line.best()
        if self.shared is not None:
            return line.points(self.shared.draw(line.laws.log(), place))
        if self.part.noise == "coupled" and self.seen is not None and self.seen.proposal.size > 1:
            return line.redrawn(self.seen.proposal, at, there)
        return line.drawn()

    def observe(self, outcome: Outcome, context: Context) -> None:
        self.seen = outcome

    def _said(self, fill: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each place: logits [B, W, V], by the model where the last window reached it, else for `fill` int64 [B, W] alone; the node
        int64 [B, W] that was guessed there, and whether there is one, bool [B, W].

        The accepted path ends at node n; the token behind it is written. The model's word on what comes `step` later stands behind
        node n + step, which was guessed where that token, or a later one, now is.
        """
        own = torch.full((*fill.shape, self.facts.vocabulary), NEVER, device=fill.device).scatter(2, fill[..., None], 0.0)
        if self.seen is None:
            return own, torch.zeros_like(fill), torch.zeros_like(fill).bool()
        proposal, logits = self.seen.proposal, self.seen.logits
        last = proposal.size - 1
        behind = last_node(self.seen)[:, None] + 1 + torch.arange(fill.shape[1], device=fill.device)
        reached = (behind <= last) & proposal.valid.gather(1, behind.clamp(max=last))
        rows = torch.arange(len(fill), device=fill.device)[:, None]
        said = logits[rows, behind.clamp(max=last)].float()
        return torch.where(reached[..., None], said, own), (behind + 1).clamp(max=last), reached & (behind < last)

    def _fill(self, context: Context, steps: int) -> Tensor:
        """The last `row` tokens of each text, over and over, int64 [B, steps]."""
        rows = []
        for text in context.texts:
            above = text[-self.part.row :]
            rows.append([above[step % len(above)] for step in range(steps)])
        return torch.tensor(rows, device=context.last.device)
