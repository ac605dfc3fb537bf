"""Which queries a program has, and where they and its keys stand: how every kernel over a plan begins.

Shapes: M queries of a program, N keys of a chunk. See `hasten.sparse_attn.plan` for tiles, planes and rows. A kernel
returns at once where `length` is not positive: its tile ends before this piece.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def piece(tile_length, BLOCK_M: tl.constexpr, PIECES: tl.constexpr):
    """The tile of this program, its first query within the tile, and how many queries are left from there on."""
    tile = tl.program_id(0) // PIECES
    first = (tl.program_id(0) % PIECES) * BLOCK_M
    return tile, first, tl.load(tile_length + tile) - first


@triton.jit
def owner(tile, tile_plane, HQ: tl.constexpr, GROUPS: tl.constexpr):
    """Whose tile it is: query plane (int64: it is multiplied with strides), batch, head, key head, key plane."""
    plane = tl.load(tile_plane + tile).to(tl.int64)
    batch, head = plane // HQ, plane % HQ
    key_head = head // GROUPS
    return plane, batch, head, key_head, batch * (HQ // GROUPS) + key_head


@triton.jit
def query_places(start, on_m, q_perm, q_plane, real_m, ANEW: tl.constexpr):
    """Original positions [M] of the queries of a tile. ANEW: read from memory at every call (volatile). Kept over a
    loop that is short of registers, they would cost it some."""
    token = tl.load(start, volatile=ANEW) + on_m
    if q_perm is not None:
        token = tl.load(q_perm + q_plane + token, mask=real_m, other=0, volatile=ANEW).to(tl.int32)
    return token


@triton.jit
def key_places(n, k_perm, k_plane, real_n):
    """Original positions [N] of keys that stand at n (int64) of the arranged ones."""
    place = n.to(tl.int32)
    if k_perm is not None:
        place = tl.load(k_perm + k_plane + n, mask=real_n, other=0).to(tl.int32)
    return place
