"""What every layout must do. The contract runs over all members of the family: a new layout inherits it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.errors import RefusedError, UsageError
from hasten.sparse_attn.blocks import ALWAYS, DENSE, NEVER, NONE, SELECT, SPARSE, Order
from hasten.sparse_attn.layouts.curve import Curve
from hasten.sparse_attn.layouts.kmeans import KMeans
from hasten.sparse_attn.layouts.layout import EDGE, Blocked, Identity, Layout, StaticState
from hasten.sparse_attn.layouts.lsh import LSH
from hasten.sparse_attn.layouts.swap import Swap
from hasten.sparse_attn.layouts.tiles import Tiles
from hasten.sparse_attn.layouts.tree import Tree
from hasten.sparse_attn.segments import Tokens, padding, plain, reference, text, video
from tests.contract import PartContract, seeded

SMALL: dict[str, list[Layout]] = {
    "identity": [Identity(block=5), Identity(block=3, q_block=7)],
    "tiles": [Tiles(block=6), Tiles(tile=(2, 3, 2)), Tiles(tile=(1, 2, 2), group=(2, 1, 3))],
    "swap": [Swap(block=4), Swap(axes=(2, 0, 1), block=3), Swap(axes=(0, 2, 1), block=4, aligned=False)],
    "curve": [Curve(block=5, q_block=9)],
    "kmeans": [
        KMeans(q_size=7, k_size=3, first=3),
        KMeans(q_clusters=4, k_clusters=300, init="random", outliers=0.1, first=2, warm=1, sample=1),
        KMeans(k_size=5, metric="cosine", first=2, outliers=0.3, seed=3, sample=3),
    ],
    "tree": [Tree(block=4, q_block=6), Tree(block=1, q_block=None, iterations=2)],
    "lsh": [LSH(block=6, projections=3), LSH(block=5, q_block=8, projections=9, seed=2)],
}
"""Layouts whose blocks are small enough for tens of tokens, next to the one with default arguments."""

NEED_GRID = {"tiles", "swap", "curve"}


def members() -> list[Any]:
    found = []
    for kind, member in sorted(Layout.members().items()):
        for number, part in enumerate([member(), *SMALL.get(kind, [])]):
            found.append(pytest.param(part, id=f"{kind}-{number}"))
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tokens, Tensor]:
    """A video with text, references and padding around it, and a tensor for it."""
    grid = (draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 7)))
    heads = (draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    around = [text(draw(st.integers(0, 70))), reference(draw(st.integers(0, 3))), padding(draw(st.integers(0, 2)))]
    if draw(st.booleans()):
        around.append(text(4, "prompt", valid=torch.tensor([draw(st.integers(0, 4)) for _ in range(heads[0])])))
    before = draw(st.integers(0, len(around)))
    tokens = Tokens((*around[:before], video(*grid), *around[before:]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    return tokens, seeded(draw(st.integers(0, 99)), *heads, tokens.length, 5, dtype=dtype)


def orders(part: Layout, tokens: Tokens, x: Tensor, state: Any = None) -> dict[str, Order]:
    blocks = (state or part.start()).blocks(x, x, tokens, tokens)
    return {"q": blocks.q, "k": blocks.k}


def same(a: Order, b: Order) -> bool:
    perms = a.perm is b.perm is None or (a.perm is not None and b.perm is not None and torch.equal(a.perm, b.perm))
    return perms and torch.equal(a.bounds, b.bounds) and torch.equal(a.roles, b.roles)


@contextmanager
def untouched(x: Tensor) -> Iterator[None]:
    """Neither x nor the global generator changes inside."""
    before, random = x.clone(), torch.get_rng_state()
    yield
    assert torch.equal(torch.nan_to_num(x), torch.nan_to_num(before)), "the input was changed"
    assert torch.equal(torch.get_rng_state(), random), "the global generator was used"


class NoWaiting(TorchDispatchMode):
    """Raises where a GPU would have to be waited for: a number is read, a shape depends on numbers, or numbers of the host
    are copied to it (`torch.tensor`)."""

    READS = (
        "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal", "is_nonzero",
        "lift_fresh",
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.READS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


class LayoutContract(PartContract):
    family = Layout

    @settings(max_examples=8, deadline=None)
    @given(case=cases())
    def test_orders_are_permutations_within_segments(self, part: Layout, case: tuple[Tokens, Tensor]) -> None:
        tokens, x = case
        planes = x.shape[0] * x.shape[1]
        with untouched(x):
            found = orders(part, tokens, x)
        for order in found.values():
            assert order.length == order.tokens == tokens.length
            assert order.bounds.dtype == torch.int32 and order.roles.dtype == torch.int8
            assert order.bounds.shape[0] in (1, planes) and order.bounds.shape[1] == order.count + 1
            assert (order.bounds[:, 0] == 0).all() and (order.bounds[:, -1] == tokens.length).all()
            assert (order.sizes >= 0).all()
            places = torch.arange(tokens.length)
            perm = order.perm if order.perm is not None else places[None]
            assert perm.dtype == torch.int64 and perm.shape[0] in (1, planes)
            for start, segment in zip(tokens.starts, tokens.segments, strict=True):
                inside = perm[:, start : start + segment.length].sort(-1).values
                assert torch.equal(inside, places[start : start + segment.length].expand_as(inside))
                assert (order.bounds == start).any(1).all(), f"a block straddles the start of {segment.name}"

    @settings(max_examples=8, deadline=None)
    @given(case=cases())
    def test_sizes_and_roles_are_as_stated(self, part: Layout, case: tuple[Tokens, Tensor]) -> None:
        tokens, x = case
        for side, order in orders(part, tokens, x).items():
            wanted = role_by_token(tokens, side, x.shape[:2])
            labels = order.labels().expand(wanted.shape)
            perm = order.perm if order.perm is not None else torch.arange(tokens.length)[None]
            roles = torch.empty_like(wanted).scatter_(1, perm.expand(wanted.shape), order.roles.long()[labels])
            if isinstance(part, KMeans) and part.outliers and side == "k":
                apart = (roles == ALWAYS) & (wanted == SELECT)
                grid = next(segment for segment in tokens.segments if segment.grid)
                assert (apart.sum(1) == round(part.outliers * grid.length)).all()
                wanted = torch.where(apart, roles, wanted)
            assert torch.equal(roles, wanted)
            limit = stated(part, side, tokens)
            selected = order.sizes[:, order.roles == (SPARSE if side == "q" else SELECT)]
            assert limit is None or int(selected.max()) <= max(limit, EDGE if side == "q" else 0)

    @settings(max_examples=8, deadline=None)
    @given(case=cases())
    def test_restoring_undoes_arranging_and_means_are_means(self, part: Layout, case: tuple[Tokens, Tensor]) -> None:
        tokens, x = case
        for order in orders(part, tokens, x).values():
            arranged = order.arrange(x)
            assert torch.equal(order.restore(arranged), x)
            assert torch.equal(order.restore(arranged[..., 0]), x[..., 0])
            if order.means is not None:
                torch.testing.assert_close(order.means, order.mean(arranged), rtol=1e-5, atol=1e-5)

    @settings(max_examples=5, deadline=None)
    @given(case=cases(), plane=st.integers(0, 5))
    def test_a_plane_does_not_depend_on_the_others(self, part: Layout, case: tuple[Tokens, Tensor], plane: int) -> None:
        tokens, x = case
        b, h = plane % x.shape[0], plane % x.shape[1]
        alone = Tokens(tuple(one_sample(segment, b) for segment in tokens.segments))
        whole, single = orders(part, tokens, x), orders(part, alone, x[b : b + 1, h : h + 1])
        for side in "qk":
            assert same(of_plane(whole[side], b * x.shape[1] + h), of_plane(single[side], 0))

    @settings(max_examples=5, deadline=None)
    @given(case=cases())
    def test_states_share_nothing_and_repeat_themselves(self, part: Layout, case: tuple[Tokens, Tensor]) -> None:
        tokens, x = case
        fresh = orders(part, tokens, x)
        used, other = part.start(), part.start()
        orders(part, tokens, -x.flip(2), used)
        orders(part, tokens, 3 * x + 1, used)
        again, strided = orders(part, tokens, x, other), x.transpose(1, 2).contiguous().transpose(1, 2)
        for side in "qk":
            assert same(fresh[side], again[side]), "another run of the same part leaked in"
            assert same(fresh[side], orders(part, tokens, strided)[side]), "depends on strides"
            perm = orders(part, tokens, x, used)[side].perm
            assert perm is None or torch.equal(perm.sort(-1).values, torch.arange(tokens.length).expand_as(perm))

    @settings(max_examples=5, deadline=None)
    @given(case=cases(), bad=st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0]), share=st.sampled_from([0.1, 1]))
    def test_bad_numbers_never_break_the_order(
        self, part: Layout, case: tuple[Tokens, Tensor], bad: float, share: float
    ) -> None:
        tokens, x = case
        state = part.start()
        poisoned = x.clone()
        poisoned[:, :, : max(1, int(share * tokens.length))] = bad
        for order in (*orders(part, tokens, poisoned, state).values(), *orders(part, tokens, x, state).values()):
            if order.perm is not None:
                assert torch.equal(order.perm.sort(-1).values, torch.arange(tokens.length).expand_as(order.perm))
            assert (order.sizes >= 0).all() and (order.bounds[:, -1] == tokens.length).all()

    def test_another_shape_begins_anew(self, part: Layout) -> None:
        state = part.start()
        for grid, heads in (((2, 4, 5), 2), ((3, 4, 5), 2), ((3, 4, 5), 3), ((1, 1, 1), 1)):
            tokens, x = Tokens((video(*grid),)), seeded(prod(grid), 1, heads, prod(grid), 4)
            found, fresh = orders(part, tokens, x, state), orders(part, tokens, x)
            assert all(same(found[side], fresh[side]) for side in "qk")

    def test_nothing_is_read_from_the_device(self, part: Layout) -> None:
        tokens, x = Tokens((text(3), video(2, 5, 7))), seeded(0, 1, 2, 73, 4)
        state = part.start()
        if isinstance(state, StaticState):
            orders(part, tokens, x, state)  # the order is made on the host, once
        with NoWaiting():
            orders(part, tokens, x, state)
            orders(part, tokens, x + 0.1, state)

    def test_what_is_held_is_counted(self, part: Layout) -> None:
        tokens, x = Tokens((video(2, 5, 7),)), seeded(0, 1, 2, 70, 4)
        state = part.start()
        assert state.num_bytes() == 0
        orders(part, tokens, x, state)
        held = state.num_bytes()
        orders(part, tokens, x, state)
        assert state.num_bytes() == held <= 40_000

    def test_a_segment_without_a_grid(self, part: Layout) -> None:
        tokens, x = plain(40), seeded(0, 1, 2, 40, 4)
        if part.kind in NEED_GRID:
            with pytest.raises(RefusedError, match="'tokens' of 40 tokens has no grid"):
                orders(part, tokens, x)
        else:
            assert orders(part, tokens, x)["q"].length == 40

    def test_queries_and_keys_may_differ_in_number(self, part: Layout) -> None:
        q, k = seeded(0, 2, 4, 12, 4), seeded(1, 2, 2, 30, 4)
        blocks = part.start().blocks(q, k, Tokens((video(1, 3, 4),)), Tokens((video(2, 3, 5),)))
        assert (blocks.q.length, blocks.k.length) == (12, 30)
        assert blocks.q.bounds.shape[0] in (1, 8) and blocks.k.bounds.shape[0] in (1, 4)


def role_by_token(tokens: Tokens, side: str, heads: tuple[int, ...]) -> Tensor:
    """The role that each token should have, from the segments alone: int64 [B * H, S]."""
    names = {"q": {"sparse": SPARSE, "dense": DENSE, "none": NONE}, "k": {"select": SELECT, "always": ALWAYS, "never": NEVER}}
    found = []
    for segment in tokens.segments:
        role = names[side][segment.queries if side == "q" else segment.keys]
        roles = torch.full((heads[0], segment.length), role)
        if segment.valid is not None:
            roles[torch.arange(segment.length) >= segment.valid[:, None]] = NONE if side == "q" else NEVER
        found.append(roles)
    return torch.cat(found, 1).repeat_interleave(heads[1], 0)


def stated(part: Layout, side: str, tokens: Tokens) -> int | None:
    """Most tokens of a block that the part promises; None: any number."""
    if isinstance(part, Tiles):
        grid = next(segment.grid for segment in tokens.segments if segment.grid)
        return prod(part.shape(grid, side))
    return part.size(side) if isinstance(part, Blocked) else None


def one_sample(segment: Any, b: int) -> Any:
    return segment if segment.valid is None else replace(segment, valid=segment.valid[b : b + 1])


def of_plane(order: Order, plane: int) -> Order:
    perm = None if order.perm is None else order.perm[plane % order.perm.shape[0]][None]
    return Order(perm, order.bounds[plane % order.bounds.shape[0]][None], order.roles)


class TestLayouts(LayoutContract):
    @pytest.fixture(params=members(), scope="class")
    def part(self, request: pytest.FixtureRequest) -> Layout:
        found: Layout = request.param
        return found


def test_segments_that_do_not_add_up_are_refused() -> None:
    x = seeded(0, 1, 1, 10, 4)
    with pytest.raises(UsageError, match="segments of q add up to 12 tokens and q has 10"):
        Identity().start().blocks(x, x, plain(12), plain(10))
    with pytest.raises(UsageError, match="segments of k add up to 0 tokens"):
        Identity().start().blocks(x, x[:, :, :0], plain(10), plain(0))


def test_what_all_planes_share_stays_shared() -> None:
    """A prompt of a different length in each sample makes bounds differ, not the order of the video."""
    tokens = Tokens((video(2, 3, 4), text(5, valid=torch.tensor([2, 5]))))
    order = orders(Tiles(block=4), tokens, seeded(0, 2, 3, 29, 4))["k"]
    assert order.perm is not None and order.perm.shape == (1, 29) and order.bounds.shape[0] == 6
    assert order.sizes[:, -1].tolist() == [3, 3, 3, 0, 0, 0]


def test_means_of_other_segments_are_made_where_one_has_them() -> None:
    tokens, x = Tokens((text(70), video(2, 3, 4), text(3, "end"))), seeded(0, 2, 2, 97, 4)
    order = orders(KMeans(k_size=6), tokens, x)["k"]
    assert order.means is not None and order.means.shape == (4, 2 + 4 + 1, 4)
    torch.testing.assert_close(order.means[:, 0], x[:, :, :64].mean(2).flatten(0, 1))
