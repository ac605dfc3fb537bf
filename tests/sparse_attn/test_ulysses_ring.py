"""Two ranks give what one gives: Ulysses and ring, dense and planned, equal and unequal shards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, multiprocessing

from hasten.errors import UsageError
from hasten.sparse_attn.attention import sparse_attention
from hasten.sparse_attn.blocks import Blocks, Order, uniform
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.pack import pack
from hasten.sparse_attn.plan import Output, Plan
from hasten.sparse_attn.ranks import ring, ulysses

BLOCK = 8
SHARDS = {"equal": (24, 24), "unequal": (16, 40)}
HEADS = {"grouped": (4, 2), "one key head": (4, 1), "three key heads": (6, 3)}


def draw(tokens: int, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads[0], tokens, 8, generator=g)
    return q, torch.randn(2, heads[1], tokens, 8, generator=g), torch.randn(2, heads[1], tokens, 8, generator=g)


def order(tokens: int) -> Order:
    return Order(None, uniform(tokens, BLOCK), torch.zeros(-(-tokens // BLOCK), dtype=torch.int8), tokens=tokens)


def keep(tokens: int) -> Tensor:
    """Kept blocks of the whole sequence, alike for all heads: bool [1, C, C]; the second block of queries reads
    nothing."""
    chosen = torch.rand(1, tokens // BLOCK, tokens // BLOCK, generator=torch.Generator().manual_seed(1)) < 0.5
    chosen[:, 1] = False
    return chosen


def plan(q: Tensor, k: Tensor, chosen: Tensor, offset: int) -> Plan:
    """The plan for a shard of queries and one of keys that begins `offset` places after it (negative: before)."""
    blocks = Blocks(order(q.shape[2]), order(k.shape[2]))
    heads = (q.shape[0], q.shape[1], k.shape[1])
    return pack(blocks, chosen, heads, block_m=16, block_n=16, mask=Mask(left=None, right=0, offset=-offset))


def whole(q: Tensor, k: Tensor, v: Tensor) -> Output:
    return sparse_attention(q, k, v, plan(q, k, keep(q.shape[2]), 0), backend="torch")


def work(rank: int, folder: str, port: int) -> None:
    """One rank: its shard of every case, through both ways."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    group = torch.distributed.group.WORLD
    found = {}
    try:
        for shard, lengths in SHARDS.items():
            starts = (0, lengths[0])
            own = slice(starts[rank], starts[rank] + lengths[rank])
            for name, heads in HEADS.items():
                q, k, v = draw(sum(lengths), heads)
                mine = (q[:, :, own], k[:, :, own], v[:, :, own])

                def step(  # type: ignore[no-untyped-def]
                    q: Tensor, k: Tensor, v: Tensor, source: int, starts=starts, lengths=lengths
                ) -> Output | None:
                    if source > rank:
                        return None  # all of the future
                    at = [slice(starts[r] // BLOCK, (starts[r] + lengths[r]) // BLOCK) for r in (rank, source)]
                    chosen = keep(sum(lengths))[:, at[0], at[1]]
                    return sparse_attention(q, k, v, plan(q, k, chosen, starts[source] - starts[rank]), backend="torch")

                for way, out in (
                    ("ulysses", ulysses(*mine, whole, group, lengths)),
                    ("ring", ring(*mine, step, group, lengths)),
                ):
                    found[f"{way} {shard} {name}"] = (out.o, out.lse)
        try:
            ulysses(torch.zeros(1, 3, 4, 8), torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), whole, group)
        except UsageError as error:
            found["refusal"] = str(error)
        torch.save(found, Path(folder, f"{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[Tensor, Tensor]]]:
    folder = tmp_path_factory.mktemp("attention-ranks")
    multiprocessing.spawn(work, (str(folder), 31500 + os.getpid() % 2000), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("way", ["ulysses", "ring"])
def test_two_ranks_give_what_one_gives(ranks: list, way: str, shard: str, name: str) -> None:  # type: ignore[type-arg]
    alone = whole(*draw(sum(SHARDS[shard]), HEADS[name]))
    o, lse = (torch.cat([found[f"{way} {shard} {name}"][part] for found in ranks], 2) for part in range(2))
    torch.testing.assert_close(o, alone.o, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, alone.lse, rtol=1e-5, atol=1e-5)
    assert (lse[:, :, BLOCK : 2 * BLOCK] == float("-inf")).all(), "queries that read nothing stay empty"


def test_heads_that_do_not_divide_are_refused(ranks: list) -> None:  # type: ignore[type-arg]
    assert "Use ring()" in ranks[0]["refusal"]
