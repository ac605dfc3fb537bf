"""Equal pieces of chunk lists: the work is what was asked for, and its result is attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.errors import RefusedError, UsageError
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.text.decode import Work, decode, decode_torch, pages, select, split, whole
from hasten.sparse_attn.text.reader import Everything, Recent, newest


def by_pieces(q: Tensor, k: Tensor, v: Tensor, work: Work, mask: Mask | None = None) -> Output:
    """The twin of the kernel, which a CPU does not use without need."""
    return decode_torch(q, k, v, work, q.shape[-1] ** -0.5, mask)


Run = Callable[..., Output]
EITHER = pytest.mark.parametrize("run", [decode, by_pieces], ids=["in place", "by pieces"])
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(4, 70))
"""B, Hk, G, n, S (with n <= S)."""


def draw(b: int, hk: int, groups: int, n: int, s: int, seed: int, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(b, hk * groups, n, d, generator=g)
    return q, torch.randn(b, hk, s, d, generator=g), torch.randn(b, hk, s, d + 1, generator=g)


def truth(q: Tensor, k: Tensor, v: Tensor, reads: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Float64 attention where reads (bool, broadcast to [B, Hq, n, S]) allows it; o 0 and lse -inf where it does
    not."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    logits = q.double() @ k.mT * (scale or q.shape[-1] ** -0.5)
    logits = logits.masked_fill(~reads.expand_as(logits), -math.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ v, logits.logsumexp(-1)


def close(out: object, expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(out.o.double(), expected[0], rtol=2e-5, atol=2e-5)  # type: ignore[attr-defined]
    torch.testing.assert_close(out.lse.double(), expected[1], rtol=2e-5, atol=2e-5)  # type: ignore[attr-defined]


def chunks_of(work: Work, row: int) -> list[int]:
    """Numbers of the chunks that the pieces of a row read, in order."""
    found: list[int] = []
    for piece in range(int(work.rw_ptr[row]), int(work.rw_ptr[row + 1])):
        assert int(work.wk_row[piece]) == row
        found += range(int(work.wk_lo[piece]), int(work.wk_hi[piece]))
    return found


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6), pieces=st.integers(1, 40))
def test_pieces_cover_each_chunk_once_and_are_equal(counts: list[int], pieces: int) -> None:
    start = torch.arange(10).expand(len(counts), 10) * 4
    work = split(start, torch.full_like(start, 4), torch.tensor(counts), pieces, block=4)
    assert work.wk_row.numel() == pieces + len(counts) - 1
    for row, count in enumerate(counts):
        assert chunks_of(work, row) == list(range(row * 10, row * 10 + count))
    taken = work.wk_hi - work.wk_lo
    assert int(taken.max()) <= min(-(-sum(counts) // pieces), work.most) and int(taken.min()) >= 0
    assert int(work.tokens()) == 4 * sum(counts)


@EITHER
@pytest.mark.parametrize("drafted", [False, True])
@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, pieces=st.integers(1, 12), block=st.integers(1, 9), seed=st.integers(0, 999))
def test_any_choice_of_blocks(
    run: Run, drafted: bool, sizes: tuple[int, ...], pieces: int, block: int, seed: int
) -> None:
    b, hk, _, n, s = sizes
    q, k, v = draw(*sizes[:4], s, seed)
    g = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, s + 1, (b * hk, 4), generator=g).sort(1).values  # blocks of any length, also none
    bounds = torch.cat([torch.zeros(b * hk, 1), cuts, torch.full((b * hk, 1), s)], 1).int()
    keep = torch.rand(b * hk, 5, generator=g) < 0.5
    place = torch.arange(s).expand(b * hk, s).contiguous()
    reads = keep.gather(1, torch.searchsorted(bounds[:, 1:-1].contiguous(), place.int(), right=True))
    grouped = reads.view(b, hk, 1, s).repeat_interleave(q.shape[1] // hk, 1)
    unread = ~reads.view(b, hk, s, 1)
    work = select(keep, bounds, pieces, block, places=s)
    assert int(work.tokens()) == int(reads.sum())
    mask = newest(n, q.device) if drafted else None
    allowed = grouped.expand(-1, -1, n, -1)
    if mask is not None:
        allowed = allowed & mask.allowed(torch.arange(n), torch.arange(s), s)
    out = run(q, k.masked_fill(unread, float("nan")), v.masked_fill(unread, float("inf")), work, mask=mask)
    close(out, truth(q, k, v, allowed))


@EITHER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ragged_batch_with_padding_on_both_sides(dtype: torch.dtype, run: Run) -> None:
    q, k, v = (x.to(dtype) for x in draw(3, 2, 3, 1, 50, 0))
    lengths, starts = torch.tensor([50, 7, 33]), torch.tensor([0, 7, 30])
    place = torch.arange(50)
    reads = (place < lengths[:, None]) & (place >= starts[:, None])
    poison = ~reads[:, None, :, None]
    work = whole(lengths, 2, 50, pieces=4, block=16, starts=starts)
    out = run(q, k.masked_fill(poison, float("nan")), v.masked_fill(poison, float("nan")), work)
    o, lse = truth(q, k, v, reads[:, None, None])
    tolerance = 2 * (o - o.to(dtype).double()).abs().max() + 1e-6
    assert (out.o.double() - o).abs().max() <= tolerance and out.o.dtype == dtype
    assert (out.lse[1] == -math.inf).all() and (out.o[1] == 0).all()
    torch.testing.assert_close(out.lse.double(), lse, rtol=1e-5, atol=1e-5)


@EITHER
def test_pages_of_one_pool(run: Run) -> None:
    q, k, v = draw(2, 2, 2, 1, 48, 1)
    table, lengths, page = torch.tensor([[3, 0, 5], [1, 4, 0]]), torch.tensor([20, 11]), 8
    out = run(q, k[:1], v[:1], pages(table, lengths, 2, page, pieces=3))
    for sample in range(2):
        place = (table[sample, :, None] * page + torch.arange(page)).flatten()[: int(lengths[sample])]
        alone = truth(q[sample : sample + 1], k[:1, :, place], v[:1, :, place], torch.ones(1, dtype=torch.bool))
        torch.testing.assert_close(out.o[sample].double(), alone[0][0], rtol=1e-5, atol=1e-5)


def test_a_draft_tree_is_attention_along_each_path() -> None:
    parents = [-1, 0, 0, 1, 2]
    tree = torch.eye(5, dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            tree[node] |= tree[parent]
    q, k, v = draw(1, 2, 2, 5, 29, 2)
    out = Everything().start().attend(q, k, v, None, 8**-0.5, tree)
    ragged = Everything().start().attend(q, k, v, torch.zeros(1, dtype=torch.int64), 8**-0.5, tree)
    close(out, (ragged.o.double(), ragged.lse.double()))
    for node in range(5):
        places = [*range(24), *(24 + other for other in range(5) if tree[node, other])]
        alone = truth(q[:, :, node : node + 1], k[:, :, places], v[:, :, places], torch.ones(1, dtype=torch.bool))
        torch.testing.assert_close(out.o[:, :, node : node + 1].double(), alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 3])
def test_everything_is_causal_attention(n: int) -> None:
    q, k, v = draw(2, 2, 2, n, 31, 3)
    mask = newest(n, q.device)
    reads = torch.ones(n, 31, dtype=torch.bool).tril(31 - n)
    assert (mask is None) == (n == 1)
    close(Everything().start().attend(q, k, v, None, 8**-0.5), truth(q, k, v, reads))
    first = torch.tensor([0, 9])
    padded = reads & (torch.arange(31) >= first[:, None])[:, None, None]
    close(Everything().start().attend(q, k, v, first, 8**-0.5), truth(q, k, v, padded))


@pytest.mark.parametrize("first", [None, (0, 13), (30, 2)])
def test_recent_reads_sinks_and_window(first: tuple[int, int] | None) -> None:
    q, k, v = draw(2, 2, 2, 1, 40, 4)
    begin = torch.tensor(first or (0, 0))[:, None]
    place = torch.arange(40)
    reads = ((place < begin + 3) | (place >= 40 - 11)) & (place >= begin)
    state = Recent(window=11, sinks=3).start()
    out = state.attend(q, k, v, None if first is None else begin[:, 0], 8**-0.5)
    close(out, truth(q, k, v, reads[:, None, None]))
    assert state.read is not None and int(state.read) == 2 * int(reads.sum())


def test_windows_of_the_mask() -> None:
    q, k, v = draw(1, 1, 2, 4, 24, 5)
    mask = Mask(left=5, right=0, offset=20)
    out = decode(q, k, v, whole(torch.tensor([24]), 1, 24, 3, 8), mask=mask)
    close(out, truth(q, k, v, mask.allowed(torch.arange(4), torch.arange(24), 24)))


def test_gradients_reach_queries_keys_and_values() -> None:
    q, k, v = (x.double().requires_grad_() for x in draw(1, 2, 2, 1, 9, 7, d=3))
    work = whole(torch.tensor([9]), 2, 9, 3, 4)
    assert torch.autograd.gradcheck(lambda q, k, v: decode(q, k, v, work).o, (q, k, v))


def test_mistakes_say_what_fits() -> None:
    q, k, v = draw(2, 2, 2, 1, 16, 6)
    with pytest.raises(UsageError, match="rows"):
        decode(q, k, v, whole(torch.tensor([16]), 2, 16, 2))
    with pytest.raises(UsageError, match="heads divide"):
        decode(q[:, :3], k, v, whole(torch.tensor([16, 16]), 2, 16, 2))
    with pytest.raises(RefusedError, match="float64"):
        decode(*(x.double() for x in (q, k, v)), whole(torch.tensor([16, 16]), 2, 16, 2), backend="triton")
    with pytest.raises(UsageError, match="pieces"):
        split(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), 0)
