"""Recipes of drafters that are made of the model itself, and of images that draft themselves. All are lossless.

every: draft in every round, also where goodput finds that it does not pay.
"""

from __future__ import annotations

from typing import Any

from hasten.drift import Drift
from hasten.pipelines.decode_own.diffusion_draft import DiffusionDraft
from hasten.pipelines.decode_own.masks import Masks
from hasten.pipelines.decode_own.own_model import OwnModel
from hasten.pipelines.recipes.decode import _pace
from hasten.recipe import Recipe
from hasten.samplers.decode.pace import Average, Steady
from hasten.samplers.drafters_own.medusa import Medusa
from hasten.samplers.drafters_own.prompts import Prompts
from hasten.samplers.drafters_own.same_noise import SameNoise
from hasten.samplers.drafters_own.skip import ByPlace, FeedForward, Layers, Routers
from hasten.samplers.drafters_own.speculative_jacobi import SpeculativeJacobi
from hasten.sparse_attn.text.causal import CausalAttention
from hasten.sparse_attn.text.pages import Pages


def medusa(path: str = "student", nodes: int = 12, tree: Any = "ranked", every: bool = False) -> Recipe:
    """Medusa: heads that `hasten train medusa` left in the folder `path` draft a tree."""
    return Recipe(draft=Medusa(path=path, nodes=nodes, tree=tree), pace=_pace(every), paper="Medusa, arXiv 2401.10774")


def ppd(path: str = "student", nodes: int = 30, drafts: int = 6, every: bool = True) -> Recipe:
    """PPD: prompt tokens that `hasten train ppd` left in the folder `path`, behind likely ends of what is accepted."""
    return Recipe(draft=Prompts(path=path, nodes=nodes, drafts=drafts), pace=_pace(every), paper="PPD, arXiv 2405.18628")


def gated_mtp(path: str = "student", nodes: int = 24, masks: int = 3, every: bool = True) -> Recipe:
    """Gated multi-token prediction: masks under the adapter that `hasten train mtp` left in the folder `path`."""
    return Recipe(
        draft=Masks(path=path, nodes=nodes, masks=masks), pace=_pace(every), paper="Samragh et al., arXiv 2507.11851"
    )


def layer_skip(layers: int = 2, nodes: int = 4, sure: float = 0.4, every: bool = False) -> Recipe:
    """Self-speculation by the first layers: an early exit drafts, all layers verify. `hasten train sorted-exits` makes exits good."""
    return Recipe(
        draft=OwnModel(skip=Layers(first=layers), nodes=nodes, sure=sure), pace=_pace(every),
        paper="LayerSkip, arXiv 2404.16710; Sorted LLaMA, arXiv 2309.08968",
    )  # fmt: skip


def skip_decode(most: float = 0.8, fewest: float = 0.4, length: int = 512, nodes: int = 4, every: bool = False) -> Recipe:
    """SkipDecode as a drafter: the later a token, the fewer layers draft it; all layers verify."""
    skip = ByPlace(most=most, fewest=fewest, length=length)
    return Recipe(draft=OwnModel(skip=skip, nodes=nodes), pace=_pace(every), paper="SkipDecode, arXiv 2307.02628")


def first_routers(path: str = "student", nodes: int = 4, every: bool = False) -> Recipe:
    """FiRST as a drafter: routers of `hasten train first` choose the prompt's layers; all layers verify."""
    return Recipe(draft=OwnModel(skip=Routers(path=path), nodes=nodes), pace=_pace(every), paper="FiRST, arXiv 2410.12513")


def ffn_skip(limit: float = 0.05, skips: int = 2, cold: float = 0.2, nodes: int = 4, every: bool = False) -> Recipe:
    """FFN-SkipLLM as a drafter: feed-forward blocks are left out where the last one changed little; the whole model verifies."""
    rule = Drift(limit=limit, accumulate=False, max_skips=skips, warmup=cold, tail=cold)
    return Recipe(draft=OwnModel(skip=FeedForward(rule=rule), nodes=nodes), pace=_pace(every), paper="FFN-SkipLLM, arXiv 2404.03865")


def triforce(budget: int = 256, page: int = 8, nodes: int = 6, least: int = 1024, every: bool = False) -> Recipe:
    """TriForce's self-speculation: the draft reads the chunks of the cache that its query asks for, all of it verifies."""
    attention = CausalAttention(cache=Pages(page=page, top=max(1, budget // page), by="means"), min_tokens=least)
    return Recipe(draft=OwnModel(attention=attention, nodes=nodes), pace=_pace(every), paper="TriForce, arXiv 2404.11912")


def diffuspec(model: str = "tiny-dllm", nodes: int = 8, masks: int = 6) -> Recipe:
    """DiffuSpec: a text diffusion model drafts a block in one evaluation; its length follows what was accepted."""
    return Recipe(draft=DiffusionDraft(model=model, nodes=nodes, masks=masks), pace=Average(), paper="DiffuSpec, arXiv 2510.02358")


def speculative_jacobi(window: int = 16, row: int = 1, noise: Any = "coupled") -> Recipe:
    """Speculative Jacobi decoding, for images: a window of guesses drafts itself. row: tokens of a row of the image."""
    verify = SameNoise() if noise == "same" else None
    return Recipe(
        draft=SpeculativeJacobi(nodes=window, row=row, noise=noise), verify=verify, pace=Steady(),
        paper="SJD, arXiv 2410.01699; coupled guesses: arXiv 2510.24211",
    )  # fmt: skip
