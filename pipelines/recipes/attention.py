"""Recipes of sparse attention for image and video models: which keys are read, and what stands in for the others.

Of all of them: warm is the share of the first steps that stay dense; min_tokens are the tokens below which attention
stays dense, None leaves that to the predicted gain (which declines on small models: pass 0 to see what a recipe does).
"""

from __future__ import annotations

from hasten.recipe import Recipe
from hasten.sparse_attn.chooser import Sampled
from hasten.sparse_attn.layouts.common import Common
from hasten.sparse_attn.layouts.kmeans import KMeans
from hasten.sparse_attn.layouts.layout import Identity
from hasten.sparse_attn.layouts.lsh import LSH
from hasten.sparse_attn.layouts.swap import Swap
from hasten.sparse_attn.layouts.tiles import Tiles
from hasten.sparse_attn.layouts.tree import Tree
from hasten.sparse_attn.pattern import Pattern
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.scorers.bands import Bands, BlockDiagonal, Radial
from hasten.sparse_attn.scorers.both import Both
from hasten.sparse_attn.scorers.columns import LastQueries
from hasten.sparse_attn.scorers.error_routing import ErrorRouting
from hasten.sparse_attn.scorers.mass import CachedMass
from hasten.sparse_attn.scorers.pooled import Antidiagonal, Centroid, Pooled
from hasten.sparse_attn.scorers.scorer import Scorer
from hasten.sparse_attn.scorers.window import Around, CrissCross, Neighbourhood, SlidingTile
from hasten.sparse_attn.selectors.target import TargetRecall
from hasten.sparse_attn.selectors.top import Above, All, SelfTopP, TopK, TopP
from hasten.sparse_attn.stand_ins.compensate import Compensate
from hasten.sparse_attn.stand_ins.linear_rest import LinearRest
from hasten.sparse_attn.stand_ins.recover import Residual
from hasten.sparse_attn.stand_ins.samples import Samples


def semantic(
    recall: float = 0.95,
    warm: float = 0.1,
    q_size: float = 252,
    k_size: float = 76,
    refresh: int = 1,
    min_tokens: int | None = None,
    lowest: float | None = None,
) -> Recipe:
    """Clusters of similar tokens; as many are read as keep `recall` of each head's mass; the others by their mean. Ours.

    The clusters of SVG2 with the compensation of SVG-EAR, of second order, in one softmax; budgets follow rho, the share
    of the mass that was read exactly, head by head. refresh: steps for which a selection is used. lowest: beside an error
    budget (`semantic:lowest=0.7+auto:psnr=35`) the recall is what its account can afford, at least so much.
    """
    select = TargetRecall(target=recall, lowest=lowest)
    pattern = Pattern(layout=KMeans(q_size=q_size, k_size=k_size), score=Centroid(variance=True), select=select)
    return Recipe(
        attention=SparseAttention(
            min_tokens=min_tokens, patterns=(pattern,), compensate=Compensate(order=2), warm=warm, refresh=refresh
        ),
        paper="ours; clusters: SVG2, arXiv 2505.18875; compensation: SVG-EAR, arXiv 2603.08982",
    )


def semantic_tree(
    recall: float = 0.95, warm: float = 0.1, block: int = 64, refresh: int = 1, min_tokens: int | None = None
) -> Recipe:
    """As `semantic`, with the blocks of a balanced tree: all of one size, no passes of k-means, no tile half empty. Ours."""
    pattern = Pattern(
        layout=Tree(block=block, q_block=2 * block), score=Centroid(variance=True), select=TargetRecall(target=recall)
    )
    return Recipe(
        attention=SparseAttention(
            min_tokens=min_tokens, patterns=(pattern,), compensate=Compensate(order=2), warm=warm, refresh=refresh
        ),
        paper="ours",
    )


def svg2(
    p: float = 0.9,
    floor: float = 0.1,
    q_size: float = 252,
    k_size: float = 76,
    first: int = 50,
    warm: float = 0.2,
    min_tokens: int | None = None,
) -> Recipe:
    """Sparse VideoGen 2: clusters of queries and keys, the fewest key clusters whose estimated mass is `p`.

    Differs from the official code: state belongs to one run and site (there, centroids outlive prompts and resolutions),
    batches of any size, no padding of clusters beyond tiles. As there, both branches of guidance share clusters.
    """
    pattern = Pattern(
        layout=KMeans(q_size=q_size, k_size=k_size, first=first, warm=2, init="random", sample=1),
        score=Centroid(),
        select=TopP(p=p, floor=floor),
    )
    return Recipe(
        attention=SparseAttention(
            min_tokens=min_tokens, patterns=(pattern,), warm=warm, dense_layers=1, share_branches=True
        ),
        paper="SVG2, arXiv 2505.18875",
    )


def sparse_videogen(
    share: float = 0.25, block: int = 64, samples: int = 64, warm: float = 0.2, min_tokens: int | None = None
) -> Recipe:
    """Sparse VideoGen: each head reads a band in space or a band in time, whichever is nearer on sampled queries.

    Differs from the official code: queries are sampled from the whole video, not from its first frames; bands are by
    block, without rounding to 128 tokens.
    """
    near = Pattern(layout=Identity(block=block), score=Bands(along="space", share=share), select=All())
    later = Pattern(layout=Swap(block=block), score=Bands(along="time", share=share), select=All())
    return Recipe(
        attention=SparseAttention(
            min_tokens=min_tokens,
            patterns=(near, later),
            chooser=Sampled(samples=samples),
            warm=warm,
            dense_layers=1,
            block_n=64,
        ),
        paper="Sparse VideoGen, arXiv 2502.01776",
    )


def svg_ear(
    share: float = 0.1, q_size: float = 252, k_size: float = 76, warm: float = 0.2, min_tokens: int | None = None
) -> Recipe:
    """SVG-EAR: clusters that are not read count by their mean; read are those whose mean would be most wrong.

    Differs: the error is estimated from moments of the clusters instead of a probe.
    """
    pattern = Pattern(
        layout=KMeans(q_size=q_size, k_size=k_size), score=ErrorRouting(order=1), select=TopK(share=share, by="tokens")
    )
    return Recipe(
        attention=SparseAttention(
            min_tokens=min_tokens,
            patterns=(pattern,),
            compensate=Compensate(order=1),
            warm=warm,
            dense_layers=1,
            share_branches=True,
        ),
        paper="SVG-EAR, arXiv 2603.08982",
    )


def sol_attention(tau: float = 1.0, block: int = 64, warm: float = 0.1, min_tokens: int | None = None) -> Recipe:
    """Sol-Attn: blocks in the order of the sequence; those `tau` deviations above the mean and the neighbours are read.

    The others count by their mean. Differs: scores are a pass of their own instead of a part of the kernel; any dtype,
    head dimension and length; text is always read.
    """
    score: Scorer = Both(first=BlockDiagonal(reach=1), second=Pooled(), how="union")
    pattern = Pattern(layout=Identity(block=block), score=score, select=Above(tau=tau))
    return Recipe(
        attention=SparseAttention(
            min_tokens=min_tokens, patterns=(pattern,), compensate=Compensate(order=1), warm=warm, block_m=64
        ),
        paper="Sol-Attn, arXiv 2607.24027",
    )


def adaspa(
    share: float = 0.2, block: int = 64, every: int = 10, warm: float = 0.1, min_tokens: int | None = None
) -> Recipe:
    """AdaSpa: the blocks that had most mass at the last dense step, with a budget that each head spends where it pays.

    every: steps from one dense step, at which masses are measured, to the next.
    """
    pattern = Pattern(layout=Identity(block=block), score=CachedMass(), select=SelfTopP(share=share, together=True))
    return Recipe(
        attention=SparseAttention(
            min_tokens=min_tokens, patterns=(pattern,), warm=warm, every=every, refresh=every, block_m=max(16, block)
        ),
        paper="AdaSpa, arXiv 2502.21079",
    )


def grat(
    group: tuple[int, int, int] = (4, 8, 8), pattern: str = "cross", warm: float = 0.1, min_tokens: int | None = None
) -> Recipe:
    """GRAT: groups of tokens read the groups of their frame, row or column ("cross"), or those around them ("around")."""
    score: Scorer = CrissCross(group=group) if pattern == "cross" else Around(group=group)
    return Recipe(
        attention=SparseAttention(
            min_tokens=min_tokens, patterns=(Pattern(layout=Tiles(tile=group), score=score, select=All()),), warm=warm
        ),
        paper="GRAT, arXiv 2505.14687",
    )


def re_ttention(
    share: float = 0.1,
    every: int = 5,
    warm: float = 0.25,
    growth: float = 0.04,
    block: int = 64,
    min_tokens: int | None = None,
) -> Recipe:
    """Re-ttention: a narrow band of keys, put right by what dense steps have shown of the rest.

    share: of all pairs that lie within the band. every: each so many-th step is dense. Differs: no matrix of all scores
    is made; the ratio of the softmax sums comes from two log-sum-exps.
    """
    score = Bands(along="space", share=share, sink=False)
    pattern = Pattern(layout=Identity(block=block), score=score, select=All())
    recover = Residual(growth=growth)
    return Recipe(
        attention=SparseAttention(
            min_tokens=min_tokens,
            patterns=(pattern,),
            recover=recover,
            warm=warm,
            every=every,
            refresh=10_000,
            block_m=64,
        ),
        paper="Re-ttention, arXiv 2505.22918",
    )


def neighbourhood(
    window: tuple[int, ...] = (9, 15, 25),
    stride: tuple[int, ...] | None = None,
    dilation: tuple[int, ...] | None = None,
    warm: float = 0.1,
    min_tokens: int | None = None,
) -> Recipe:
    """Neighbourhood attention: each query reads a window around it, in 1, 2 or 3 dimensions (NATTEN)."""
    score = Neighbourhood(window=window, stride=stride, dilation=dilation)
    layout = Identity() if len(window) == 1 else Tiles(tile="best")
    return Recipe(
        attention=SparseAttention(
            min_tokens=min_tokens, patterns=(Pattern(layout=layout, score=score, select=All()),), warm=warm
        ),
        paper="Neighborhood attention, arXiv 2204.07143; GNA, arXiv 2504.16922",
    )


def sliding_tile(
    window: tuple[int, int, int] = (3, 3, 3),
    tile: tuple[int, int, int] = (6, 8, 8),
    warm: float = 0.25,
    min_tokens: int | None = None,
) -> Recipe:
    """Sliding tile attention: each tile of queries reads the tiles around it; any grid."""
    pattern = Pattern(layout=Tiles(tile=tile), score=SlidingTile(tile=tile, window=window), select=All())
    return Recipe(
        attention=SparseAttention(min_tokens=min_tokens, patterns=(pattern,), warm=warm), paper="STA, arXiv 2502.04507"
    )


def radial(
    decay: float = 0.2, least: int = 128, warm: float = 0.25, block: int = 64, min_tokens: int | None = None
) -> Recipe:
    """Radial attention: the further apart two frames are, the narrower the band they share."""
    pattern = Pattern(layout=Identity(block=block), score=Radial(decay=decay, least=least), select=All())
    return Recipe(
        attention=SparseAttention(min_tokens=min_tokens, patterns=(pattern,), warm=warm, dense_layers=1),
        paper="Radial attention, arXiv 2506.19852",
    )


def hyper_attention(block: int = 256, samples: int = 256, warm: float = 0.1, min_tokens: int | None = None) -> Recipe:
    """HyperAttention: tokens sorted by angular hash, the block beside each is read, samples stand in for the rest."""
    pattern = Pattern(layout=LSH(block=block), score=BlockDiagonal(), select=All())
    return Recipe(
        attention=SparseAttention(
            min_tokens=min_tokens, patterns=(pattern,), compensate=Samples(count=samples), warm=warm
        ),
        paper="HyperAttention, arXiv 2310.05869",
    )


def routing(size: float = 256, reach: int = 0, warm: float = 0.1, min_tokens: int | None = None) -> Recipe:
    """Routing Transformer: queries read the keys of their own cluster, of clusters common to both, learned online."""
    pattern = Pattern(layout=Common(size=size), score=BlockDiagonal(reach=reach), select=All())
    return Recipe(
        attention=SparseAttention(min_tokens=min_tokens, patterns=(pattern,), warm=warm),
        paper="Routing Transformer, arXiv 2003.05997",
    )


def linear_branch(
    share: float = 0.1,
    features: int = 256,
    q_size: float = 252,
    k_size: float = 76,
    warm: float = 0.1,
    min_tokens: int | None = None,
) -> Recipe:
    """A linear branch beside exact attention to the nearest clusters: one state per block instead of its mean.

    Differs from LiT, whose features are trained: random ones in the units of exp, so no training, but noise.
    """
    pattern = Pattern(
        layout=KMeans(q_size=q_size, k_size=k_size), score=Centroid(variance=True), select=TopK(share=share, by="tokens")
    )
    return Recipe(
        attention=SparseAttention(
            min_tokens=min_tokens, patterns=(pattern,), compensate=LinearRest(features=features), warm=warm
        ),
        paper="LiT, arXiv 2501.12976; Lightning Attention-2, arXiv 2401.04658",
    )


def sparge(
    p: float = 0.98, similarity: float = 0.6, block: int = 64, warm: float = 0.0, min_tokens: int | None = None
) -> Recipe:
    """SpargeAttn: pooled blocks up to a share of the estimated mass; blocks that pooling says little of are always read.

    Differs: exact arithmetic (the official kernels also quantise), no second test within the kernel.
    """
    pattern = Pattern(layout=Identity(block=block), score=Pooled(similarity=similarity), select=TopP(p=p))
    return Recipe(
        attention=SparseAttention(min_tokens=min_tokens, patterns=(pattern,), warm=warm),
        paper="SpargeAttn, arXiv 2502.18137",
    )


def xattention(
    p: float = 0.9, stride: int = 8, block: int = 128, warm: float = 0.1, min_tokens: int | None = None
) -> Recipe:
    """XAttention: blocks by the sums along antidiagonals, up to a share of the estimated mass."""
    pattern = Pattern(layout=Identity(block=block), score=Antidiagonal(stride=stride), select=TopP(p=p))
    return Recipe(
        attention=SparseAttention(min_tokens=min_tokens, patterns=(pattern,), warm=warm),
        paper="XAttention, arXiv 2503.16428",
    )


def nabla(
    p: float = 0.6,
    block: int = 64,
    window: tuple[int, int, int] = (3, 3, 3),
    warm: float = 0.1,
    min_tokens: int | None = None,
) -> Recipe:
    """NABLA: pooled blocks up to a share of the estimated mass, and a sliding window of tiles."""
    near = SlidingTile(tile=(1, 8, 8), window=window)
    pattern = Pattern(
        layout=Tiles(tile=(1, 8, 8)), score=Both(first=near, second=Pooled(), how="union"), select=TopP(p=p)
    )
    return Recipe(
        attention=SparseAttention(min_tokens=min_tokens, patterns=(pattern,), warm=warm, block_m=max(16, block)),
        paper="NABLA, arXiv 2507.13546",
    )


def last_queries(
    share: float = 0.25, queries: int = 64, block: int = 64, warm: float = 0.1, min_tokens: int | None = None
) -> Recipe:
    """Vertical and slash lines: the last queries foretell which columns and diagonals all of them read (MInference)."""
    pattern = Pattern(layout=Identity(block=block), score=LastQueries(queries=queries), select=TopK(share=share))
    return Recipe(
        attention=SparseAttention(min_tokens=min_tokens, patterns=(pattern,), warm=warm),
        paper="MInference, arXiv 2407.02490",
    )
