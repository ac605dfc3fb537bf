"""Prompt look-up: what followed the last few tokens when they stood in the text before."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from hasten.errors import RecipeError
from hasten.samplers.decode.protocols import Drafter, DrafterState, Facts
from hasten.samplers.drafters.contexts import Contexts
from hasten.samplers.drafters.host_tree import HostState, HostTree, best_first


class LookUp(Drafter):
    """What followed the row's last tokens before, ranked by how often, as a tree (prompt look-up decoding; suffix decoding,
    arXiv 2411.04975).

    longest, shortest: tokens of a suffix that are looked for; 0: where none stood before, what the text was made of of late. The longest suffix that occurs before has most to say, shorter
    ones what is left (`Contexts.after`), and drafted tokens are part of the suffix, so that a loop is drafted as a loop.
    fade: 1 ranks by how often a token followed, 0 takes the latest occurrence alone, in between recent ones count more.
    width: children of a node at most; 1 is a chain. nodes: of the tree, the most probable ones.

    Differs from transformers' prompt look-up, which takes the earliest occurrence of at most 2 tokens, for one row, as a
    chain that ends with the text; and from suffix decoding in that chances are blended from suffixes of all lengths.
    """

    kind: ClassVar[str] = "look-up"
    weighs: ClassVar[bool] = True
    nodes: int = Field(10, ge=1)
    longest: int = Field(8, ge=1)
    shortest: int = Field(0, ge=0)
    width: int = Field(10, ge=1)
    fade: float = Field(0.8, ge=0, le=1)

    @model_validator(mode="after")
    def _in_order(self) -> LookUp:
        if self.shortest > self.longest:
            raise RecipeError(f"look-up: shortest={self.shortest} is longer than longest={self.longest}. Exchange them.")
        return self

    @property
    def shape(self) -> Literal["tree", "chain"]:
        return "chain" if self.width == 1 else "tree"

    def start(self, facts: Facts) -> DrafterState:
        return _LookUpState(self, facts.rows).weighed(self, facts)


class _LookUpState(HostState):
    sources = ("look-up",)

    def __init__(self, drafter: LookUp, rows: int) -> None:
        self.drafter = drafter
        self.contexts = [Contexts(drafter.shortest, drafter.longest, drafter.fade) for _ in range(rows)]

    def grow(self, row: int, text: list[int], tree: HostTree) -> None:
        contexts, tail, width = self.contexts[row], text[-self.drafter.longest :], self.drafter.width
        contexts.read(text)
        best_first(tree, lambda path: contexts.after(tail + path, width))
