"""Speculative Jacobi decoding: a window of guesses is read at once, and what the model says behind each is the law of the next
guess in that place. No other model and no training; for images, whose tokens have many equally good values.

Shapes: B rows, W places of the window, V tokens.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.samplers.decode.proposal import Proposal, nothing
from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Outcome
from hasten.samplers.decode.tree import Tree
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
        drawn = self.facts.sampled and self.shared is None
        tree = Tree(context.last, law="iid" if drawn else "point", warp=self.facts.warp, sources=(self.part.kind,))
        node = torch.zeros_like(context.last)[:, None]
        fill = self._fill(context, steps)
        for step in range(1, steps + 1):
            logits, at, there = self._said(step, fill[:, step - 1])
            laws = tree.know(node, logits)
            room = usable(context, torch.full_like(node, step))
            if drawn and self._coupled:
                assert self.seen is not None
                node = tree.redraw(node, self.seen.proposal, at, there, room)
            elif drawn:
                node = tree.draw(node, 1, room)
            elif self.shared is not None:
                tokens = self.shared.draw(laws.log(), torch.full_like(node, step - 1))
                node = tree.add(node, tokens, room, laws.gather(-1, tokens[..., None])[..., 0])
            else:
                node = tree.top(node, 1, room)
        return tree.proposal()

    def observe(self, outcome: Outcome, context: Context) -> None:
        self.seen = outcome

    @property
    def _coupled(self) -> bool:
        """Are there draws of the last round to keep?"""
        return self.part.noise == "coupled" and self.seen is not None and self.seen.proposal.size > 1

    def _said(self, step: int, fill: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the place `step` behind the last token: logits [B, 1, V], by the model where the last window reached it, else for
        `fill` int64 [B] alone; the node int64 [B, 1] that was guessed there, and whether there is one, bool [B, 1].

        The accepted path ends at node n; the token behind it is written. The model's word on what comes `step` later stands behind
        node n + step, which was guessed where that token, or a later one, now is.
        """
        own = torch.full((len(fill), self.facts.vocabulary), NEVER, device=fill.device).scatter(1, fill[:, None], 0.0)
        none = torch.zeros_like(fill)[:, None]
        if self.seen is None:
            return own[:, None], none, none.bool()
        proposal, logits = self.seen.proposal, self.seen.logits
        behind = last_node(self.seen)[:, None] + step
        reached = (behind < proposal.size) & proposal.valid.gather(1, behind.clamp(max=proposal.size - 1))
        rows = torch.arange(len(fill), device=fill.device)
        said = logits[rows, behind[:, 0].clamp(max=proposal.size - 1)].float()
        at = (behind + 1).clamp(max=proposal.size - 1)
        return torch.where(reached, said, own)[:, None], at, reached & (behind + 1 < proposal.size)

    def _fill(self, context: Context, steps: int) -> Tensor:
        """The last `row` tokens of each text, over and over, int64 [B, steps]."""
        rows = []
        for text in context.texts:
            above = text[-self.part.row :]
            rows.append([above[step % len(above)] for step in range(steps)])
        return torch.tensor(rows, device=context.last.device)
