"""Two drafters, one tree: the second is asked where the first knows little."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.errors import RecipeError, UsageError
from hasten.samplers.decode.proposal import Proposal, nothing
from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Outcome, Prefill


class Mixed(Drafter):
    """`first`, and in rows where its drafts are expected to give fewer than `least` tokens (the sum of its scores) `second`
    beside it, with the nodes that are left: look-up where the text repeats itself, a small model elsewhere. A node's `source`
    says who made it.

    As the proposal trees of several drafters in SpecInfer (arXiv 2305.09781), but the second costs nothing where the first
    knows enough.
    """

    kind: ClassVar[str] = "mixed"
    first: Drafter
    second: Drafter
    nodes: int = Field(16, ge=1)
    least: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _no_third(self) -> Mixed:
        if isinstance(self.first, Mixed) or isinstance(self.second, Mixed):
            raise RecipeError("mixed: a part of it is a mixture itself. Name two drafters.")
        return self

    @property
    def shape(self) -> Literal["tree", "chain"]:
        return "tree"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # what both need
        return self.first.needs | self.second.needs

    def start(self, facts: Facts) -> DrafterState:
        return _MixedState(self, facts)


class _MixedState(DrafterState):
    def __init__(self, drafter: Mixed, facts: Facts) -> None:
        self.drafter = drafter
        self.first, self.second = drafter.first.start(facts), drafter.second.start(facts)

    def begin(self, prefill: Prefill, context: Context) -> None:
        self.first.begin(prefill, context)
        self.second.begin(prefill, context)

    def observe(self, outcome: Outcome, context: Context) -> None:
        self.first.observe(outcome, context)
        self.second.observe(outcome, context)

    def reading(self, proposal: Proposal) -> AbstractContextManager[None]:
        stack = ExitStack()
        for each in (self.first, self.second):
            stack.enter_context(each.reading(proposal))
        return _Left(stack)

    def propose(self, context: Context, nodes: int) -> Proposal:
        """Waits for the device, to know what the first one found."""
        first = self.first.propose(context, min(nodes, self.drafter.first.nodes))
        score = first.verified.float() if first.score is None else first.score * first.verified
        found = torch.stack([first.verified.sum(1).float(), score.sum(1)]).tolist()
        asked = [
            active and expected < self.drafter.least and number < nodes
            for active, number, expected in zip(context.active, *found, strict=True)
        ]
        if not any(asked):
            return first
        left = nodes - int(min(number for number, here in zip(found[0], asked, strict=True) if here))
        second = self.second.propose(replace(context, active=asked), min(left, self.drafter.second.nodes))
        return together(first, second, nodes)


class _Left(AbstractContextManager[None]):
    """Leaves what was entered."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        self.stack.close()


def together(first: Proposal, second: Proposal, nodes: int) -> Proposal:
    """Both trees below one root, the first one's nodes first; at most `nodes` drafts, of a row that has more the last ones go
    (they were drawn last, so that the others' laws stay true).

    Raises `UsageError` where both have laws or one has prompt nodes, which cannot be told apart afterwards.
    """
    if first.size == 1 and first.law == "point" or second.size == 1 and second.law == "point":
        whole = second if first.size == 1 else first
        return whole if whole.size > 1 else nothing(first.tokens[:, 0])
    if "point" not in (first.law, second.law):
        raise UsageError("mixed: both drafters draw their tokens. Let one of them propose points, as look-up does.")
    if first.prompt is not None or second.prompt is not None:
        raise UsageError("mixed: a drafter with prompt nodes cannot be joined with another one. Take it alone.")
    return _packed(_beside(first, second), nodes)


def _beside(first: Proposal, second: Proposal) -> Proposal:
    """The second one's nodes behind the first one's."""
    law = first if first.law != "point" else second
    shift = first.size - 1

    def cat(name: str, other: float) -> Tensor:
        one, two = (_filled(each, name, other) for each in (first, second))
        return torch.cat([one, two[:, 1:]], 1)

    parent = torch.cat([first.parent, torch.where(second.parent > 0, second.parent + shift, second.parent)[:, 1:]], 1)
    source = cat("source", 0)
    source[:, first.size :] += len(first.sources)
    slot = cat("_slot", -1).long()
    slot[:, :1] = _filled(law, "_slot", -1)[:, :1]  # the root's law is that of the one who draws
    return replace(
        law, tokens=cat("tokens", 0), parent=parent, valid=cat("valid", 0), score=cat("score", 1.0), source=source,
        sources=(*first.sources, *second.sources), drawn=cat("drawn", 0).bool() if law.law != "point" else None,
        _slot=slot if law.law != "point" else None,
    )  # fmt: skip


def _filled(proposal: Proposal, name: str, other: float) -> Tensor:
    found: Tensor | None = getattr(proposal, name)
    return torch.full_like(proposal.tokens, other, dtype=torch.float32 if name == "score" else None) if found is None else found


def _packed(proposal: Proposal, nodes: int) -> Proposal:
    """The valid nodes of every row first, and no more than `nodes` drafts."""
    order = torch.argsort((~proposal.valid).long(), dim=1, stable=True)
    place = torch.argsort(order, dim=1)
    order = order[:, : nodes + 1]
    parent = torch.where(proposal.parent < 0, proposal.parent, place.gather(1, proposal.parent.clamp(min=0)))
    found: dict[str, Any] = {
        name: None if (each := getattr(proposal, name)) is None else each.gather(1, order)
        for name in ("tokens", "valid", "score", "source", "drawn", "_slot")
    }
    return replace(proposal, parent=parent.gather(1, order), **found)
