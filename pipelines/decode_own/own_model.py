"""Self-speculation: the model drafts for itself with layers, feed-forward blocks or keys left out, and the whole of it verifies.

The draft's keys and values are scratch: layers that saw another input than they will when verified have written them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hasten.errors import RecipeError
from hasten.samplers.decode.protocols import Drafter, DrafterState, Facts
from hasten.samplers.drafters_own.skip import Skip
from hasten.sparse_attn.text.causal import CausalAttention


class OwnModel(Drafter):
    """The model itself, with less to do (self-speculative decoding, Zhang et al., arXiv 2309.08168; LayerSkip, arXiv 2404.16710).

    skip: layers or feed-forward blocks that are left out. attention: which keys of the cache the draft reads, for one row (with
    more of them, of different lengths, a draft reads all keys). sure: a draft of less chance than this is the last of its row.
    """

    kind: ClassVar[str] = "own-model"
    nodes: int = Field(4, ge=1)
    skip: Skip | None = None
    attention: CausalAttention | None = None
    sure: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_something_out(self) -> OwnModel:
        if self.skip is None and self.attention is None:
            raise RecipeError("own-model: the draft would cost what the model costs. Give skip, attention or both.")
        return self

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # of a part that reads a file, known when it is read
        return frozenset() if self.skip is None else self.skip.needs

    @property
    def shape(self) -> Literal["tree", "chain"]:
        return "chain"

    def start(self, facts: Facts) -> DrafterState:
        from hasten.pipelines.decode_own.own_state import (
            OwnModelState,  # transformers is asked for when it drafts
        )

        return OwnModelState(self, facts)
