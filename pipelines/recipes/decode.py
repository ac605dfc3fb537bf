"""Recipes of autoregressive decoding: who drafts, and how drafts are verified. All are lossless unless their name says so."""

from __future__ import annotations

from hasten.recipe import Recipe
from hasten.samplers.drafters.look_up import LookUp


def look_up(nodes: int = 10, longest: int = 8, width: int = 2) -> Recipe:
    """Prompt look-up: what followed these tokens before, as a small tree."""
    return Recipe(
        draft=LookUp(nodes=nodes, longest=longest, width=width), paper="prompt look-up decoding, Saxena 2023; SmartSpec, arXiv 2406.14066"
    )
