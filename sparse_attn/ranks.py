"""Several ranks share one sequence: heads for tokens (Ulysses) or keys on a ring, with a plan each.

Shapes: N ranks, B batch, Hq, Hk heads, S tokens of the whole sequence, s of this rank's shard, D, Dv head dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from hasten.errors import UsageError
from hasten.sparse_attn.merge import merge
from hasten.sparse_attn.plan import Output

Attend = Callable[[Tensor, Tensor, Tensor], Output]
"""Attention of q [B, Hq, Sq, D] over k [B, Hk, Sk, D], v [B, Hk, Sk, Dv], sparse or dense."""

Step = Callable[[Tensor, Tensor, Tensor, int], "Output | None"]
"""The same for this rank's queries and the keys of the rank whose number is given; None where nothing is read there."""


def ulysses(
    q: Tensor, k: Tensor, v: Tensor, attend: Attend, group: Any, lengths: Sequence[int] | None = None
) -> Output:
    """Attention over a sequence whose tokens are spread over the ranks of `group` (DeepSpeed-Ulysses, 2309.14509).

    q [B, Hq, s, D], k [B, Hk, s, D], v [B, Hk, s, Dv]: this rank's tokens, all heads. An all-to-all trades tokens for
    heads, `attend` sees all S tokens of Hq / N heads (so a plan is made per head, by the rank that owns it), a second
    one trades back. lengths: tokens of every rank; None: the same on all.

    Key heads that N does not divide are repeated to the next multiple that it does, up to Hq. Raises `UsageError`
    where N does not divide Hq.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    lengths = [q.shape[2]] * size if lengths is None else list(lengths)
    hq, hk = q.shape[1], k.shape[1]
    if hq % size:
        raise UsageError(f"Ulysses gives each of {size} ranks as many heads; {hq} heads do not divide. Use ring().")
    if len(lengths) != size or lengths[rank] != q.shape[2]:
        raise UsageError(f"lengths={lengths} do not fit: {size} ranks, and rank {rank} has {q.shape[2]} tokens.")
    if hk % size:
        repeats = math.lcm(hk, size) // hk
        if hq % (hk * repeats):
            raise UsageError(f"{hk} key heads cannot be spread over {size} ranks of {hq} query heads. Use ring().")
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    out = attend(*(_to_heads(x, lengths, group) for x in (q, k, v)))
    # The LSE keeps its float32, so it travels by itself.
    return Output(_to_tokens(out.o, lengths, group), _to_tokens(out.lse[..., None], lengths, group)[..., 0])


def ring(q: Tensor, k: Tensor, v: Tensor, step: Step, group: Any, lengths: Sequence[int] | None = None) -> Output:
    """Attention of this rank's queries over the keys of all ranks, which travel round (Ring Attention, 2310.01889).

    q [B, Hq, s, D], k [B, Hk, s, D], v [B, Hk, s, Dv]. `step` is called once for each rank's keys, its own first,
    with a plan for that pair of shards (a causal one has the offset of the shards in its mask); the next keys travel
    meanwhile. The parts are merged by their LSE, exactly. lengths: keys of every rank; None: the same on all.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    lengths = [k.shape[2]] * size if lengths is None else list(lengths)
    if len(lengths) != size or lengths[rank] != k.shape[2]:
        raise UsageError(f"lengths={lengths} do not fit: {size} ranks, and rank {rank} has {k.shape[2]} keys.")
    parts: list[tuple[Tensor, Tensor]] = []
    k, v = k.contiguous(), v.contiguous()
    for turn in range(size):
        source = (rank - turn) % size
        coming: list[Any] = []
        if turn < size - 1:
            (next_k, next_v), coming = _pass_on(k, v, lengths[(source - 1) % size], group)
        out = step(q, k, v, source)
        if out is not None:
            parts.append((out.o, out.lse))
        for request in coming:
            request.wait()
        if coming:
            k, v = next_k, next_v
    if not parts:
        nothing = q.new_zeros(*q.shape[:-1], v.shape[-1])
        return Output(nothing, torch.full(q.shape[:-1], -math.inf, device=q.device))
    return Output(*merge(parts))


def _to_heads(x: Tensor, lengths: Sequence[int], group: Any) -> Tensor:
    """[B, H, s, D] of this rank's tokens -> [B, H / N, S, D] of this rank's heads."""
    size, rank = len(lengths), dist.get_rank(group)
    b, h, s, d = x.shape
    sent = x.view(b, size, h // size, s, d).permute(1, 3, 0, 2, 4).contiguous()  # rank, token, rest
    each = b * (h // size) * d
    got = x.new_empty(sum(lengths) * each)
    dist.all_to_all_single(
        got, sent.view(-1), [n * each for n in lengths], [lengths[rank] * each] * size, group=group
    )
    return got.view(sum(lengths), b, h // size, d).permute(1, 2, 0, 3).contiguous()


def _to_tokens(x: Tensor, lengths: Sequence[int], group: Any) -> Tensor:
    """The inverse of `_to_heads`: [B, H / N, S, D] -> [B, H, s, D]."""
    size, rank = len(lengths), dist.get_rank(group)
    b, h, _, d = x.shape
    sent = x.permute(2, 0, 1, 3).contiguous()  # token, rest: the tokens of one rank stand together
    each = b * h * d
    got = x.new_empty(size * lengths[rank] * each)
    dist.all_to_all_single(
        got, sent.view(-1), [lengths[rank] * each] * size, [n * each for n in lengths], group=group
    )
    return got.view(size, lengths[rank], b, h, d).permute(2, 0, 3, 1, 4).reshape(b, size * h, lengths[rank], d)


def _pass_on(k: Tensor, v: Tensor, length: int, group: Any) -> tuple[tuple[Tensor, Tensor], list[Any]]:
    """Send k, v to the next rank, begin to receive those of the one before, which has `length` keys."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    after, before = (dist.get_global_rank(group, (rank + turn) % size) for turn in (1, -1))
    next_k = k.new_empty(*k.shape[:2], length, k.shape[3])
    next_v = v.new_empty(*v.shape[:2], length, v.shape[3])
    sends = [dist.P2POp(dist.isend, x, after, group) for x in (k, v)]
    receives = [dist.P2POp(dist.irecv, x, before, group) for x in (next_k, next_v)]
    return (next_k, next_v), dist.batch_isend_irecv(sends + receives)
