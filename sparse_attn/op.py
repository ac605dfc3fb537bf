"""Attention as operators that `torch.compile` sees as one opaque node each.

`hasten::attend` asks a *site* (the state of one attention module in one run) what to do, at run time: the compiled
graph stays the same whether a step is dense, sparse or reuses. `hasten::sparse_attention` is for those who hold a plan.

Shapes: B batch, Hq, Hk heads, Sq, Sk tokens, D, Dv head dimensions.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.plan import Compensation, Output, Plan


class Site(Protocol):
    """What decides about one attention module. Has to allow weak references (a class with slots: `__weakref__`)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        """o [B, Hq, Sq, Dv] for q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv], in the dtype of q.

        named: those arguments of `torch.nn.functional.scaled_dot_product_attention` that are not its defaults.

        The site may not keep o: a compiled graph may reuse its memory. What it wants to remember it copies.
        """
        ...


_sites: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()
"""Operators take tensors and numbers, so a graph names its site by number; it lives as long as its owner keeps it."""

_numbers = itertools.count()


def ticket(site: Site) -> Tensor:
    """The number by which compiled graphs name `site`, as an int64 scalar on the CPU. Keep it beside the site.

    A tensor, because a graph is not compiled again for another value of one: blocks of the same class share a graph
    then, as they do without us. (It is read on the host; nothing waits for a device.)
    """
    number = next(_numbers)
    _sites[number] = site
    return torch.tensor(number, dtype=torch.int64)


def attend(
    q: Tensor, k: Tensor, v: Tensor, site: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`site.attend(q, k, v)`, where `site` is the ticket of one: o [B, Hq, Sq, Dv], contiguous. The rest are the
    arguments of `torch.nn.functional.scaled_dot_product_attention` and reach the site where they are not defaults."""
    found: Tensor = torch.ops.hasten.attend(q, k, v, site, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return found


@torch.library.custom_op("hasten::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, site: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    owner = _sites.get(int(site))
    if owner is None:
        raise UsageError(
            f"This compiled attention belongs to site {int(site)}, which is gone: its acceleration has ended."
            " Call the model through its own forward, or accelerate it again."
        )
    named: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
    named |= {} if dropout_p == 0.0 else {"dropout_p": dropout_p}
    named |= {"is_causal": True} if is_causal else {}
    named |= {} if scale is None else {"scale": scale}
    named |= {"enable_gqa": True} if enable_gqa else {}
    o = owner.attend(q, k, v, **named)
    # The graph was promised a tensor of its own, of this layout.
    shared = o.untyped_storage().data_ptr() in {x.untyped_storage().data_ptr() for x in (q, k, v)}
    return o.clone(memory_format=torch.contiguous_format) if shared else o.contiguous()


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, site: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


INDEX = (
    "tile_start", "tile_length", "tile_plane", "tile_row", "row_start", "row_full", "row_end", "chunk_start",
    "chunk_length",
)  # fmt: skip
UNLIMITED = -1


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None,
    compensation: Compensation | None = None, arranged: bool = False,
) -> Output:  # fmt: skip
    """As `attention.sparse_attention`, as one node of a compiled graph. Its backend is chosen when it runs."""
    mask, tables = plan.mask, compensation
    window = [] if mask is None else [UNLIMITED if x is None else x for x in (mask.left, mask.right)] + [mask.offset]
    o, lse, exact = torch.ops.hasten.sparse_attention(
        q, k, v, [getattr(plan, name) for name in INDEX], plan.q_perm, plan.k_perm,
        [*plan.heads, plan.queries, plan.keys, plan.block_m, plan.block_n], window, mask.tree if mask else None,
        [] if tables is None else [tables.keys, tables.values, tables.log_sizes, tables.approximate],
        tables.variances if tables else None, q.shape[-1] ** -0.5 if scale is None else scale, arranged,
    )  # fmt: skip
    return Output(o, lse, exact if compensation is not None else None)


@torch.library.custom_op("hasten::sparse_attention", mutates_args=())
def _sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, index: Sequence[Tensor], q_perm: Tensor | None, k_perm: Tensor | None,
    sizes: Sequence[int], window: Sequence[int], tree: Tensor | None, tables: Sequence[Tensor],
    variances: Tensor | None, scale: float, arranged: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from hasten.sparse_attn import attention

    b, hq, hk, queries, keys, block_m, block_n = sizes
    mask = None
    if window:
        left, right = (None if x == UNLIMITED else x for x in window[:2])
        mask = Mask(left, right, window[2], tree)
    tiles, rows, chunks = index[:4], index[4:7], index[7:]
    plan = Plan(
        (b, hq, hk), queries, keys, block_m, block_n, q_perm, k_perm, tiles[0], tiles[1], tiles[2], tiles[3],
        rows[0], rows[1], rows[2], chunks[0], chunks[1], mask,
    )  # fmt: skip
    stand_in = Compensation(tables[0], tables[1], tables[2], tables[3], variances) if tables else None
    with torch.no_grad():
        found = attention.sparse_attention(q, k, v, plan, scale=scale, compensation=stand_in, arranged=arranged)
    exact = found.lse_exact if found.lse_exact is not None else found.lse.new_empty(0)
    return found.o.contiguous(), found.lse.contiguous(), exact.contiguous()


@_sparse_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, index: Sequence[Tensor], q_perm: Tensor | None, k_perm: Tensor | None,
    sizes: Sequence[int], window: Sequence[int], tree: Tensor | None, tables: Sequence[Tensor],
    variances: Tensor | None, scale: float, arranged: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:-1], dtype=exact)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse, torch.empty_like(lse) if tables else lse.new_empty(0)
