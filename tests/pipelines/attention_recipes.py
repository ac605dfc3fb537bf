"""Recipes of the attention axis at the sizes of tests: everything read, and a part of it."""

from __future__ import annotations

from typing import Any

from hasten.recipe import Recipe
from hasten.sparse_attn.layouts.layout import Identity
from hasten.sparse_attn.layouts.tree import Tree
from hasten.sparse_attn.pattern import Pattern
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.scorers.pooled import Centroid, Pooled
from hasten.sparse_attn.selectors.top import All, TopK
from hasten.sparse_attn.stand_ins.compensate import Compensate

SMALL: dict[str, Any] = {"warm": 0.0, "min_tokens": 0, "block_m": 16, "block_n": 16}
"""Sparse from the first step on, whatever the number of tokens."""

FULL = Recipe(
    name="full", attention=SparseAttention(patterns=(Pattern(layout=Tree(block=4), score=Pooled(), select=All()),), **SMALL)
)
"""Every key is read, in an order of its own for each head: dense attention by the sparse way."""

PART = Recipe(
    name="part",
    attention=SparseAttention(
        patterns=(Pattern(layout=Identity(block=4), score=Pooled(), select=TopK(share=0.4)),), **SMALL
    ),
)
"""Two fifths of the blocks are read, the rest is dropped."""

STOOD_FOR = Recipe(
    name="stood-for",
    attention=SparseAttention(
        patterns=(Pattern(layout=Identity(block=4), score=Centroid(), select=TopK(share=0.4)),),
        compensate=Compensate(),
        **SMALL,
    ),
)
"""Two fifths are read, means stand in for the rest."""


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other settings of its attention."""
    assert recipe.attention is not None
    return Recipe(name=recipe.name, attention=recipe.attention.model_copy(update=changes))
