"""Keys of low rank and values elsewhere: exact at full rank, near below it, some slots without the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.caching.decode.low_rank import Factored, LowRank, Spared, odd
from hasten.caching.decode.packed import Far, stored
from hasten.caching.decode.slots import Slots
from hasten.caching.decode.turns import Turns
from hasten.errors import RefusedError

B, HEADS, TOKENS, D = 2, 3, 96, 16


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def places(tokens: int = TOKENS, start: int = 0) -> Tensor:
    return torch.arange(start, start + tokens, dtype=torch.int32).expand(B, 1, -1)


def turns(end: int = 2 * TOKENS, width: int = D, scale: float = 1.0) -> Turns:
    made = Turns()
    angle = torch.arange(end)[:, None] / 100 ** (torch.arange(width // 2) / (width // 2))
    angle = torch.cat([angle, angle], -1)[None]
    made.write(angle.cos() * scale, angle.sin() * scale, torch.arange(end)[None], end)
    return made


def thin(rank: int = 5, seed: int = 0, tokens: int = TOKENS) -> Tensor:
    """Keys of this rank, over all heads together, before they are turned."""
    left, right = torch.randn(B, tokens, rank, generator=dice(seed)), torch.randn(B, rank, HEADS * D, generator=dice(9))
    return (left @ right).view(B, tokens, HEADS, D).transpose(1, 2)


@pytest.mark.parametrize(("width", "scale"), [(D, 1.0), (D // 2, 1.0), (D, 1.3)])
def test_turning_and_turning_back_is_nothing(width: int, scale: float) -> None:
    x, table = torch.randn(B, HEADS, TOKENS, D, generator=dice()), turns(width=width, scale=scale)
    turned = table.made(x, places())
    assert not torch.allclose(turned[..., :width], x[..., :width], atol=1e-2)
    torch.testing.assert_close(table.undone(turned, places()), x, atol=1e-5, rtol=1e-5)
    if scale == 1.0:
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_places_that_nobody_wrote_are_not_turned() -> None:
    table = turns(end=10)
    table.write(*(torch.ones(1, 1, D) * part for part in (0.6, 0.8)), torch.tensor([[40]]), 41)
    x = torch.randn(B, HEADS, 5, D, generator=dice())
    assert torch.equal(table.made(x, places(5, 20)), x) and not torch.equal(table.made(x, places(5, 36)), x)


def test_keys_of_low_rank_are_exact_where_they_are_turned_back_first() -> None:
    table = turns()
    keys = table.made(thin(5), places())
    kept = Factored.of(keys, places(), table, 5)
    torch.testing.assert_close(kept.read(), keys, atol=1e-4, rtol=1e-4)
    as_they_stand = Factored.of(keys, places(), None, 5)
    assert float((as_they_stand.read() - keys).norm() / keys.norm()) > 0.3
    assert stored(kept.tensors()) < 0.3 * keys.numel() * 4


def test_the_product_is_the_best_of_its_rank() -> None:
    keys = torch.randn(B, HEADS, TOKENS, D, generator=dice())
    flat = keys.transpose(1, 2).reshape(B, TOKENS, -1)
    rest = torch.linalg.svdvals(flat)[:, 10:].square().sum()
    error = (Factored.of(keys, places(), None, 10).read() - keys).square().sum()
    torch.testing.assert_close(error, rest, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_some_slots_are_read_left_moved_and_joined(heads: int) -> None:
    """As from what all of them read as, whichever form holds them; memory shrinks."""
    codec, table = LowRank(rank=0.2, chunk=4, outliers=3), turns()
    first, second = (table.made(torch.randn(B, HEADS, n, D, generator=dice(n)), places(n, at)) for n, at in ((64, 0), (32, 64)))
    index = torch.stack([torch.randperm(96, generator=dice(row))[:21].sort().values for row in range(B * heads)]).view(B, heads, -1)
    near = index.expand(-1, HEADS, -1)[..., None].expand(-1, -1, -1, D)
    for keys in (True, False):
        one, two = (codec.form(places(96, at), table)(x, keys) for x, at in ((first, 0), (second, 64)))
        both = one.joined(two)  # type: ignore[attr-defined]
        want = torch.cat([one.read(), two.read()], 2)
        torch.testing.assert_close(both.read(), want)
        torch.testing.assert_close(both.at(index), want.gather(2, near))
        taken = both.take(index)
        torch.testing.assert_close(taken.read(), want.gather(2, near))
        torch.testing.assert_close(taken.rows(torch.tensor([1, 1])).read(), taken.read()[[1, 1]])
        assert stored(taken.tensors()) < stored(both.tensors())


def test_chunks_with_a_key_unlike_the_others_stay_whole() -> None:
    keys = torch.randn(B, HEADS, 1, D, generator=dice()) + 0.1 * torch.randn(B, HEADS, TOKENS, D, generator=dice(1))
    keys[:, 1, 50] *= -1
    keys[:, :, 17] *= -1
    place = places().clone()
    place[..., :4] = -1
    assert odd(keys, place, 8, 2)[0, 1].tolist() == [*range(16, 24), *range(48, 56)]
    kept = LowRank(rank=0.02, chunk=8, outliers=2).form(place, None)(keys, True)
    assert isinstance(kept, Spared)
    whole = kept.read() == keys
    assert bool(whole[:, 1, 48:56].all()) and bool(whole[:, :, 16:24].all()) and not bool(whole[:, 1, 24:48].all())


def test_values_are_elsewhere_and_exact() -> None:
    x = torch.randn(B, HEADS, TOKENS, D, generator=dice())
    far = LowRank().pack(x, False)
    assert isinstance(far, Far) and torch.equal(far.read(), x) and far.data.data_ptr() != x.data_ptr()
    index = torch.tensor([3, 90, 4]).expand(B, 1, -1)
    assert torch.equal(far.at(index), x[:, :, [3, 90, 4]])


def test_a_store_counts_both_memories_and_reads_some() -> None:
    store, codec = Slots(), LowRank(rank=0.2, chunk=8, outliers=2)
    k, v = (torch.randn(B, HEADS, TOKENS, D, generator=dice(seed)) for seed in (1, 2))
    store.append(k, v, places()[:, 0])
    full = store.bytes
    assert not store.partly and store.far_bytes == 0
    assert store.pack(codec.form(store.place, None), 20, 8, codec.least(HEADS * D)) and store.behind == 72 and store.partly
    assert store.far_bytes == B * HEADS * 72 * D * 4 and store.bytes < 0.85 * (full - store.far_bytes)
    index = torch.tensor([[8, 9, 30], [0, 1, -1], [5, 6, 7]]).expand(B, -1, -1)
    some, every = store.view_of(index), store.view()
    assert some.k.shape[2] == 3 + 24 and some.place[0, 1, :4].tolist() == [0, 1, -1, 72]
    torch.testing.assert_close(some.v[:, :, 3:], v[:, :, 72:])
    torch.testing.assert_close(some.k[:, 0, :3], every.k[:, 0, [8, 9, 30]])
    assert torch.equal(some.v[:, 2, :3], v[:, 2, 5:8])


def test_a_piece_no_longer_than_its_rank_waits() -> None:
    store, codec = Slots(), LowRank(rank=0.5, chunk=8, outliers=0)
    x = torch.randn(B, HEADS, 24, D, generator=dice())
    store.append(x, x, places(24)[:, 0])
    assert codec.least(HEADS * D) == 25 and not store.pack(codec.form(store.place, None), 0, 8, codec.least(HEADS * D))


def test_keys_that_are_not_finite_are_refused() -> None:
    x = torch.randn(B, HEADS, 24, D, generator=dice())
    x[0, 0, 3, 2] = float("nan")
    with pytest.raises(RefusedError, match="not finite"):
        LowRank().pack(x, True)
