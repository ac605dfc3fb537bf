"""FlexAttention as a backend: plans whose tiles and chunks stand on a grid. Taken when asked for by name.

Shapes: Pq planes of queries, Tq tiles and Ck chunks of the grid.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hasten.sparse_attn.backends.jobs import Ints, host, ragged
from hasten.sparse_attn.blocks import arrange, restore
from hasten.sparse_attn.plan import Compensation, Output, Plan

if TYPE_CHECKING:
    from hasten.sparse_attn.backends.choice import Call

FULL, SPLIT = 2, 1


def refuses(call: Call) -> str | None:
    """Why FlexAttention cannot run a call; None where it can. Waits for the device, to look at the plan."""
    if call.device.type != "cuda":
        # Not compiled, it is dense attention with a mask; compiled for a CPU, it does not give the LSE.
        return f"the tensors are on {call.device}, FlexAttention saves work and gives an LSE on CUDA devices only."
    if call.compensated:
        return "it has no place for what stands in for blocks that are not read."
    return not_uniform(call.plan)


def not_uniform(plan: Plan) -> str | None:
    """Why a plan is not one of whole blocks on a grid."""
    if plan.mask is not None and plan.mask.tree is not None:
        return "the plan has a tree mask."
    start, length = host(plan.tile_start), host(plan.tile_length)
    if ((start % plan.block_m != 0) | (length < np.minimum(plan.block_m, plan.queries - start)))[length > 0].any():
        return f"tiles of the plan are not whole blocks of {plan.block_m} queries."
    _, _, chunk = _pairs(plan)
    start, length = host(plan.chunk_start)[chunk], host(plan.chunk_length)[chunk]
    if ((start % plan.block_n != 0) | (length < np.minimum(plan.block_n, plan.keys - start))).any():
        return f"chunks of the plan are not whole blocks of {plan.block_n} keys."
    return None


def execute(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, compensation: Compensation | None = None, *,
    compiled: bool = True,
) -> Output:  # fmt: skip
    """As `executor.execute`, for plans that `refuses` let pass. compiled=False runs it densely, which is for tests."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    attend = _compiled(flex) if compiled else flex.flex_attention
    arguments = {"return_aux": flex.AuxRequest(lse=True)} if hasattr(flex, "AuxRequest") else {"return_lse": True}
    o, found = attend(
        arrange(q, plan.q_perm), k, v, block_mask=block_mask(plan, q.device), scale=scale,
        enable_gqa=plan.groups > 1, **arguments,
    )  # fmt: skip
    lse = (found.lse if hasattr(found, "lse") else found).float()
    return Output(restore(o, plan.q_perm), restore(lse, plan.q_perm))


@functools.cache
def _compiled(flex: Any) -> Callable[..., Any]:
    return torch.compile(flex.flex_attention)


def block_mask(plan: Plan, device: torch.device) -> Any:
    """The plan as a BlockMask. Its `mask_mod` looks pairs of blocks up, too: without compilation FlexAttention asks
    nothing else, and without one it would silently be dense."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    b, hq, _ = plan.heads
    table = torch.as_tensor(_table(plan), device=device).view(b, hq, -1, -(-plan.keys // plan.block_n))
    counts = [(table == kind).sum(-1, dtype=torch.int32) for kind in (SPLIT, FULL)]
    orders = [(table == kind).int().argsort(dim=-1, descending=True, stable=True).int() for kind in (SPLIT, FULL)]
    mask, q_perm, k_perm = plan.mask, plan.q_perm, plan.k_perm

    def position(perm: Tensor | None, plane: Tensor, place: Tensor) -> Tensor:
        if perm is None:
            return place
        return perm[plane if perm.shape[0] > 1 else torch.zeros_like(plane), place]

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        found = table[batch, head, query // plan.block_m, key // plan.block_n] > 0
        if mask is None:
            return found
        plane = batch * hq + head
        distance = position(k_perm, plane // plan.groups, key) - position(q_perm, plane, query) - mask.offset
        found = found if mask.left is None else found & (distance >= -mask.left)
        return found if mask.right is None else found & (distance <= mask.right)

    return flex.BlockMask.from_kv_blocks(
        counts[0], orders[0], counts[1], orders[1], BLOCK_SIZE=(plan.block_m, plan.block_n), mask_mod=allowed,
        seq_lengths=(plan.queries, plan.keys), compute_q_blocks=False,
    )  # fmt: skip


def _table(plan: Plan) -> Ints:
    """FULL, SPLIT or 0 for each tile and chunk of the grid: [Pq * Tq, Ck]."""
    tile, kind, chunk = _pairs(plan)
    across, down = -(-plan.keys // plan.block_n), -(-plan.queries // plan.block_m)
    found = np.zeros((plan.heads[0] * plan.heads[1] * down, across), np.int64)
    row = host(plan.tile_plane)[tile] * down + host(plan.tile_start)[tile] // plan.block_m
    found[row, host(plan.chunk_start)[chunk] // plan.block_n] = kind
    return found


def _pairs(plan: Plan) -> tuple[Ints, Ints, Ints]:
    """Each tile with each chunk that it reads: tile, FULL or SPLIT, chunk."""
    start, full, end = (host(x) for x in (plan.row_start, plan.row_full, plan.row_end))
    tile = np.flatnonzero(host(plan.tile_length) > 0)
    row = host(plan.tile_row)[tile]
    chunk = ragged(start[row], end[row] - start[row])
    of = np.arange(tile.size).repeat(end[row] - start[row])
    return tile[of], np.where(chunk < full[row][of], FULL, SPLIT), chunk
