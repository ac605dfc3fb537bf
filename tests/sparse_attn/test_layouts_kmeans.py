"""What clustering claims: nearest centroids, exact means, lower inertia, clusters that go on from call to call."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.sparse_attn.blocks import ALWAYS, SELECT, Order, uniform
from hasten.sparse_attn.layouts.kmeans import KMeans, assign, lloyd, runs, update
from hasten.sparse_attn.segments import plain
from tests.contract import seeded
from tests.sparse_attn.clusters import WAN_720, clustered, order, spread


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
