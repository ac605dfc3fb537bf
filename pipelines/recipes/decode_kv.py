"""Recipes of caches for causal language models: what stays while they generate, and in how many bits.

Amounts are shares of the text here, so that one name serves any length; papers' numbers of tokens are in each line.
"""

from __future__ import annotations

from hasten.caching.decode.amount import AdaptiveHeads, Amount, Enough, Pyramid, Share, TogetherHeads, Tokens
from hasten.caching.decode.codec_numbers import Fp8, Int8, Kivi
from hasten.caching.decode.codec_sparse import Bitmap
from hasten.caching.decode.kept import KeptCache, Shared
from hasten.caching.decode.lazy import LazyTokens
from hasten.caching.decode.low_rank import LowRank
from hasten.caching.decode.prompt import GemFilter
from hasten.caching.decode.score import AnyOf, KeyNorm
from hasten.caching.decode.score_attention import HeavyHitters, Keyformer, LastQueries
from hasten.recipe import Recipe
from hasten.sparse_attn.text.causal import CausalAttention
from hasten.sparse_attn.text.pages import Pages


def _amount(share: float, tokens: int | None) -> Amount:
    return Share(share=share) if tokens is None else Tokens(count=tokens)


def streaming_llm(share: float = 0.25, tokens: int | None = None, sinks: int = 4) -> Recipe:
    """StreamingLLM: the first tokens and the newest (the paper: 4 and 512 to 2,000)."""
    return Recipe(kv=KeptCache(amount=_amount(share, tokens), sinks=sinks), paper="StreamingLLM, arXiv 2309.17453")


def h2o(share: float = 0.2, tokens: int | None = None, recent: float = 0.5) -> Recipe:
    """H2O: half for the newest tokens, half for those that got most attention so far."""
    kept = KeptCache(score=HeavyHitters(), amount=_amount(share, tokens), recent=recent, sinks=0)
    return Recipe(kv=kept, paper="H2O, arXiv 2306.14048")


def keyformer(share: float = 0.6, tokens: int | None = None, recent: float = 0.3) -> Recipe:
    """Keyformer: attention under Gumbel noise, whose temperature rises while the cache loses tokens."""
    kept = KeptCache(score=Keyformer(), amount=_amount(share, tokens), recent=recent, sinks=0)
    return Recipe(kv=kept, paper="Keyformer, arXiv 2403.09054")


def snapkv(share: float = 0.25, tokens: int | None = None, queries: int = 32, smooth: int = 5) -> Recipe:
    """SnapKV: after the prompt, the tokens that its last queries attend to; what is generated stays."""
    score = LastQueries(queries=queries, smooth=smooth)
    kept = KeptCache(score=score, amount=_amount(share, tokens), window=queries, sinks=0, when="prompt")
    return Recipe(kv=kept, paper="SnapKV, arXiv 2404.14469")


def pyramid_kv(share: float = 0.25, tokens: int | None = None, queries: int = 8, steep: float = 4.0) -> Recipe:
    """PyramidKV: SnapKV with more for the first layers and less for the last."""
    kept = KeptCache(
        score=LastQueries(queries=queries), amount=_amount(share, tokens), window=queries, sinks=0, when="prompt",
        layers=Pyramid(steep=steep),
    )  # fmt: skip
    return Recipe(kv=kept, paper="PyramidKV, arXiv 2406.02069")


def ada_kv(share: float = 0.25, tokens: int | None = None, queries: int = 32, floor: float = 0.2) -> Recipe:
    """Ada-KV: SnapKV whose heads share what a layer keeps; memory is what is kept, not the longest head."""
    kept = KeptCache(
        score=LastQueries(queries=queries), amount=_amount(share, tokens), window=queries, sinks=0, when="prompt",
        heads=AdaptiveHeads(floor=floor),
    )  # fmt: skip
    return Recipe(kv=kept, paper="Ada-KV, arXiv 2407.11550")


def knorm(share: float = 0.5, tokens: int | None = None) -> Recipe:
    """Knorm: keys of small length stay. Experimental."""
    return Recipe(kv=KeptCache(score=KeyNorm(), amount=_amount(share, tokens)), paper="A simple L2 norm, arXiv 2406.11430")


def random_kv(share: float = 0.25, tokens: int | None = None) -> Recipe:
    """Tokens drawn by lot: the control that every cache policy has to beat."""
    return Recipe(kv=KeptCache(score=AnyOf(), amount=_amount(share, tokens)))


def zipvl(mass: float = 0.975, most: float = 1.0) -> Recipe:
    """ZipVL's adaptive ratio: each layer keeps as many tokens as hold most of the attention that it got."""
    kept = KeptCache(score=HeavyHitters(), amount=Enough(mass=mass, most=most), window=16, heads=TogetherHeads(), every=8)
    return Recipe(kv=kept, paper="ZipVL, arXiv 2410.08584")


def loop_serve(share: float = 0.25, tokens: int | None = None, queries: int = 16, every: int = 16) -> Recipe:
    """LoopServe's progressive compression: again and again while a conversation grows, by what was generated last."""
    kept = KeptCache(score=LastQueries(queries=queries), amount=_amount(share, tokens), window=queries, every=every)
    return Recipe(kv=kept, paper="LoopServe, arXiv 2507.13681")


def int8_kv(residual: int = 32) -> Recipe:
    """Keys and values in eight bits, the newest exact."""
    return Recipe(kv=KeptCache(codec=Int8(residual=residual)))


def fp8_kv(residual: int = 32) -> Recipe:
    """Keys and values as eight-bit floats, the newest exact."""
    return Recipe(kv=KeptCache(codec=Fp8(residual=residual)))


def kivi(residual: int = 32) -> Recipe:
    """KIVI: four bits, keys by channel and values by token, the newest exact (the paper: 32 and 128)."""
    return Recipe(kv=KeptCache(codec=Kivi(residual=residual)), paper="KIVI, arXiv 2402.02750")


def mustafar(keys: float = 0.5, values: float = 0.5, residual: int = 32) -> Recipe:
    """Mustafar: of each key and value the larger numbers, behind a bitmap (the paper's residual: 256)."""
    codec = Bitmap(keys=keys, values=values, residual=residual)
    return Recipe(kv=KeptCache(codec=codec), paper="Mustafar, arXiv 2505.22913")


def gem_filter(share: float = 0.5, depth: float = 0.4) -> Recipe:
    """GemFilter: an early layer's last query says which tokens of the prompt the whole model reads."""
    kept = KeptCache(prompt=GemFilter(depth=depth, amount=Share(share=share)))
    return Recipe(kv=kept, paper="GemFilter, arXiv 2409.17422")


def lazy_llm(share: float = 0.5, stages: int = 3, begin: float = 0.3) -> Recipe:
    """LazyLLM: deeper layers read fewer tokens, down to this share; what is needed later is computed then."""
    depths = tuple(round(begin + (0.9 - begin) * stage / stages, 3) for stage in range(stages))
    shares = tuple(round(1.0 + (share - 1.0) * (stage + 1) / stages, 3) for stage in range(stages))
    return Recipe(kv=KeptCache(lazy=LazyTokens(depths=depths, shares=shares)), paper="LazyLLM, arXiv 2407.14057")


def shadow_kv(rank: float = 0.15625, top: int = 256, outliers: int = 48, chunk: int = 8, near: int = 32) -> Recipe:
    """ShadowKV: a prompt's keys as a thin product, its values in the CPU's memory; new tokens read the chunks that fit them."""
    codec = LowRank(rank=rank, chunk=chunk, outliers=outliers + 1, residual=near)  # one more: the first chunk may be among them
    pages = Pages(page=chunk, top=top, by="means", outliers=outliers, of="prompt", near=near)
    return Recipe(
        kv=KeptCache(codec=codec), attention=CausalAttention(cache=pages, min_tokens=0), paper="ShadowKV, arXiv 2410.21465",
    )  # fmt: skip


def hydragen(least: int = 64) -> Recipe:
    """Hydragen: what rows share is computed, held and read once: samples of one prompt, and what prompts begin with."""
    return Recipe(kv=KeptCache(shared=Shared(least=least)), paper="Hydragen, arXiv 2402.05099")
