"""What single layouts claim: fit, neighbourhood and homogeneity. Clustering is in test_layouts_kmeans.py."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from hasten.errors import RecipeError
from hasten.part import parse
from hasten.sparse_attn.blocks import Order, uniform
from hasten.sparse_attn.layouts.curve import Curve, curve
from hasten.sparse_attn.layouts.layout import Identity, Layout
from hasten.sparse_attn.layouts.lsh import LSH, hashed
from hasten.sparse_attn.layouts.swap import Swap, rows, swapped
from hasten.sparse_attn.layouts.tiles import Tiles, best_tile, fill
from hasten.sparse_attn.layouts.tree import Tree, balanced, direction
from hasten.sparse_attn.segments import Tokens, plain, video
from tests.contract import seeded
from tests.sparse_attn.clusters import WAN_720, clustered, order, spread

WAN_480, HUNYUAN_720 = (21, 30, 52), (33, 45, 80)

grids = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))


def places(perm: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Frame, row and column of each token: float32 [n, 3]."""
    return torch.stack([perm // (grid[1] * grid[2]), perm // grid[2] % grid[1], perm % grid[2]], 1).float()


# --- tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "best", "cubes"),
    [(WAN_720, 0.9375, 0.8203), (WAN_480, 0.9375, 0.8203), (HUNYUAN_720, 0.9375, 0.8594)],
)
def test_the_best_tile_fills_more_than_cubes(grid: tuple[int, int, int], best: float, cubes: float) -> None:
    assert best_tile(grid, 64) == (3, 5, 4)
    assert fill(grid, (3, 5, 4), 64) == pytest.approx(best)
    assert fill(grid, (4, 4, 4), 64) == pytest.approx(cubes, abs=1e-4)


def test_a_long_tile_that_fills_more_does_not_win() -> None:
    assert fill(WAN_720, (21, 3, 1), 64) > fill(WAN_720, (7, 3, 3), 64) > fill(WAN_720, best_tile(WAN_720), 64)


def test_the_best_tile_of_an_image_is_flat_and_square() -> None:
    assert best_tile((1, 64, 64), 64) == (1, 8, 8)
    assert best_tile((1, 1, 100), 50) == (1, 1, 50)


@settings(max_examples=30, deadline=None)
@given(grid=grids, block=st.integers(1, 40))
def test_no_tile_is_larger_than_stated_or_than_the_grid(grid: tuple[int, int, int], block: int) -> None:
    tile = best_tile(grid, block)
    assert prod(tile) <= block and all(1 <= side <= limit for side, limit in zip(tile, grid, strict=True))
    assert 0 < fill(grid, tile, block) <= 1


@settings(max_examples=30, deadline=None)
@given(grid=grids, tile=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)))
def test_each_block_is_one_box(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> None:
    found = order(Tiles(tile=tile), seeded(0, 1, 1, prod(grid), 2), Tokens((video(*grid),)))
    assert found.perm is not None
    box = (places(found.perm[0], grid) // torch.tensor(tile)).long()
    labels = found.labels()[0]
    for block in range(found.count):
        assert int(found.sizes[0, block]) > 0
        assert (box[labels == block] == box[labels == block][0]).all()
    assert len({tuple(row) for row in box.tolist()}) == found.count


def test_groups_of_tiles_are_blocks_of_queries() -> None:
    x, tokens = seeded(0, 1, 1, 4 * 6 * 6, 2), Tokens((video(4, 6, 6),))
    blocks = Tiles(tile=(2, 2, 3), group=(1, 3, 2)).start().blocks(x, x, tokens, tokens)
    assert blocks.k.sizes.tolist() == [[12] * 12] and blocks.q.sizes.tolist() == [[72] * 2]


# --- swap and curve -------------------------------------------------------------------------------


def test_swapping_puts_all_frames_of_a_place_side_by_side() -> None:
    found = swapped((3, 2, 2), (1, 2, 0))[0]
    assert found.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


@pytest.mark.parametrize(
    ("length", "row", "block", "sizes"),
    [(24, 3, 7, [6, 6, 6, 6]), (20, 10, 4, [3, 3, 4, 3, 3, 4]), (6, 3, 3, [3, 3]), (10, 5, 64, [10])],
)
def test_blocks_end_where_rows_end(length: int, row: int, block: int, sizes: list[int]) -> None:
    assert rows(length, row, block).diff().tolist() == [sizes]


def test_axes_that_are_no_permutation_are_refused() -> None:
    with pytest.raises(ValidationError, match="has to be there once"):
        Swap(axes=(0, 1, 1))
    with pytest.raises(RecipeError, match="has to be there once"):
        parse(Layout, {"kind": "swap", "axes": [0, 0, 2]}, "test")


@settings(max_examples=60, deadline=None)
@given(grid=grids)
def test_the_curve_visits_everything_once_and_steps_to_neighbours(grid: tuple[int, int, int]) -> None:
    found = curve(grid)[0]
    assert torch.equal(found.sort().values, torch.arange(prod(grid)))
    steps = places(found, grid).diff(dim=0).abs()
    if len(steps):
        assert float(steps.max()) == 1, "a jump"


@pytest.mark.parametrize("grid", [(4, 4, 4), (2, 8, 16), (1, 6, 10), (1, 9, 7), (8, 8, 8)])
def test_on_even_grids_no_step_is_diagonal(grid: tuple[int, int, int]) -> None:
    assert float(places(curve(grid)[0], grid).diff(dim=0).abs().sum(1).max()) == 1


def test_blocks_of_the_curve_are_compact_and_full() -> None:
    """Nearer to boxes than to rows; unlike boxes, all of them are full."""
    grid = (9, 15, 16)
    where = places(torch.arange(prod(grid)), grid)[None, None]
    tokens, found = Tokens((video(*grid),)), {}
    for part in (Identity(block=60), Curve(block=60), Tiles(block=60)):
        found[part.kind] = order(part, where, tokens)
    raster, curved, tiles = (float(spread(where, found[kind])) for kind in ("identity", "curve", "tiles"))
    assert tiles < curved < 0.25 * raster
    assert (found["curve"].sizes == 60).all()


# --- tree -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 90), block=st.integers(1, 20), planes=st.integers(1, 3))
def test_leaves_are_exactly_equal(n: int, block: int, planes: int) -> None:
    found = order(Tree(block=block), seeded(n, 1, planes, n, 4), plain(n))
    assert found.perm is not None and torch.equal(found.bounds, uniform(n, block))
    assert torch.equal(found.perm.sort(-1).values, torch.arange(n).expand(planes, n))


def test_leaves_are_far_more_homogeneous_than_the_raster() -> None:
    x, owner = clustered(3, 16, 16)
    found = order(Tree(block=16), x, plain(256))
    assert (spread(x, found) < 0.1 * spread(x, Order(None, uniform(256, 16), found.roles))).all()
    assert found.perm is not None
    pure = [len(set(owner[row].tolist())) == 1 for plane in found.perm for row in plane.view(16, 16)]
    assert sum(pure) >= 0.8 * len(pure)


def test_one_split_is_along_the_leading_direction() -> None:
    x = seeded(0, 1, 64, 6) * torch.tensor([1.0, 5.0, 1.0, 1.0, 1.0, 1.0])
    lower = set(balanced(x, 32)[0, :32].tolist())
    by_axis = set(x[0, :, 1].argsort()[:32].tolist())
    assert max(len(lower & by_axis), 32 - len(lower & by_axis)) >= 30


def test_the_direction_is_the_leading_eigenvector() -> None:
    x = seeded(1, 5, 40, 7) * torch.linspace(0.2, 3, 7)
    leading = torch.linalg.eigh(x.mT @ x).eigenvectors[..., -1]
    cosine = (direction(x.mT @ x, 40) * leading).sum(1).abs()
    torch.testing.assert_close(cosine, torch.ones(5), rtol=0, atol=1e-3)
    assert torch.equal(direction(torch.zeros(1, 3, 3), 4), torch.zeros(1, 3))
    assert torch.equal(direction(torch.diag(torch.tensor([1.0, 5.0, 2.0])), 4), torch.tensor([0.0, 1.0, 0.0]))


# --- LSH ------------------------------------------------------------------------------------------


def test_one_direction_has_one_hash_and_opposite_ones_differ() -> None:
    x, directions = seeded(0, 1, 50, 8), seeded(1, 8, 7)
    rank = hashed(x, directions)
    assert torch.equal(rank, hashed(7.5 * x, directions))
    assert (rank != hashed(-x, directions)).all()
    assert int(rank.min()) >= 0 and int(rank.max()) < 2**7


def test_neighbouring_hashes_differ_in_one_sign() -> None:
    """All 16 combinations of four signs, as tokens along the axes."""
    signs = torch.tensor([[1.0 if number >> bit & 1 else -1.0 for bit in range(4)] for number in range(16)])
    rank = hashed(signs[None], torch.eye(4))[0].long()
    assert sorted(rank.tolist()) == list(range(16))
    assert ((signs[rank.argsort()].diff(dim=0) != 0).sum(1) == 1).all()


def test_queries_and_keys_that_are_alike_have_blocks_of_one_number() -> None:
    x, tokens = seeded(0, 1, 2, 64, 16), plain(64)
    blocks = LSH(block=16).start().blocks(x, 2 * x, tokens, tokens)
    assert blocks.q.perm is not None and blocks.k.perm is not None and torch.equal(blocks.q.perm, blocks.k.perm)
