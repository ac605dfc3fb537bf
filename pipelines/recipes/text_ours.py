"""Our own recipes of text diffusion: found on tuning questions of tiny-dllm, measured on others (docs/dllm-bench.md)."""

from __future__ import annotations

from hasten.caching.kv import Recompute
from hasten.caching.kv_echo import Echo
from hasten.pipelines.recipes.text import eb_sampler, freedave
from hasten.recipe import Recipe
from hasten.samplers.text_blocks import Fixed, InBlocks
from hasten.samplers.text_ends import AtPredictedEnd


def echo_cache(often: int = 4, every: int | None = None) -> Recipe:
    """Ours: computed again are open slots, what was just written, and where the text has these tokens already."""
    return Recipe(kv=Echo(often=often, every=every))


def text_exact(most: int = 4) -> Recipe:
    """Exactly the text of sequential decoding, in fewer evaluations: drafts that are verified, nothing approximate."""
    return freedave(most) | Recipe(kv=Recompute())


def text_balanced(bound: float = 0.1, size: int = 32) -> Recipe:
    """Ours: an entropy bound, the echo cache, and ends that are cut when two slots behind agree."""
    return _with_echo(bound, size)


def text_fast(bound: float = 0.3, size: int = 32) -> Recipe:
    """Ours: as `text-balanced`, with a wider entropy bound."""
    return _with_echo(bound, size)


def _with_echo(bound: float, size: int) -> Recipe:
    blocks = InBlocks(rule=Fixed(size=size), end=AtPredictedEnd(steps=1, run=2))
    return Recipe(commit=eb_sampler(bound).commit, blocks=blocks, kv=Echo(), paper="EB-Sampler, arXiv 2505.24857")
