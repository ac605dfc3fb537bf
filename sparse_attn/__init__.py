"""Which key blocks does a query block read, and what stands in for the rest?

    segments, layouts   which tokens there are and in which order they stand
    scorers, selectors  which pairs of blocks are worth reading
    pack                the plan: one format for every method
    sparse_attention    the call that runs it; kernels themselves are in `sparse_attn/kernels/`

May import `hasten` core only; never `caching`, `samplers` or `pipelines`. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.sparse_attn.attention import sparse_attention
    from hasten.sparse_attn.backends import choose
    from hasten.sparse_attn.blocks import Blocks, Order
    from hasten.sparse_attn.density import cost, tile_density
    from hasten.sparse_attn.mask import Mask, causal
    from hasten.sparse_attn.plan import Compensation, Output, Plan
    from hasten.sparse_attn.policy import SparseAttention
    from hasten.sparse_attn.segments import Segment, Tokens

_HOME = {
    "Blocks": "blocks",
    "Compensation": "plan",
    "Mask": "mask",
    "Order": "blocks",
    "Output": "plan",
    "Plan": "plan",
    "Segment": "segments",
    "SparseAttention": "policy",
    "Tokens": "segments",
    "causal": "mask",
    "choose": "backends",
    "cost": "density",
    "sparse_attention": "attention",
    "tile_density": "density",
}
"""Public name -> the module that defines it. Functions that are named like their module (`pack.pack`, `merge.merge`,
`density.density`, `reference.reference`) are not here: importing the module would take the name."""

__all__ = [
    "Blocks",
    "Compensation",
    "Mask",
    "Order",
    "Output",
    "Plan",
    "Segment",
    "SparseAttention",
    "Tokens",
    "causal",
    "choose",
    "cost",
    "sparse_attention",
    "tile_density",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hasten.sparse_attn' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"hasten.sparse_attn.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
