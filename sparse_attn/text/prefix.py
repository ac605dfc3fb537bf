"""Shared prefixes: many samples read one prompt's keys as one matrix product (Hydragen, 2402.05099).

Shapes: B batch, Hq, Hk heads, n new queries per sample, P tokens of a shared part, D, Dv head dimensions, Bs copies
of the shared part (each shared by B / Bs samples that stand next to each other).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.merge import merge
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.text.decode import Backend, Work, decode
from hasten.sparse_attn.text.exact import exact


@dataclass(frozen=True, slots=True)
class Level:
    """Keys and values that a run of samples shares: k [Bs, Hk, P, D], v [Bs, Hk, P, Dv].

    Bs = 1: all samples (a system prompt); Bs = B: each sample its own (a suffix); between: a tree of prefixes, as
    when several continuations are drawn for each of several questions. work: where given, only its places are read,
    by `decode` (ragged suffixes); it needs Bs = B. mask: which query reads which of these keys, by the query's number
    among the n new ones and the key's place in this level.
    """

    k: Tensor
    v: Tensor
    work: Work | None = None
    mask: Mask | None = None


def attend_levels(q: Tensor, levels: Sequence[Level], scale: float | None = None, backend: Backend = "auto") -> Output:
    """Attention of q [B, Hq, n, D] over the keys of all levels together, exact whatever is shared.

    The queries of all samples that share a level stand in one matrix, so its keys are read once for all of them
    (Hydragen, with its hierarchical form); the levels are merged by their LSE. `levels` are disjoint sets
    of keys; positions were applied (rotary embeddings) before.
    """
    if not levels:
        raise UsageError("attend_levels() got no levels. Give it at least one `Level`.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = [_level(q, level, scale, backend) for level in levels]
    o, lse = merge([(part.o, part.lse) for part in parts])
    return Output(o, lse)


def _level(q: Tensor, level: Level, scale: float, backend: Backend) -> Output:
    b, hq, n, d = q.shape
    shared = level.k.shape[0]
    if shared < 1 or b % shared or (level.work is not None and shared != b):
        raise UsageError(
            f"A level of {shared} copies cannot be shared by {b} samples; 1, {b} or a divisor of {b} can"
            f"{', and with `work` each sample has its own' if level.work is not None else ''}."
        )
    if level.work is not None:
        return decode(q, level.k, level.v, level.work, scale=scale, mask=level.mask, backend=backend)
    if shared == b:
        return exact(q, level.k, level.v, scale, level.mask)
    each = b // shared
    folded = q.view(shared, each, hq, n, d).transpose(1, 2).reshape(shared, hq, each * n, d)
    out = exact(folded, level.k, level.v, scale, level.mask, n)
    o = out.o.view(shared, hq, each, n, -1).transpose(1, 2).reshape(b, hq, n, -1)
    return Output(o, out.lse.view(shared, hq, each, n).transpose(1, 2).reshape(b, hq, n))
