"""Recipes of autoregressive decoding: who drafts, how drafts are verified, and how many are tried.

All are lossless unless the name of their verifier says otherwise. Where no verifier is named it is the one that suits the
drafts; where no pace is, it is goodput.
"""

from __future__ import annotations

from hasten.recipe import Pacing, Recipe
from hasten.samplers.decode.pace import Goodput, Steady
from hasten.samplers.drafters.look_up import LookUp


def _pace(every: bool) -> Pacing:
    return Steady() if every else Goodput()


def look_up(nodes: int = 10, longest: int = 8, width: int = 2, every: bool = False) -> Recipe:
    """Prompt look-up: what followed these tokens before, as a small tree.

    every: draft in every round, also where it does not pay.
    """
    return Recipe(
        draft=LookUp(nodes=nodes, longest=longest, width=width), pace=_pace(every),
        paper="prompt look-up decoding (Saxena 2023); goodput of SmartSpec, arXiv 2406.14066",
    )  # fmt: skip
