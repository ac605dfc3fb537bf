"""Which key blocks does a query block read, and what stands in for the rest?

    segments, mask, blocks   which tokens there are, what they may read, and how they are cut into blocks
    layouts/                 in which order do tokens stand?
    scorers/                 how much is a pair of blocks worth?
    selectors/               which pairs are read?
    stand_ins/               what stands in for the rest?
    pack, plan               what is read, in one format for every method
    backends/, kernels/      which code runs a plan, and the Triton code itself
    attention, autograd, op  the call that runs it; with gradients; as an operator that `torch.compile` sees
    pattern, chooser, policy parts together, and when: the policy on a recipe's `attention` axis
    text/                    how does a causal language model read its cache?
    measure/                 how good is it, how fast, and how fast could it be?

May import `hasten` core only; never `caching`, `samplers` or `pipelines`. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.sparse_attn.attention import sparse_attention
    from hasten.sparse_attn.backends.choice import choose
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
    "choose": "backends.choice",
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
