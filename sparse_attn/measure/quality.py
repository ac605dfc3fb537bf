"""How good a selection is: kept mass, output error, and whether rho tells the truth, against dense attention.

Shapes: B batch, Hq, Hk heads, Sq, Sk tokens, D, Dv head dimensions, P planes of queries = B * Hq, Cq, Ck blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.sparse_attn.blocks import Blocks, Order
from hasten.sparse_attn.plan import Compensation, Output
from hasten.sparse_attn.reference import reference
from hasten.sparse_attn.selectors.top import within_tokens


@dataclass(frozen=True, slots=True)
class Quality:
    """By plane of queries, float32 [P] each.

    mass: share of the softmax mass that was read exactly, mean over the queries. output_error: |o - truth| / |truth|,
    Frobenius norms over the tokens. rho: what the kernel says of its mass, mean over the queries. rho_error: mean
    distance of rho from the mass, query by query.
    """

    mass: Tensor
    output_error: Tensor
    rho: Tensor
    rho_error: Tensor


def quality(found: Output, truth: Output) -> Quality:
    """Compare sparse attention with dense attention on the same inputs (`reference.dense`).

    The mass needs no map of what was read: it is exp(LSE of what was read - LSE of everything).
    """
    exact = found.lse if found.lse_exact is None else found.lse_exact
    mass = (exact.double() - truth.lse.double()).exp().clamp(max=1.0)
    rho = found.rho.double()
    error = (found.o.double() - truth.o.double()).square().sum((-1, -2)).sqrt()
    size = truth.o.double().square().sum((-1, -2)).sqrt().clamp(min=1e-30)
    columns = mass.mean(-1), error / size, rho.mean(-1), (rho - mass).abs().mean(-1)
    return Quality(*(column.flatten().float() for column in columns))


def within(scores: Tensor, blocks: Blocks, density: float) -> Tensor:
    """For each query block the key blocks with the highest scores that hold `density` of the selectable tokens.

    bool [P, Cq, Ck], roles applied. By tokens, not by blocks, so that layouts with blocks of any size can be compared.
    """
    return blocks.force(within_tokens(scores, blocks, density))


def at_tile_density(scores: Tensor, blocks: Blocks, target: float, tiles: Callable[[Tensor], float]) -> Tensor:
    """`within` with the budget at which the work of whole tiles, `tiles(keep)`, is `target` of dense attention's."""
    low, high = 0.0, min(1.0, target * 1.5)
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (middle, high) if tiles(within(scores, blocks, middle)) <= target else (low, middle)
    return within(scores, blocks, low)


def sampled_error(
    found: Output, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, keep: Tensor, *,
    samples: int = 128, scale: float | None = None, compensation: Compensation | None = None,
) -> float:  # fmt: skip
    """Largest error of `found` against the float64 reference on some queries, relative to the largest output.

    q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv] in original order. Made for sequences whose full reference
    would not fit: `samples` evenly spread arranged places of every plane. inf where any output at all is not finite.
    """
    places = torch.linspace(0, q.shape[2] - 1, min(samples, q.shape[2]), device=q.device).long()
    few = Order(None, _counted(blocks.q.bounds, places), blocks.q.roles)
    some = blocks.q.arrange(q)[:, :, places]
    truth = reference(some, k, v, Blocks(few, blocks.k), keep, scale=scale, compensation=compensation).o
    got = blocks.q.arrange(found.o)[:, :, places].double()
    if not bool(found.o.isfinite().all()):
        return float("inf")
    return float((got - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def _counted(bounds: Tensor, places: Tensor) -> Tensor:
    """Bounds of the same blocks when only `places` (ascending) are there: int32 [P1, C + 1]."""
    return torch.searchsorted(places, bounds.long()).int()
