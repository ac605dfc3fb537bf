"""Our own recipes of text diffusion: found on tuning questions of tiny-dllm, measured on others (docs/dllm-bench.md)."""

from __future__ import annotations

from hasten.caching.kv import Recompute
from hasten.caching.kv_echo import Echo
from hasten.pipelines.recipes.text import freedave
from hasten.recipe import Recipe
from hasten.samplers.commit import Either, Threshold, Unmask
from hasten.samplers.commit_sure import EntropyBound
from hasten.samplers.text_blocks import Fixed, InBlocks
from hasten.samplers.text_ends import AtPredictedEnd


def echo_cache(often: int = 4, every: int | None = None) -> Recipe:
    """Ours: computed again are open slots, what was just written, and where the text has these tokens already."""
    return Recipe(kv=Echo(often=often, every=every))


def text_exact(most: int = 4) -> Recipe:
    """Exactly the text of sequential decoding, in fewer evaluations: drafts that are verified, nothing approximate."""
    return freedave(most) | Recipe(kv=Recompute())


def text_balanced(above: float = 0.86, bound: float = 0.05, size: int = 32) -> Recipe:
    """Ours: slots that are sure alone or jointly, the echo cache, and ends that are cut when two slots behind agree."""
    return _with_echo(above, bound, size)


def text_fast(above: float = 0.75, bound: float = 0.05, size: int = 32) -> Recipe:
    """Ours: as `text-balanced`, content with less sure slots."""
    return _with_echo(above, bound, size)


def _with_echo(above: float, bound: float, size: int) -> Recipe:
    """A threshold takes what is sure by itself, the entropy bound what is sure together: of slots that exclude each
    other it takes one and the settled, where a threshold waits (a step less for each answer to `shuffle`)."""
    rule = Either(rules=(Threshold(above=above), EntropyBound(bound=bound)))
    blocks = InBlocks(rule=Fixed(size=size), end=AtPredictedEnd(steps=1, run=2))
    return Recipe(commit=Unmask(rule=rule), blocks=blocks, kv=Echo(), paper="EB-Sampler, arXiv 2505.24857")
