"""What single layouts claim: fit, neighbourhood, homogeneity, and the arithmetic of clustering."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from hasten.errors import RecipeError
from hasten.part import parse
from hasten.sparse_attn.blocks import ALWAYS, SELECT, Order, uniform
from hasten.sparse_attn.layouts.curve import Curve, curve
from hasten.sparse_attn.layouts.kmeans import KMeans, assign, lloyd, runs, update
from hasten.sparse_attn.layouts.layout import Identity, Layout
from hasten.sparse_attn.layouts.lsh import LSH, hashed
from hasten.sparse_attn.layouts.swap import Swap, rows, swapped
from hasten.sparse_attn.layouts.tiles import Tiles, best_tile, fill
from hasten.sparse_attn.layouts.tree import Tree, balanced, direction
from hasten.sparse_attn.segments import Tokens, plain, video
from tests.contract import seeded

WAN_720, WAN_480, HUNYUAN_720 = (21, 45, 80), (21, 30, 52), (33, 45, 80)

grids = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))


def order(part: Layout, x: Tensor, tokens: Tokens) -> Order:
    return part.start().blocks(x, x, tokens, tokens).k


def spread(x: Tensor, found: Order) -> Tensor:
    """Sum of squared distances of tokens to their block's mean, of each plane."""
    y = found.arrange(x).flatten(0, 1)
    means = found.mean(found.arrange(x))
    labels = found.labels().expand(y.shape[0], -1)
    return (y - means.gather(1, labels[..., None].expand_as(y))).square().sum((1, 2))


def places(perm: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Frame, row and column of each token: float32 [n, 3]."""
    return torch.stack([perm // (grid[1] * grid[2]), perm // grid[2] % grid[1], perm % grid[2]], 1).float()


def clustered(planes: int, clusters: int, size: int, d: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tight clusters in random order: x [1, planes, clusters * size, d] and the cluster of each token [n]."""
    owner = torch.arange(clusters).repeat(size)[torch.randperm(clusters * size, generator=torch.Generator().manual_seed(seed))]
    centres = 4 * seeded(seed, planes, clusters, d)
    return (centres[:, owner] + 0.1 * seeded(seed + 1, planes, clusters * size, d))[None], owner


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


# --- k-means --------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 60), count=st.integers(1, 20), offset=st.sampled_from([0.0, 300.0]))
def test_every_token_gets_its_nearest_centroid(n: int, count: int, offset: float) -> None:
    """Also where all tokens share an offset that is large beside their differences."""
    x, centroids = seeded(n, 2, n, 6) + offset, seeded(n + 1, 2, count, 6) + offset
    distances = torch.cdist(x.double(), centroids.double())
    chosen = distances.gather(2, assign(x, centroids)[..., None])[..., 0]
    torch.testing.assert_close(chosen, distances.min(-1).values, rtol=1e-4, atol=1e-4)


def test_distances_in_parts_are_the_same_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    x, centroids = seeded(0, 2, 57, 6), seeded(1, 2, 9, 6)
    whole = assign(x, centroids)
    monkeypatch.setattr("hasten.sparse_attn.layouts.kmeans.ROOM", {"cpu": 50})
    assert torch.equal(assign(x, centroids), whole)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 60), count=st.integers(1, 20))
def test_means_are_those_of_the_labels(n: int, count: int) -> None:
    x, old = seeded(n, 2, n, 6), torch.full((2, count, 6), 9.0)
    labels = torch.randint(count, (2, n), generator=torch.Generator().manual_seed(n))
    means, sizes = update(x, labels, count, old)
    for plane in range(2):
        for c in range(count):
            own = x[plane, labels[plane] == c]
            assert int(sizes[plane, c]) == len(own)
            wanted = own.mean(0) if len(own) else old[plane, c]
            torch.testing.assert_close(means[plane, c], wanted, rtol=1e-5, atol=1e-5)
    perm, bounds = runs(labels, count)
    assert torch.equal(labels.gather(1, perm), labels.sort(-1).values)
    assert torch.equal(bounds.diff(), sizes)


def test_passes_lower_the_inertia() -> None:
    x = seeded(0, 3, 300, 8)
    start = x[:, :20].clone()
    inertia = []
    for passes in (1, 2, 4, 8, 16):
        labels, means, _ = lloyd(x, start, passes)
        inertia.append((x - means.gather(1, labels[..., None].expand_as(x))).square().sum((1, 2)))
    assert all((later <= earlier * (1 + 1e-6)).all() for earlier, later in pairwise(inertia))
    assert (inertia[-1] < 0.95 * inertia[0]).all()


@pytest.mark.parametrize("init", ["tree", "random"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_clusters_are_tighter_than_any_order_of_equal_blocks(init: str, metric: str) -> None:
    x, _ = clustered(2, 8, 40)
    found = order(KMeans(k_size=20, init=init, metric=metric), x, plain(320))  # type: ignore[arg-type]
    assert (spread(x, found) < 0.2 * spread(x, Order(None, uniform(320, 20), found.roles))).all()


def test_numbers_of_clusters_are_those_of_the_paper() -> None:
    wan, part = prod(WAN_720), KMeans()
    assert (part.clusters(wan, "q"), part.clusters(wan, "k")) == (300, 995)
    fixed = KMeans(q_clusters=300, k_clusters=1000)
    assert (fixed.clusters(wan, "q"), fixed.clusters(wan, "k"), fixed.clusters(200, "k")) == (300, 1000, 200)
    assert part.clusters(1, "q") == 1


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 200), share=st.floats(0.01, 1), init=st.sampled_from(["tree", "random"]))
def test_clusters_begin_with_different_tokens(n: int, share: float, init: str) -> None:
    """Every token of the means that a call begins with is a token of its own: counted by tokens that are unit vectors."""
    count = max(1, int(share * n))
    found = KMeans(init=init, seed=n).begin(torch.eye(n)[None], count)[0]  # type: ignore[arg-type]
    assert found.shape == (count, n)
    torch.testing.assert_close(found.sum(1), torch.ones(count))
    assert ((found > 0).sum(0) <= 1).all() and len(set((found > 0).sum(1).tolist())) == 1


def test_later_calls_begin_with_the_clusters_of_the_one_before() -> None:
    """One pass from where the first call ended, not `first` passes from the start: labels keep their meaning."""
    x, tokens = clustered(2, 12, 20, seed=3)[0], plain(240)
    moved = x + 0.5 * seeded(9, *x.shape)
    state = KMeans(k_clusters=12, first=3, warm=1).start()
    before = state.blocks(x, x, tokens, tokens).k
    after = state.blocks(moved, moved, tokens, tokens).k
    assert before.means is not None and after.means is not None and int(before.sizes.min()) > 0
    torch.testing.assert_close(after.means, lloyd(moved[0], before.means, 1)[1])
    assert spread(moved, after).sum() < spread(moved, order(KMeans(k_clusters=12, init="random", first=1), moved, tokens)).sum()


def test_empty_clusters_keep_their_place_and_are_empty_blocks() -> None:
    x = torch.cat([torch.zeros(1, 5, 3), torch.ones(1, 5, 3)], 1)
    labels, means, sizes = lloyd(x, torch.tensor([[[0.0] * 3, [50.0] * 3, [1.0] * 3]]), 3)
    assert sizes.tolist() == [[5, 0, 5]] and means[0, 1].tolist() == [50.0] * 3 and labels[0, 0] == 0
    state = KMeans(k_clusters=4).start()
    found = state.blocks(x[None], x[None], plain(10), plain(10)).k
    assert found.means is not None and (found.means[0, found.sizes[0] == 0] == 0).all()
    assert int((found.sizes == 0).sum()) == 2


def test_a_bad_call_leaves_no_trace() -> None:
    x, tokens = seeded(0, 1, 2, 60, 4), plain(60)
    state, bad = KMeans(k_size=6).start(), seeded(0, 1, 2, 60, 4)
    bad[:, :, ::3] = torch.nan
    for each in (x, bad, x, x, x):
        found = state.blocks(each, each, tokens, tokens).k
    assert found.means is not None and bool(found.means.isfinite().all())
    fresh = order(KMeans(k_size=6), x, tokens)
    assert (spread(x, found) < 1.3 * spread(x, fresh)).all()


def test_outliers_are_read_by_all() -> None:
    """Keys that point away from their cluster are one last block, and what is left is tighter."""
    x = clustered(2, 4, 30)[0]
    odd = torch.tensor([3, 50, 77, 100])
    x[:, :, odd] = -0.6 * x[:, :, odd]
    blocks = KMeans(k_clusters=4, q_clusters=4, outliers=4 / 120, first=20).start().blocks(x, x, plain(120), plain(120))
    assert (blocks.k.roles == ALWAYS).tolist() == [False] * 4 + [True] and (blocks.q.roles == SELECT).all()
    assert blocks.k.sizes[:, -1].tolist() == [4, 4] and blocks.k.perm is not None and blocks.k.means is not None
    apart = blocks.k.perm[:, -4:]
    assert sum(int(token) in odd for token in apart.flatten()) >= 6
    torch.testing.assert_close(blocks.k.means, blocks.k.mean(blocks.k.arrange(x)), rtol=1e-4, atol=1e-4)


def test_beginning_with_a_tree_is_tighter_and_in_line() -> None:
    """After as many passes; and clusters of neighbouring numbers are similar."""
    x, tokens = clustered(3, 32, 10)[0], plain(320)
    found = {init: order(KMeans(k_clusters=32, init=init), x, tokens) for init in ("tree", "random")}  # type: ignore[arg-type]
    assert (spread(x, found["tree"]) < spread(x, found["random"])).all()
    steps = {init: each.means.diff(dim=1).norm(dim=-1).sum(1) for init, each in found.items() if each.means is not None}
    assert (steps["tree"] < 0.9 * steps["random"]).all()


def test_the_line_is_kept_by_later_calls() -> None:
    x, tokens = clustered(2, 16, 10)[0], plain(160)
    state = KMeans(k_clusters=16).start()
    one, two = (state.blocks(x, x, tokens, tokens).k for _ in range(2))
    assert one.means is not None and two.means is not None
    torch.testing.assert_close(one.means, two.means)


def test_cosine_asks_for_directions_only() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.8, 0.6])
    x, start = torch.stack([10 * a, 10 * b, b, a])[None], torch.stack([10 * a, b])[None]
    assert lloyd(x, start, 1, "cosine")[0].tolist() == [[0, 1, 1, 0]]
    assert lloyd(x, start, 1, "euclidean")[0].tolist() == [[0, 0, 1, 1]]


def test_passes_over_samples_end_with_one_over_all() -> None:
    x = seeded(0, 2, 301, 8)
    start = x[:, :12].clone()
    labels, means, sizes = lloyd(x, start, 5, sample=4)
    assert sizes.sum(1).tolist() == [301, 301]
    torch.testing.assert_close(means, update(x, labels, 12, start)[0])
    inertia = {}
    for passes, sample in ((1, 1), (5, 1), (5, 4)):
        labels, means, _ = lloyd(x, start, passes, sample=sample)
        inertia[passes, sample] = float((x - means.gather(1, labels[..., None].expand_as(x))).square().sum())
    assert inertia[5, 1] < inertia[5, 4] < 0.97 * inertia[1, 1]
