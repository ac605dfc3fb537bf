"""Column sums in slices are those of all weights at once; what is chosen by them is exactly as much as was asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import hasten.caching.decode.mass as module
from hasten.caching.decode.amount import (
    AdaptiveHeads,
    Enough,
    OwnHeads,
    Pyramid,
    Share,
    TogetherHeads,
    Tokens,
    top,
)
from hasten.caching.decode.mass import mass


def setting() -> tuple[Any, ...]:
    dice = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 9, 8, generator=dice), torch.randn(2, 2, 20, 8, generator=dice)
    at = torch.tensor([list(range(11, 20)), [-1] * 3 + list(range(14, 20))])
    place = torch.stack([torch.arange(20), torch.arange(20)])[:, None].int()
    place[1, 0, :5] = -1
    return q, k, at, place


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("held", [1, 1 << 22])
def test_mass_is_the_columns_of_all_weights(window: int | None, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS", held)
    q, k, at, place = setting()
    logits = q @ k.repeat_interleave(2, 1).mT * 0.3
    seen = (place[:, 0][:, None] >= 0) & (place[:, 0][:, None] <= at[..., None])
    if window:
        seen &= place[:, 0][:, None] > at[..., None] - window
    weights = logits.masked_fill(~seen[:, None], -math.inf).softmax(-1).nan_to_num(0.0)
    want = weights.sum(2).view(2, 2, 2, 20).sum(2)
    torch.testing.assert_close(mass(q, k, at, place, 0.3, window=window), want)


def test_exactly_as_many_are_chosen() -> None:
    worth = torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(0)).round(decimals=0)  # ties
    worth[0, 0, 3] = float("nan")
    held = torch.ones(3, 2, 12, dtype=torch.bool)
    held[2, :, :4] = False
    count = torch.tensor([5, 1, 12])
    for heads, each in ((OwnHeads(), True), (TogetherHeads(), True), (AdaptiveHeads(), False)):
        mask = heads.choose(worth, held, count).expand(3, 2, 12)
        assert not bool((mask & ~held).any())
        if each:
            assert mask.sum(-1).tolist() == [[5, 5], [1, 1], [8, 8]]
        else:
            assert mask.sum((1, 2)).tolist() == [10, 2, 16] and bool((mask.sum(-1)[0] >= 1).all())
    assert not bool(top(worth, count[:, None])[0, 0, 3])


def test_amounts_say_how_many() -> None:
    assert Share(share=0.1).of(91, None) == 10 and Share(share=0.001).of(5, None) == 1 and Tokens(count=7).of(900, None) == 7
    worth = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04])
    assert [Enough(mass=m).of(5, worth) for m in (0.4, 0.5, 0.79, 0.95, 1.0)] == [1, 1, 2, 4, 5]
    assert Enough(mass=0.95, most=0.4).of(5, worth) == 2
    assert Enough().of(5, worth * float("nan")) == 5


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_pyramids_keep_the_whole(layers: int) -> None:
    factors = Pyramid(steep=4).factors(layers)
    assert sum(factors) == pytest.approx(layers) and factors == sorted(factors, reverse=True)
    if layers > 1:
        assert factors[0] / factors[-1] == pytest.approx(4)
