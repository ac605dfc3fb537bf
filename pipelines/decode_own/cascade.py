"""Three tiers (TriForce, arXiv 2404.11912): a cheap drafter, the model with less to do, the whole model."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hasten.errors import RecipeError
from hasten.pipelines.decode_own.own_model import OwnModel
from hasten.samplers.decode.protocols import Drafter, DrafterState, Facts


class Cascade(Drafter):
    """What `first` drafts is read by `middle` in one step, and what `middle` makes of it is drafted.

    first: a drafter of chains that goes by the text alone, such as look-up with width 1. middle: the model, with layers or keys
    left out. A draft of the first tier stays with min(1, p / q) of the middle's law p, and what replaces it comes from
    max(0, p - q), normalised; so the middle's drafts are draws from its own law, and recorded as such. (The released code of
    TriForce replaces from p, which writes other texts than the model's.)
    """

    kind: ClassVar[str] = "cascade"
    nodes: int = Field(6, ge=2)
    first: Drafter
    middle: OwnModel

    @model_validator(mode="after")
    def _chain(self) -> Cascade:
        if self.first.shape != "chain" or self.first.needs:
            raise RecipeError(
                f"cascade: first={self.first.kind!r} drafts trees, or needs more of the model than its text. Take one that drafts"
                " chains by the text, such as look-up with width=1."
            )
        return self

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # those of the middle, which may read a file
        return self.middle.needs

    @property
    def shape(self) -> Literal["tree", "chain"]:
        return "chain"

    def start(self, facts: Facts) -> DrafterState:
        from hasten.pipelines.decode_own.cascade_state import (
            CascadeState,  # transformers is asked for when it drafts
        )

        return CascadeState(self, facts)
