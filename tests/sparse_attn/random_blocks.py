"""Random block structures for property tests: empty blocks, one-token blocks, orders per plane, all roles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from hasten.sparse_attn.blocks import ALWAYS, DENSE, NEVER, NONE, SELECT, SPARSE, Blocks, Order
from hasten.sparse_attn.mask import Mask


@dataclass(frozen=True)
class Case:
    """A layout of both sides, and a map of what is read. heads: (B, Hq, Hk)."""

    heads: tuple[int, int, int]
    blocks: Blocks
    keep: Tensor
    seed: int

    @property
    def groups(self) -> int:
        return self.heads[1] // self.heads[2]

    @property
    def planes(self) -> int:
        return self.heads[0] * self.heads[1]


@st.composite
def orders(draw: st.DrawFn, planes: int, length: int, roles: tuple[int, ...], count: int) -> Order:
    """`count` blocks of `length` tokens, shared or one by plane, in their order or permuted."""
    own = planes if draw(st.booleans()) else 1
    cuts = [sorted(draw(st.lists(st.integers(0, length), min_size=count - 1, max_size=count - 1))) for _ in range(own)]
    bounds = torch.tensor([[0, *cut, length] for cut in cuts], dtype=torch.int32)
    perm = None
    if draw(st.booleans()):
        shared = 1 if draw(st.booleans()) else planes
        seed = draw(st.integers(0, 99))
        perm = torch.stack([torch.randperm(length, generator=generator(seed + p)) for p in range(shared)])
    found = torch.tensor(draw(st.lists(st.sampled_from(roles), min_size=count, max_size=count)), dtype=torch.int8)
    return Order(perm, bounds, found, None, length)


@st.composite
def cases(draw: st.DrawFn, *, plain: bool = False) -> Case:
    """plain: all blocks are sparse and selectable."""
    b, hk, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3]))
    sq, sk = draw(st.integers(1, 40)), draw(st.integers(1, 50))
    cq, ck = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    q_roles = (SPARSE,) if plain else (SPARSE, SPARSE, DENSE, NONE)
    k_roles = (SELECT,) if plain else (SELECT, SELECT, ALWAYS, NEVER)
    q = draw(orders(b * hk * groups, sq, q_roles, cq))
    k = draw(orders(b * hk, sk, k_roles, ck))
    planes = b * hk * groups if draw(st.booleans()) else 1
    seed = draw(st.integers(0, 999))
    keep = torch.rand(planes, cq, ck, generator=generator(seed)) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    return Case((b, hk * groups, hk), Blocks(q, k), keep, seed)


@st.composite
def masks(draw: st.DrawFn, queries: int, keys: int) -> Mask:
    side = st.one_of(st.none(), st.integers(0, 20))
    tree = None
    if draw(st.booleans()):
        width = draw(st.integers(1, keys))
        tree = torch.rand(queries, width, generator=generator(draw(st.integers(0, 99)))) < 0.5
    return Mask(draw(side), draw(side), draw(st.integers(-5, max(0, keys - queries) + 5)), tree)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))
