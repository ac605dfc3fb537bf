"""Recipes of caches for text diffusion, and of papers that are a cache and a way of decoding together.

Caches join with any way of decoding: "credit+dual-cache".
"""

from __future__ import annotations

from hasten.caching.kv import Dual, Prefix, Vicinity
from hasten.caching.kv_attention import AttentionDrift
from hasten.caching.kv_front import BlockCausal, Freeze, Nested
from hasten.caching.kv_rollout import Rollout
from hasten.caching.kv_scattered import Delayed, Groups
from hasten.caching.kv_suffix import SparseSuffix
from hasten.caching.kv_values import ValueDrift
from hasten.pipelines.recipes.text import sub_blocks, threshold
from hasten.recipe import Recipe
from hasten.samplers.commit import Threshold, Unmask
from hasten.samplers.text_blocks import InBlocks, Window


def prefix_cache(every: int | None = None) -> Recipe:
    """Fast-dLLM's prefix cache: what stands before the block is computed once per block."""
    return Recipe(kv=Prefix(every=every), paper="Fast-dLLM, arXiv 2505.22618")


def dual_cache(every: int | None = None) -> Recipe:
    """Fast-dLLM's dual cache: all but the block is computed once per block. every: again after so many steps (dInfer)."""
    return Recipe(kv=Dual(every=every), paper="Fast-dLLM, arXiv 2505.22618")


def vicinity_cache(before: int = 16, after: int = 16, warmup: int = 4) -> Recipe:
    """dInfer's cache: the block is computed with its neighbours."""
    return Recipe(kv=Vicinity(before=before, after=after, warmup=warmup), paper="dInfer, arXiv 2510.08666")


def dkv_cache(every: int = 8, reach: int | None = None) -> Recipe:
    """dKV-Cache: a token is kept from the step after it was written; a reach makes it greedy."""
    return Recipe(kv=Delayed(every=every, reach=reach), paper="dKV-Cache, arXiv 2505.15781")


def dllm_cache(prompt_every: int = 50, every: int = 7, share: float = 0.25) -> Recipe:
    """dLLM-Cache: prompt seldom, answer often, and in between the tokens whose values drift most."""
    return Recipe(
        kv=ValueDrift(prompt_every=prompt_every, every=every, share=share), paper="dLLM-Cache, arXiv 2506.06295"
    )


def value_cache(every: int = 7, share: float = 0.25) -> Recipe:
    """dLLM-Cache without a frozen prompt: of all tokens, those whose values drift most, and everything now and then."""
    return Recipe(kv=ValueDrift(prompt_every=None, every=every, share=share), paper="dLLM-Cache, arXiv 2506.06295")


def d2_cache(most: int = 32, spread: float = 10.0, mass: float = 0.1, gap: int = 4) -> Recipe:
    """d2Cache: open slots near what is known, and the tokens that attention flows to."""
    return Recipe(kv=Rollout(most=most, spread=spread, mass=mass, gap=gap), paper="d2Cache, arXiv 2509.23094")


def dpad(window: int = 128, decay: float = 3.0) -> Recipe:
    """DPad: the prefix cache, and of what follows the block fewer slots the farther away they are."""
    return Recipe(kv=SparseSuffix(window=window, decay=decay), paper="DPad, arXiv 2508.14148")


def free_cache() -> Recipe:
    """FreeCache: prompt and finished blocks are frozen."""
    return Recipe(kv=Freeze(), paper="FlashDLM, arXiv 2505.21467")


def elastic_cache(below: float = 0.9, wait: bool = False) -> Recipe:
    """Elastic-Cache's cache: deep layers are computed again when the attention of the most attended token drifts."""
    return Recipe(kv=AttentionDrift(below=below, wait=wait), paper="Elastic-Cache, arXiv 2510.14973")


def exact_cache() -> Recipe:
    """The exact cache of block-causal models, without an evaluation of its own for finished blocks."""
    return Recipe(kv=BlockCausal(), paper="BD3-LM, arXiv 2503.09573")


def group_cache(local: int = 1, full: int = 8) -> Recipe:
    """ReCAP's reuse: one evaluation of everything chooses what the next ones write. Join it with a quota."""
    return Recipe(kv=Groups(local=local, full=full), paper="ReCAP, arXiv 2505.19089")


def fast_dllm(above: float = 0.9, size: int = 32) -> Recipe:
    """Fast-dLLM: sure slots together, and the dual cache."""
    return threshold(above, size) | Recipe(kv=Dual())


def fast_dllm_v2(above: float = 0.9, size: int = 32, inner: int = 8) -> Recipe:
    """Fast-dLLM v2: blocks kept exactly on block-causal models, and within a block the dual cache of its parts."""
    return sub_blocks(above, size, inner) | Recipe(kv=Nested())


def elastic(above: float = 0.9, below: float = 0.9, size: int = 16) -> Recipe:
    """Elastic-Cache: the leftmost open slots, sure ones together, and layers computed again when attention drifts."""
    return Recipe(
        commit=Unmask(rule=Threshold(above=above)),
        blocks=InBlocks(rule=Window(size=size)),
        kv=AttentionDrift(below=below),
        paper="Elastic-Cache, arXiv 2510.14973",
    )
