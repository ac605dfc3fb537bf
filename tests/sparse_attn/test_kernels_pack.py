"""The chunk lists of the packing kernel against those of the torch version, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from hasten.errors import UsageError
from hasten.sparse_attn import pack_chunks
from hasten.sparse_attn.kernels import pack


def case(seed: int, planes: int, shared: bool, q_blocks: int, count: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks read whole, blocks that a mask splits, and bounds, some of them of empty blocks."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, keys + 1, (1 if shared else planes, count - 1), generator=generator)
    ends = torch.tensor([[0, keys]]).expand(cuts.shape[0], 2)
    bounds = torch.cat([cuts, ends], 1).sort(1).values.int()
    density = torch.rand(planes, q_blocks, 1, generator=generator)
    keep = torch.rand(planes, q_blocks, count, generator=generator) < density
    splits = torch.rand(planes, q_blocks, count, generator=generator) < 0.4
    return keep & ~splits, keep & splits, bounds


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), planes=st.integers(1, 3), shared=st.booleans(), q_blocks=st.integers(1, 3),
    count=st.integers(1, 40), keys=st.integers(1, 300), block_n=st.sampled_from([16, 48, 64]), masked=st.booleans(),
)  # fmt: skip
def test_place_by_place_the_torch_version(
    seed: int, planes: int, shared: bool, q_blocks: int, count: int, keys: int, block_n: int, masked: bool
) -> None:
    whole, split, bounds = case(seed, planes, shared, q_blocks, count, keys)
    given_split = split if masked else None
    found = pack.fill(whole, given_split, bounds, block_n, keys)
    wanted = pack_chunks.bounded(whole, given_split, bounds, block_n, keys)
    for name, ours, theirs in zip(found._fields, found, wanted, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


def test_rows_read_exactly_what_was_chosen() -> None:
    """Written out token by token, apart from the torch version: every key once, no mask asked where none is needed."""
    whole, split, bounds = case(5, 2, False, 3, 20, 200)
    found = pack.fill(whole, split, bounds, 32, 200)
    for row in range(6):
        plane, block = divmod(row, 3)
        wanted = {
            token: bool(whole[plane, block, j])
            for j in range(20) if whole[plane, block, j] | split[plane, block, j]
            for token in range(int(bounds[plane, j]), int(bounds[plane, j + 1]))
        }  # fmt: skip
        read: list[int] = []
        for i in range(int(found.row_start[row]), int(found.row_end[row])):
            start, length = int(found.start[i]), int(found.length[i])
            assert 0 < length <= 32
            if i < found.row_full[row]:
                assert length == 32 and all(wanted[token] for token in range(start, start + 32))
            read += range(start, start + length)
        assert len(read) == len(set(read)) and set(read) == set(wanted)


def test_everything_nothing_and_one() -> None:
    bounds = torch.tensor([[0, 50, 64, 130]], dtype=torch.int32)
    everything = pack.fill(torch.ones(1, 1, 3, dtype=torch.bool), None, bounds, 64, 130)
    assert everything.start[:3].tolist() == [0, 64, 128] and everything.length[:3].tolist() == [64, 64, 2]
    assert int(everything.row_full[0]) == 2 and int(everything.row_end[0]) == 3
    nothing = pack.fill(torch.zeros(1, 1, 3, dtype=torch.bool), None, bounds, 64, 130)
    assert torch.equal(nothing.row_start, nothing.row_end)
    one = pack.fill(torch.tensor([[[False, True, False]]]), None, bounds, 64, 130)
    assert one.start[0] == 50 and one.length[0] == 14 and one.row_full[0] == 0 and one.row_end[0] == 1


def test_an_empty_block_does_not_part_its_neighbours() -> None:
    bounds = torch.tensor([[0, 40, 40, 80]], dtype=torch.int32)
    found = pack.fill(torch.tensor([[[True, False, True]]]), None, bounds, 64, 80)
    assert found.start[:2].tolist() == [0, 64] and found.length[:2].tolist() == [64, 16]


def test_refuses_more_blocks_than_it_can_hold() -> None:
    many = torch.zeros(1, 1, pack.MOST_BLOCKS + 1, dtype=torch.bool)
    with pytest.raises(UsageError, match="at most"):
        pack.fill(many, None, torch.zeros(1, pack.MOST_BLOCKS + 2, dtype=torch.int32), 64, 64)
