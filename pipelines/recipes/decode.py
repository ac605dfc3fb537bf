"""Recipes of autoregressive decoding: who drafts, how drafts are verified, and how many are tried.

All are lossless unless the name of their verifier says otherwise. Where no verifier is named it is the one that suits the
drafts; where no pace is, it is goodput.
"""

from __future__ import annotations

from hasten.pipelines.decode.drafters_candidates import Candidates
from hasten.pipelines.decode.drafters_small import SmallModel
from hasten.recipe import Pacing, Recipe
from hasten.samplers.decode import verify_law, verify_lossy  # noqa: F401  # no recipe of a name has them; files name their kinds
from hasten.samplers.decode.pace import Goodput, Steady
from hasten.samplers.drafters.copy_input import Copy
from hasten.samplers.drafters.jacobi import Jacobi
from hasten.samplers.drafters.look_up import LookUp
from hasten.samplers.drafters.mixed import Mixed
from hasten.samplers.drafters.tri_gram import TriGram
from hasten.samplers.drafters.trie import Trie


def _pace(every: bool) -> Pacing:
    return Steady() if every else Goodput()


def look_up(nodes: int = 10, longest: int = 8, width: int = 10, every: bool = False) -> Recipe:
    """Prompt look-up: what most often followed these tokens before, as a small tree.

    every: draft in every round, also where it does not pay.
    """
    return Recipe(
        draft=LookUp(nodes=nodes, longest=longest, width=width), pace=_pace(every),
        paper="prompt look-up decoding (Saxena 2023); goodput of SmartSpec, arXiv 2406.14066",
    )  # fmt: skip


def lookahead_trie(nodes: int = 16, branch: int = 12, keep: bool = False, every: bool = False) -> Recipe:
    """A trie of what was read and written, pruned to its most frequent branches; kept between calls if asked.

    every: draft in every round, also where it does not pay.
    """
    return Recipe(
        draft=Trie(nodes=nodes, branch=branch, keep=keep), pace=_pace(every), paper="Lookahead of PIA, arXiv 2312.12728"
    )


def aded(nodes: int = 16, rate: float = 0.7, keep: bool = False, every: bool = False) -> Recipe:
    """A tri-gram matrix that moves towards what the model thinks, searched for drafts.

    every: draft in every round, also where it does not pay.
    """
    return Recipe(draft=TriGram(nodes=nodes, rate=rate, keep=keep), pace=_pace(every), paper="ADED, arXiv 2407.12021")


def aggressive(nodes: int = 16, width: int = 2, every: bool = False) -> Recipe:
    """Copies the prompt, and finds the place again where the model left it; for corrections and edits.

    every: draft in every round, also where it does not pay.
    """
    return Recipe(draft=Copy(nodes=nodes, width=width), pace=_pace(every), paper="Aggressive Decoding, arXiv 2205.10350")


def jacobi(nodes: int = 12, window: int = 6, pool: int = 3, every: bool = False) -> Recipe:
    """A window of guesses that the model corrects at once, and the runs that came up on the way.

    every: draft in every round, also where it does not pay.
    """
    return Recipe(
        draft=Jacobi(nodes=nodes, window=window, pool=pool), pace=_pace(every),
        paper="Jacobi decoding, arXiv 2305.10427; lookahead decoding, arXiv 2402.02057",
    )  # fmt: skip


def speculative(model: str = "tiny-draft", nodes: int = 5, above: float = 0.0, every: bool = False) -> Recipe:
    """A small model drafts a chain; model is a bundled one's name or a folder.

    above: a draft that the small model believes less in ends the chain. every: draft in every round, also where it does not pay.
    """
    return Recipe(
        draft=SmallModel(model=model, nodes=nodes, width=1, depth=nodes, above=above), pace=_pace(every),
        paper="speculative decoding, arXiv 2211.17192 and arXiv 2302.01318",
    )  # fmt: skip


def dyspec(
    model: str = "tiny-draft", nodes: int = 12, width: int = 3, depth: int = 5, above: float = 0.01, every: bool = False
) -> Recipe:
    """A small model drafts a tree that grows where it most probably stands.

    above: drafts that the small model believes less in are left out. every: draft in every round, also where it does not pay.
    """
    return Recipe(
        draft=SmallModel(model=model, nodes=nodes, width=width, depth=depth, above=above), pace=_pace(every),
        paper="DySpec, arXiv 2410.11744",
    )  # fmt: skip


def look_up_or_draft(model: str = "tiny-draft", nodes: int = 12, least: float = 1.0, every: bool = False) -> Recipe:
    """Look-up, and a small model's tree beside it where look-up expects fewer than `least` tokens.

    every: draft in every round, also where it does not pay.
    """
    return Recipe(
        draft=Mixed(first=LookUp(nodes=nodes, shortest=1, width=2), second=SmallModel(model=model), nodes=nodes, least=least),
        pace=_pace(every), paper="several drafters as in SpecInfer, arXiv 2305.09781",
    )  # fmt: skip


def candidates(which: str = "prompt-lookup", model: str = "tiny-draft", nodes: int = 10, every: bool = False) -> Recipe:
    """transformers' own candidate generators, in batches and with our pace: prompt-lookup, assisted or mtp.

    every: draft in every round, also where it does not pay.
    """
    draft = Candidates.model_validate({"which": which, "model": model, "nodes": nodes})
    return Recipe(draft=draft, pace=_pace(every), paper="the generators of transformers' assisted decoding")
