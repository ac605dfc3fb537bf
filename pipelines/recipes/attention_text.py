"""Recipes of sparse attention for causal language models: what the prompt reads of itself, what new tokens read of the cache.

Of all of them: min_tokens are the tokens below which prompts and caches are read densely.
"""

from __future__ import annotations

from hasten.recipe import Recipe
from hasten.sparse_attn.chooser import Sampled
from hasten.sparse_attn.layouts.layout import Identity
from hasten.sparse_attn.pattern import Pattern
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.scorers.bands import AShape
from hasten.sparse_attn.scorers.both import Both
from hasten.sparse_attn.scorers.columns import LastQueries
from hasten.sparse_attn.scorers.pooled import Pooled
from hasten.sparse_attn.scorers.spans import Depth, Full, Near, Shards, Spans
from hasten.sparse_attn.selectors.top import All, TopK
from hasten.sparse_attn.stand_ins.compensate import Compensate
from hasten.sparse_attn.text.causal import CausalAttention
from hasten.sparse_attn.text.delta import Delta, Runs
from hasten.sparse_attn.text.hierarchical import Hierarchical
from hasten.sparse_attn.text.hierarchical import Tree as Halving
from hasten.sparse_attn.text.lookup import Lookup
from hasten.sparse_attn.text.pages import Pages
from hasten.sparse_attn.text.reader import Recent
from hasten.sparse_attn.text.votes import Votes


def _prompt(*patterns: Pattern) -> SparseAttention:
    return SparseAttention(patterns=patterns, chooser=Sampled(), warm=0.0, block_m=64)


def minference(
    window: int = 1024, sink: int = 128, columns: int = 16, diagonals: int = 96, top: int = 100, min_tokens: int = 4096
) -> Recipe:
    """MInference: each head reads an A-shape, vertical and slash lines, or its best blocks.

    Differs: the pattern of a head is chosen online, on sampled queries, instead of offline; columns are blocks of keys.
    """
    lines = LastQueries(columns=columns, diagonals=diagonals)
    prompt = _prompt(
        Pattern(layout=Identity(), score=AShape(sink=sink, window=window), select=All()),
        Pattern(layout=Identity(), score=lines, select=All()),
        Pattern(layout=Identity(), score=Pooled(), select=TopK(count=top)),
    )
    return Recipe(attention=CausalAttention(prompt=prompt, min_tokens=min_tokens), paper="MInference, arXiv 2407.02490")


def hip(top: int = 16, cache_top: int = 64, sinks: int = 128, window: int = 512, min_tokens: int = 4096) -> Recipe:
    """HiP: the best blocks found by halving, for the prompt and for every new token."""
    near = AShape(sink=sinks, window=window)
    score = Both(first=near, second=Hierarchical(top=top), how="max")
    prompt = _prompt(Pattern(layout=Identity(), score=score, select=All()))
    cache = Halving(top=cache_top, sinks=sinks, window=window)
    attention = CausalAttention(prompt=prompt, cache=cache, min_tokens=min_tokens)
    return Recipe(attention=attention, paper="HiP, arXiv 2406.09827")


def mas_former(window: int = 1024, full: float = 0.25, min_tokens: int = 4096) -> Recipe:
    """MASFormer: full attention in a few layers, short spans in the others.

    full: share of the layers, the first ones, that read everything. The paper trains with these spans; without training
    it is an approximation.
    """
    prompt = _prompt(Pattern(layout=Identity(), score=Spans(spans=(Near(window=window),)), select=All()))
    cache = Recent(window=window, sinks=0)
    dense = (Depth(begin=0.0, end=full),)
    return Recipe(
        attention=CausalAttention(prompt=prompt, cache=cache, dense=dense, min_tokens=min_tokens),
        paper="MASFormer, arXiv 2310.12442",
    )


def long_gen(window: int = 1024, sinks: int = 64, min_tokens: int = 4096) -> Recipe:
    """LongGen: the middle third of the layers is full, the others read sinks and a window.

    The paper trains lightly with it; without training it is an approximation.
    """
    spans = Spans(spans=(Near(window=window, sinks=sinks),))
    prompt = _prompt(Pattern(layout=Identity(), score=spans, select=All()))
    cache = Recent(window=window, sinks=sinks)
    dense = (Depth(begin=1 / 3, end=2 / 3),)
    return Recipe(
        attention=CausalAttention(prompt=prompt, cache=cache, dense=dense, min_tokens=min_tokens),
        paper="LongGen, arXiv 2410.01485",
    )


def shards(
    count: int = 8, width: int = 64, window: int = 1024, full_heads: int = 0, min_tokens: int = 4096
) -> Recipe:
    """S2 attention: each head reads its own strided share of the context, and what is near.

    full_heads: so many of the first heads of a cycle of `count` read everything. The paper trains with it.
    """
    own = tuple(Shards(count=count, width=width, window=window) for _ in range(count - full_heads))
    spans = Spans(spans=(Full(),) * full_heads + own)
    prompt = _prompt(Pattern(layout=Identity(block=width), score=spans, select=All()))
    return Recipe(attention=CausalAttention(prompt=prompt, min_tokens=min_tokens), paper="S2-Attention, arXiv 2407.17678")


def squeezed(share: float = 0.1, cluster: int = 16, min_tokens: int = 4096) -> Recipe:
    """Squeezed attention: new tokens look up which clusters of the prompt's keys matter."""
    cache = Lookup(share=share, cluster=cluster)
    return Recipe(attention=CausalAttention(cache=cache, min_tokens=min_tokens), paper="Squeezed Attention, arXiv 2411.09688")


def token_select(
    top: int = 2048, sinks: int = 128, window: int = 512, similarity: float = 0.9, min_tokens: int = 4096
) -> Recipe:
    """TokenSelect: heads vote for the tokens of the cache that all of them read."""
    cache = Votes(top=top, sinks=sinks, window=window, similarity=similarity)
    return Recipe(attention=CausalAttention(cache=cache, min_tokens=min_tokens), paper="TokenSelect, arXiv 2411.02886")


def quest(top: int = 64, page: int = 16, min_tokens: int = 4096) -> Recipe:
    """Quest: of a cache in pages those whose bounds promise most to a query (the paper: 64 to 256 pages of 16)."""
    cache = Pages(page=page, top=top, by="bounds")
    return Recipe(attention=CausalAttention(cache=cache, min_tokens=min_tokens), paper="Quest, arXiv 2406.10774")


def landmarks(top: int = 256, page: int = 8, outliers: int = 48, min_tokens: int = 4096) -> Recipe:
    """ShadowKV's landmarks: of a cache in chunks those whose mean keys fit a query, and the odd ones; nothing is packed."""
    cache = Pages(page=page, top=top, by="means", outliers=outliers)
    return Recipe(attention=CausalAttention(cache=cache, min_tokens=min_tokens), paper="ShadowKV, arXiv 2410.21465, landmarks only")


def delta_llm(share: float = 0.25, window: int = 256, min_tokens: int = 4096) -> Recipe:
    """DeltaLLM: far keys that hardly differ from the one before them count as one."""
    near = AShape(sink=4, window=window)
    prompt = SparseAttention(
        patterns=(Pattern(layout=Runs(share=share), score=near, select=All()),),
        compensate=Compensate(order=1),
        warm=0.0,
        block_m=64,
    )
    cache = Delta(share=share, window=window)
    attention = CausalAttention(prompt=prompt, cache=cache, min_tokens=min_tokens)
    return Recipe(attention=attention, paper="DeltaLLM, arXiv 2507.19608")
