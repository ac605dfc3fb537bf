"""The packer against a naive one: which keys every single query reads, and all that a plan promises."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn import pack_chunks
from hasten.sparse_attn.blocks import SELECT, SPARSE, Blocks, Order, grouped, uniform
from hasten.sparse_attn.extent import FULL, block_states, positions
from hasten.sparse_attn.mask import Mask, causal
from hasten.sparse_attn.pack import _bounded_tiles, _exact_tiles, pack
from hasten.sparse_attn.plan import Plan
from tests.sparse_attn.random_blocks import Case, cases, masks


def reads_of_map(case: Case, mask: Mask | None) -> Tensor:
    """bool [Pq, Sq, Sk] by arranged places: what the map and the mask say, one pair of tokens at a time."""
    q, k = case.blocks.q, case.blocks.k
    found = torch.zeros(case.planes, q.length, k.length, dtype=torch.bool)
    for plane in range(case.planes):
        own = plane // case.groups
        q_block, k_block = q.labels()[plane % q.bounds.shape[0]], k.labels()[own % k.bounds.shape[0]]
        keep = case.keep[plane % case.keep.shape[0]]
        found[plane] = keep[q_block][:, k_block]
        if mask is not None:
            q_at, k_at = places(q, plane), places(k, own)
            found[plane] &= mask.allowed(q_at, k_at, k.length)
    return found


def places(order: Order, plane: int) -> Tensor:
    return torch.arange(order.length) if order.perm is None else order.perm[plane % order.perm.shape[0]]


def reads_of_plan(plan: Plan, case: Case) -> Tensor:
    """The same from a plan, walking through it as a kernel does, and checking what the plan promises."""
    planes = plan.heads[0] * plan.heads[1]
    found = torch.zeros(planes, plan.queries, plan.keys, dtype=torch.bool)
    covered = torch.zeros(planes, plan.queries, dtype=torch.int64)
    for tile in range(plan.tile_start.numel()):
        start, length = int(plan.tile_start[tile]), int(plan.tile_length[tile])
        if length == 0:
            continue
        plane, row = int(plan.tile_plane[tile]), int(plan.tile_row[tile])
        assert 0 < length <= plan.block_m
        queries = slice(start, start + length)
        covered[plane, queries] += 1
        begin, full, end = int(plan.row_start[row]), int(plan.row_full[row]), int(plan.row_end[row])
        assert begin <= full <= end
        for chunk in range(begin, end):
            first, size = int(plan.chunk_start[chunk]), int(plan.chunk_length[chunk])
            assert 0 < size <= plan.block_n
            assert size == plan.block_n or chunk >= full
            own = torch.ones(length, size, dtype=torch.bool)
            if plan.mask is not None:
                q_at = places(case.blocks.q, plane)[queries]
                k_at = places(case.blocks.k, plane // case.groups)[first : first + size]
                own = plan.mask.allowed(q_at, k_at, plan.keys)
                assert own.all() or chunk >= full, "a full chunk needs no mask"
            assert not found[plane, queries, first : first + size].any(), "no key is read twice"
            found[plane, queries, first : first + size] |= own
    assert (covered == 1).all(), "every query belongs to one tile"
    return found


@given(cases(), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_every_query_reads_what_the_map_says(case: Case, block_m: int, block_n: int) -> None:
    plan = pack(case.blocks, case.keep, case.heads, block_m=block_m, block_n=block_n)
    assert torch.equal(reads_of_plan(plan, case), reads_of_map(case, None))


@given(cases(), st.data(), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_every_query_reads_what_the_map_and_the_mask_say(case: Case, data: st.DataObject, block_n: int) -> None:
    mask = data.draw(masks(case.blocks.q.length, case.blocks.k.length))
    plan = pack(case.blocks, case.keep, case.heads, block_m=5, block_n=block_n, mask=mask)
    assert torch.equal(reads_of_plan(plan, case), reads_of_map(case, mask))


@given(cases(), st.data(), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_without_counting_the_same_chunks_are_found(case: Case, data: st.DataObject, block_n: int) -> None:
    keys = case.blocks.k.length
    mask = data.draw(st.one_of(st.none(), masks(case.blocks.q.length, keys)))
    bounds = grouped(case.blocks.k.bounds, case.groups)
    planes = max(case.keep.shape[0], bounds.shape[0])
    whole, split = case.keep.expand(planes, -1, -1), None
    if mask is not None:
        state = block_states(case.blocks, mask, case.groups)
        whole, split = case.keep & (state == FULL), case.keep & (state == 1)
        bounds = bounds if bounds.shape[0] == 1 else bounds.expand(whole.shape[0], -1)
    exact = pack_chunks.exact(whole, split, bounds, block_n)
    bounded = pack_chunks.bounded(whole, split, bounds, block_n, keys)
    assert listed(exact) == listed(bounded)
    outside = torch.ones_like(bounded.length, dtype=torch.bool)
    for begin, end in zip(bounded.row_start.tolist(), bounded.row_end.tolist(), strict=True):
        outside[begin:end] = False
    assert not bounded.length[outside].any()


def listed(chunks: pack_chunks.Chunks) -> list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """Full and ragged chunks of each row, in order."""
    each = list(zip(chunks.start.tolist(), chunks.length.tolist(), strict=True))
    limits = zip(chunks.row_start.tolist(), chunks.row_full.tolist(), chunks.row_end.tolist(), strict=True)
    return [(each[start:full], each[full:end]) for start, full, end in limits]


@given(cases(), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_without_counting_the_same_tiles_are_found(case: Case, block_m: int) -> None:
    order = case.blocks.q
    exact = torch.stack(_exact_tiles(order, case.planes, block_m), 1)
    bounded = torch.stack(_bounded_tiles(order, case.planes, block_m, order.length), 1)
    assert torch.equal(bounded[bounded[:, 1] > 0], exact)


@given(cases(plain=True))
@settings(max_examples=40, deadline=None)
def test_tiles_with_most_chunks_come_first(case: Case) -> None:
    plan = pack(case.blocks, case.keep, case.heads, block_m=4, block_n=4)
    work = (plan.row_end - plan.row_start)[plan.tile_row.long()]
    assert torch.equal(work, work.sort(descending=True).values)


def test_rows_are_shared_by_planes_that_read_the_same() -> None:
    blocks = even(64, 8)
    shared = pack(blocks, torch.eye(8, dtype=torch.bool)[None], (2, 3, 3), block_m=8, block_n=8)
    own = pack(blocks, torch.eye(8, dtype=torch.bool).expand(6, -1, -1), (2, 3, 3), block_m=8, block_n=8)
    assert shared.row_start.numel() == 8
    assert own.row_start.numel() == 48
    assert shared.tile_start.numel() == own.tile_start.numel() == 48
    assert shared.num_bytes() < own.num_bytes()


def test_neighbouring_blocks_are_one_range() -> None:
    keep = torch.tensor([[[True, True, True, False]]])
    bounds = torch.tensor([[0, 3, 7, 10, 12]], dtype=torch.int32)
    plan = pack(Blocks(order(12, uniform(12, 12)), order(12, bounds)), keep, (1, 1, 1), block_m=16, block_n=4)
    assert plan.chunk_start.tolist() == [0, 4, 8]
    assert plan.chunk_length.tolist() == [4, 4, 2]
    assert plan.row_full.tolist() == [2]


def test_a_block_without_tokens_does_not_part_its_neighbours() -> None:
    bounds = torch.tensor([[0, 3, 3, 8]], dtype=torch.int32)
    keep = torch.tensor([[[True, False, True]]])
    plan = pack(Blocks(order(8, uniform(8, 8)), order(8, bounds)), keep, (1, 1, 1), block_m=8, block_n=4)
    assert (plan.chunk_start.tolist(), plan.chunk_length.tolist()) == ([0, 4], [4, 4])


def test_pairs_that_a_causal_mask_forbids_are_not_in_the_plan() -> None:
    everything = torch.ones(1, 8, 8, dtype=torch.bool)
    plan = pack(even(64, 8), everything, (1, 1, 1), block_m=8, block_n=8, mask=causal(64, 64))
    full, ragged = plan.row_full - plan.row_start, plan.row_end - plan.row_full
    assert full.tolist() == list(range(8))
    assert ragged.tolist() == [1] * 8


def test_a_known_state_of_the_mask_is_used() -> None:
    everything, mask = torch.ones(1, 8, 8, dtype=torch.bool), causal(64, 64)
    state = block_states(even(64, 8), mask)
    plain = pack(even(64, 8), everything, (1, 1, 1), block_m=8, block_n=8, mask=mask)
    given_state = pack(even(64, 8), everything, (1, 1, 1), block_m=8, block_n=8, mask=mask, block_state=state)
    nothing = pack(
        even(64, 8), everything, (1, 1, 1), block_m=8, block_n=8, mask=mask, block_state=torch.zeros_like(state)
    )
    assert torch.equal(plain.chunk_start, given_state.chunk_start)
    assert nothing.chunk_start.numel() == 0


@given(cases())
@settings(max_examples=30, deadline=None)
def test_positions_are_those_of_the_tokens(case: Case) -> None:
    order = case.blocks.q
    first, last = positions(order)
    labels = order.labels()
    for plane in range(first.shape[0]):
        for block in range(order.count):
            own = places(order, plane)[labels[plane % labels.shape[0]] == block]
            if own.numel():
                assert (int(first[plane, block]), int(last[plane, block])) == (int(own.min()), int(own.max()))
            else:
                assert first[plane, block] > last[plane, block]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": (1, 3, 2)}, "multiple"),
        ({"keep": torch.ones(3, 8, 8, dtype=torch.bool)}, "3 planes"),
        ({"keep": torch.ones(1, 8, 7, dtype=torch.bool)}, r"\[1, 8, 7\]"),
        ({"keep": torch.ones(1, 8, 8)}, "float32"),
        ({"block_n": 0}, "1 or more"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"keep": torch.ones(1, 8, 8, dtype=torch.bool), "heads": (1, 2, 1)} | change
    with pytest.raises(UsageError, match=message):
        pack(even(64, 8), **arguments)  # type: ignore[arg-type]


def test_packing_8192_tokens_of_8_heads_takes_milliseconds() -> None:
    blocks = even(8192, 64)
    keep = torch.rand(8, 128, 128, generator=torch.Generator().manual_seed(0)) < 0.2
    pack(blocks, keep, (1, 8, 8))
    times = []
    for _ in range(5):
        begin = time.process_time()
        pack(blocks, keep, (1, 8, 8))
        times.append(time.process_time() - begin)
    assert min(times) < 0.02, f"{min(times) * 1e3:.1f} ms"


def order(length: int, bounds: Tensor, role: int = SPARSE) -> Order:
    return Order(None, bounds, torch.full((bounds.shape[1] - 1,), role, dtype=torch.int8), None, length)


def even(length: int, block: int) -> Blocks:
    side = order(length, uniform(length, block))
    return Blocks(side, replace(side, roles=torch.full_like(side.roles, SELECT)))
