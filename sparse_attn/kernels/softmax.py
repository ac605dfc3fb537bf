"""The online softmax that all kernels share, and the position mask. In powers of two; see `launch.LOG2E`.

Shapes: M queries of a tile, N keys of a chunk, Dv value dimension. m [M] is the largest logit so far, total [M] the sum
of 2^(logit - m), acc [M, Dv] the sum of values so weighted; nothing read yet is m = -inf, total = 0, acc = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold_full(s, scale, v, m, total, acc, PRECISION: tl.constexpr):
    """Adds raw products s [M, N], all finite, with values v [N, Dv]. scale >= 0 turns products into logits.

    The maximum is taken before scaling, so that scaling and subtracting are one multiply-add.
    """
    top = tl.maximum(m, tl.max(s, 1) * scale)
    decay = tl.exp2(m - top)
    p = tl.exp2(s * scale - top[:, None])
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return top, total, acc


@triton.jit
def fold(s, v, m, total, acc, PRECISION: tl.constexpr):
    """Adds logits s [M, N], where -inf is not read; a query that has read nothing stays as it is."""
    top = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(top == -float("inf"), 0.0, top)
    decay = tl.exp2(m - safe)
    p = tl.exp2(s - safe[:, None])
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return top, total, acc


@triton.jit
def finish(m, total):
    """What to divide acc by, and the natural logarithm of the denominator (-inf where nothing was read)."""
    nothing = total == 0.0
    divisor = tl.where(nothing, 1.0, total)
    lse = tl.where(nothing, -float("inf"), (m + tl.log2(divisor)) * 0.6931471805599453)
    return divisor, lse


@triton.jit
def allowed(q_pos, k_pos, left, right, offset, tree, tree_keys, keys, q_real, k_real,
            LEFT: tl.constexpr, RIGHT: tl.constexpr, TREE: tl.constexpr):  # fmt: skip
    """`Mask.allowed` for positions q_pos [M] and k_pos [N]: [M, N]. tree: bytes [Sq, tree_keys].

    q_real, k_real: which of them are tokens at all; the tree is not read for others. Its last keys are those of a
    draft, and only the tree speaks about them.
    """
    distance = k_pos[None, :] - (q_pos[:, None] + offset)
    found = q_real[:, None] & k_real[None, :]
    inside = found
    if TREE:
        column = k_pos - (keys - tree_keys)
        inside = found & (column >= 0)[None, :]
        drawn = tl.load(tree + (q_pos[:, None] * tree_keys + column[None, :]), mask=inside, other=0) != 0
    if LEFT:
        found = found & (distance >= -left)
    if RIGHT:
        found = found & (distance <= right)
    if TREE:
        found = tl.where(inside, drawn, found)
    return found
