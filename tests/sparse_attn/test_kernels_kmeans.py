"""K-means kernels against sums written out, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from hasten.errors import UsageError
from hasten.sparse_attn.kernels import kmeans
from hasten.sparse_attn.layouts import kmeans as twin

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def data(planes: int, n: int, count: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and centroids around one large offset, as keys of trained models have it."""
    generator = torch.Generator().manual_seed(seed)
    offset = 4 * torch.randn(d, generator=generator)
    x = torch.randn(planes, n, d, generator=generator) + offset
    return x.to(dtype), torch.randn(planes, count, d, generator=generator) + offset


def excess(x: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """How much farther each token's centroid is than the nearest one: squared distances, in float64."""
    distance = torch.cdist(x.double(), centroids.double()).square()
    return distance.gather(2, labels.long()[..., None])[..., 0] - distance.amin(-1)


@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 150), count=st.integers(1, 90), d=st.sampled_from([1, 7, 16, 40]), seed=st.integers(0, 99))
def test_assign_finds_the_nearest(n: int, count: int, d: int, seed: int) -> None:
    x, centroids = data(2, n, count, d, torch.float32, seed)
    labels = kmeans.assign(x, centroids)
    assert labels.dtype == torch.int32 and labels.shape == (2, n)
    assert excess(x, centroids, labels).max() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_assign_is_as_exact_as_the_torch_version(dtype: torch.dtype) -> None:
    x, centroids = data(2, 130, 70, 24, dtype)
    own = excess(x, centroids, kmeans.assign(x, centroids))
    other = excess(x, centroids, twin.assign(x, centroids))
    # Steps between centroids are rounded to 16 bits, and the twin's are not: 2 |x - c| |e| 2^-9 at the very most.
    rounding = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.8}[dtype]
    assert own.max() <= 2 * other.max() + rounding
    assert own.mean() < rounding / 20


def test_an_offset_does_not_take_the_digits() -> None:
    """With the offset ten times larger than the clusters, centroids rounded as they are would be told apart no more."""
    x, centroids = data(1, 200, 16, 32, torch.float32)
    far = 40 * torch.ones(32)
    near = kmeans.assign(x.bfloat16(), centroids)
    moved = kmeans.assign((x.bfloat16().float() + far), centroids + far)
    assert (near == moved).float().mean() > 0.97
    shifted = (x + far).bfloat16()
    rounded = excess(shifted, (centroids + far), kmeans.assign(shifted, centroids + far))
    plain = torch.cdist(shifted.float(), (centroids + far).bfloat16().float()).argmin(-1)
    naive = excess(shifted, centroids + far, plain)
    assert rounded.mean() < naive.mean() / 5


def test_of_equal_distances_the_first_wins_and_bad_tokens_get_a_label() -> None:
    x, centroids = data(1, 9, 70, 16, torch.float32)
    centroids[:, 69] = centroids[:, 3]
    labels = kmeans.assign(centroids[:, [3, 69]], centroids)
    assert labels.tolist() == [[3, 3]]
    clean = kmeans.assign(x, centroids)
    x[0, 4, 2], x[0, 5, 0] = float("nan"), float("inf")
    labels = kmeans.assign(x, centroids)
    assert (labels >= 0).all() and (labels < 70).all()
    assert torch.equal(labels[:, :4], clean[:, :4]) and torch.equal(labels[:, 6:], clean[:, 6:])


def test_update_is_the_mean_of_each_cluster() -> None:
    for dtype in DTYPES:
        x, old = data(3, 101, 13, 20, dtype)
        labels = torch.randint(0, 13, (3, 101), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
        labels[labels == 5] = 6  # cluster 5 is empty, 6 has duplicates of its role
        found, sizes = kmeans.update(x, labels, 13, old)
        wanted, counts = twin.update(x, labels, 13, old)
        exact = x.double()
        for plane in range(3):
            for cluster in range(13):
                own = exact[plane, labels[plane] == cluster]
                mean = own.mean(0) if len(own) else old[plane, cluster].double()
                error = (wanted[plane, cluster] - mean).abs().max()
                assert (found[plane, cluster] - mean).abs().max() <= 2 * error + 1e-6
        assert torch.equal(sizes, counts) and torch.equal(found[:, 5], old[:, 5]) and (sizes[:, 5] == 0).all()


def test_update_keeps_what_a_bad_token_would_spoil() -> None:
    x, old = data(1, 40, 4, 8, torch.float32)
    labels = torch.arange(40, dtype=torch.int32)[None] % 4
    x[0, 2, 3] = float("inf")
    found, _ = kmeans.update(x, labels, 4, old)
    assert found[0, 2, 3] == old[0, 2, 3] and found.isfinite().all()


def test_runs_are_those_of_the_torch_version() -> None:
    labels = torch.randint(0, 300, (2, 77), dtype=torch.int32)
    for count in (300, 40000):
        (perm, bounds), (wanted, edges) = kmeans.runs(labels, count), twin.runs(labels, count)
        assert torch.equal(perm, wanted) and torch.equal(bounds, edges)
        assert torch.equal(labels.gather(1, perm).diff(dim=1) < 0, torch.zeros(2, 76, dtype=torch.bool))


def test_means_of_shared_blocks_without_an_order() -> None:
    x, _ = data(2, 50, 1, 9, torch.float32)
    bounds = torch.tensor([[0, 7, 7, 50]], dtype=torch.int32)
    found = kmeans.means(x, bounds)
    torch.testing.assert_close(found[:, 0], x[:, :7].mean(1))
    torch.testing.assert_close(found[:, 2], x[:, 7:].mean(1))
    assert (found[:, 1] == 0).all()


def test_lloyd_with_the_kernels_is_lloyd_with_torch() -> None:
    x, centroids = data(2, 120, 6, 12, torch.float32, seed=3)
    ours, theirs = centroids, centroids
    for _ in range(3):
        ours, _ = kmeans.update(x, kmeans.assign(x, ours), 6, ours)
        theirs, _ = twin.update(x, twin.assign(x, theirs), 6, theirs)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_empty_and_wrong_shapes() -> None:
    assert kmeans.assign(torch.zeros(2, 0, 4), torch.zeros(2, 3, 4)).shape == (2, 0)
    with pytest.raises(UsageError, match="C > 0"):
        kmeans.assign(torch.zeros(2, 5, 4), torch.zeros(2, 0, 4))
    with pytest.raises(UsageError, match="they are"):
        kmeans.assign(torch.zeros(2, 5, 4), torch.zeros(1, 3, 4))
    with pytest.raises(UsageError, match="float64"):
        kmeans.assign(torch.zeros(2, 5, 4).double(), torch.zeros(2, 3, 4))
    with pytest.raises(UsageError, match="head dimension"):
        kmeans.means(torch.zeros(5, 4), torch.tensor([[0, 5]], dtype=torch.int32))
