"""Our own recipes of text diffusion: found on the tuning questions of tiny-dllm, measured on others (docs/dllm-bench.md)."""

from __future__ import annotations

from hasten.caching.kv import Recompute
from hasten.caching.kv_attention import AttentionDrift
from hasten.pipelines.recipes.text import credit, eb_sampler, freedave
from hasten.recipe import Recipe


def text_exact(most: int = 4) -> Recipe:
    """Exactly the text of sequential decoding, in fewer evaluations: drafts that are verified, nothing approximate."""
    return freedave(most) | Recipe(kv=Recompute())


def text_balanced(above: float = 0.9, below: float = 0.5) -> Recipe:
    """Sure slots with credit; computed again are open slots and what was just written, all where attention drifts."""
    return credit(above) | Recipe(kv=AttentionDrift(below=below))


def text_fast(bound: float = 0.1) -> Recipe:
    """As many slots as an entropy bound allows; computed again are open slots and what was just written."""
    return eb_sampler(bound) | Recipe(kv=AttentionDrift(below=0.0))
