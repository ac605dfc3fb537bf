"""Codecs: how far off, how many bytes, and that packed slots leave, move and grow without being rounded again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.caching.decode.codec import Codec
from hasten.caching.decode.codec_numbers import Fp8, Int8, Kivi
from hasten.caching.decode.codec_sparse import Bitmap
from hasten.caching.decode.packed import stored
from hasten.caching.decode.slots import Slots
from hasten.errors import RefusedError, UsageError

CODECS = [Int8(), Fp8(), Kivi(), Bitmap(), Bitmap(keys=0.7, values=0.7)]
IDS = ["int8", "fp8", "kivi", "bitmap", "bitmap-70"]
SHARE = {"int8": 0.32, "fp8": 0.27, "kivi": 0.17, "bitmap": 0.54, "bitmap-70": 0.36}
"""Most bytes, of float32, at 64 channels."""
ERROR = {"int8": 0.01, "fp8": 0.05, "kivi": 0.12, "bitmap": 0.35, "bitmap-70": 0.6}


@pytest.fixture(params=CODECS, ids=IDS)
def codec(request: Any) -> Any:
    return request.param


def name(codec: Codec) -> str:
    return IDS[CODECS.index(codec)]


def numbers(tokens: int = 128, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    x = torch.randn(2, 3, tokens, 64, generator=torch.Generator().manual_seed(seed))
    x[..., 5] *= 8  # keys have outlier channels
    return x.to(dtype)


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codecs_are_near_and_small(codec: Codec, keys: bool, dtype: torch.dtype) -> None:
    x = numbers(dtype=dtype)
    packed = codec.pack(x, keys)
    back = packed.read()
    assert back.shape == x.shape and back.dtype == dtype
    assert float((back.float() - x.float()).norm() / x.float().norm()) < ERROR[name(codec)]
    if dtype == torch.float32:
        assert stored(packed.tensors()) <= SHARE[name(codec)] * x.numel() * 4


def test_keys_by_channel_are_better_where_channels_stand_out() -> None:
    x = numbers()
    errors = [float((Kivi().pack(x, keys).read() - x)[..., :5].norm()) for keys in (True, False)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("heads", [1, 3])
def test_what_leaves_and_moves_is_not_rounded_again(codec: Codec, heads: int) -> None:
    x = numbers()
    packed = codec.pack(x, True)
    before = packed.read()
    index = torch.stack([torch.randperm(128)[:40].sort().values for _ in range(2 * heads)]).view(2, heads, 40)
    index[..., -3:] = -1
    taken = packed.take(index)
    near = index.clamp(min=0).expand(2, 3, -1)[..., None].expand(-1, -1, -1, 64)
    real = (index >= 0)[..., None]
    assert torch.equal(taken.read() * real, before.gather(2, near) * real)
    assert stored(taken.tensors()) < 0.6 * stored(packed.tensors())
    again = taken.joined(codec.pack(numbers(64, seed=1), True))  # type: ignore[attr-defined]
    assert torch.equal(again.read()[:, :, :40] * real, before.gather(2, near) * real)
    assert torch.equal(again.read()[:, :, 40:], codec.pack(numbers(64, seed=1), True).read())
    turned = again.rows(torch.tensor([1, 0, 1]))
    assert torch.equal(turned.read(), again.read()[[1, 0, 1]])


def test_numbers_that_do_not_fit_are_refused() -> None:
    for value in (float("nan"), float("inf"), -1e6, 1e8):
        x = numbers()
        x[0, 0, 0, 0] = value
        with pytest.raises(RefusedError, match="not finite, or beyond"):
            Int8().pack(x, True)


def test_constants_come_back() -> None:
    for codec in CODECS[:3]:
        for value in (0.0, 1.0, -3.0):
            x = torch.full((1, 1, 32, 64), value)
            torch.testing.assert_close(codec.pack(x, True).read(), x, atol=2e-3, rtol=2e-3)


def test_a_store_packs_in_whole_groups_behind_its_residual(codec: Codec) -> None:
    store, x = Slots(), numbers(100)
    store.append(x, x, torch.arange(100).expand(2, -1))
    assert store.pack(codec.pack, 20, 32) and store.behind == 64 and store.used == 36
    assert not store.pack(codec.pack, 20, 32)
    view = store.view()
    assert torch.equal(view.k[:, :, 64:], x[:, :, 64:]) and view.place[0, 0].tolist() == list(range(100))
    mask = torch.arange(100) % 3 == 0
    store.keep(mask[None, None])
    assert torch.equal(store.view().k, view.k[:, :, mask]) and store.place[0, 0].tolist() == list(range(0, 100, 3))
    assert store.tokens == [34.0, 34.0]
    with pytest.raises(UsageError, match="not written"):
        store.refresh(torch.tensor([[0], [0]]), x[:, :, :1], x[:, :, :1])
