"""Parallel prompt tokens as a drafter (PPD): trained embeddings behind likely ends of the accepted path say later tokens.

Shapes: B rows, P distances, E members of an ensemble, C channels, V tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hasten.samplers.decode.proposal import Proposal, nothing
from hasten.samplers.decode.protocols import Context, DrafterState, Facts, Outcome
from hasten.samplers.drafters_own.asked import Asked, split, with_questions
from hasten.samplers.drafters_own.student import Student
from hasten.samplers.drafters_own.trees import ranked


class Prompts(Student):
    """Embeddings of `hasten train ppd` (arXiv 2405.18628): prompt token i behind a place says the token i + 1 places on.

    drafts: verified nodes of a round at most; the other `nodes` ask. width: guesses for each place. ensemble: of the trained
    members that are asked, None for all. Differs: the paper finds its trees once, by simulation; here each round puts prompt
    tokens behind the ends that are likeliest in it.
    """

    kind: ClassVar[str] = "prompt-tokens"
    file: ClassVar[str] = "prompt_tokens.safetensors"
    training: ClassVar[str] = "ppd"
    nodes: int = Field(30, ge=1)
    drafts: int = Field(6, ge=1)
    width: int = Field(4, ge=1)
    ensemble: int | None = Field(None, ge=1)

    def start(self, facts: Facts) -> DrafterState:
        return _PromptsState(self, facts)


class _PromptsState(DrafterState):
    def __init__(self, part: Prompts, facts: Facts) -> None:
        self.part = part
        like: Any = facts.host.get_input_embeddings().weight
        whole = part.read()["weight"].to(like)
        part.fits(whole.shape[2], facts.host)
        self.vectors = whole[:, : part.ensemble]
        self.asked: Asked | None = None
        self.said: Tensor | None = None  # logits float32 [B, P, V] of the next places but one
        self.known: Tensor | None = None  # bool [B]: in which rows

    def propose(self, context: Context, nodes: int) -> Proposal:
        if context.reach < 1:
            return nothing(context.last)
        drafts, anchors, distances, members = split(nodes, self.vectors.shape[0], self.vectors.shape[1], self.part.drafts)
        made = self._drafts(context, drafts) if drafts else nothing(context.last)
        made, self.asked = with_questions(made, self.vectors[:distances, :members], anchors)
        return made

    def observe(self, outcome: Outcome, context: Context) -> None:
        self.said = self.known = None
        if self.asked is not None and outcome.proposal.prompt is not None:
            index, self.known = self.asked.behind(outcome)
            rows = torch.arange(len(index), device=index.device)[:, None, None]
            self.said = outcome.logits[rows, index].float().mean(2)
        self.asked = None

    def _drafts(self, context: Context, nodes: int) -> Proposal:
        if self.said is None or self.known is None:
            return nothing(context.last)
        chances, tokens = self.said.softmax(-1).topk(self.part.width, -1)
        chances = chances * self.known[:, None, None]

        def guess(step: int, before: Tensor) -> tuple[Tensor, Tensor]:
            wide = (-1, before.shape[1], -1)
            return tokens[:, step - 1, None].expand(*wide), chances[:, step - 1, None].expand(*wide)

        return ranked(context, guess, self.said.shape[1], nodes, self.part.kind)
