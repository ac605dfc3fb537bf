"""The entropy coder: what goes in comes out, in about as many bits as there is information."""

from __future__ import annotations

import numpy as np
import pytest

from hasten.caching.decode.wire import TOTAL, Coded, decode, encode, frequencies
from hasten.errors import UsageError


@pytest.mark.parametrize(("n", "alphabet"), [(0, 3), (1, 2), (7, 2), (1023, 5), (1024, 5), (30_000, 31), (70_001, 255)])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_what_goes_in_comes_out(n: int, alphabet: int, spread: float) -> None:
    dice = np.random.default_rng(n)
    table = dice.integers(0, 3, n)
    symbols = np.clip(np.abs(dice.normal(0, spread * (1 + table), n)), 0, alphabet - 1).astype(np.uint8)
    freq = frequencies(symbols, table, 3, alphabet)
    assert (freq.sum(1) == TOTAL).all()
    coded = encode(symbols, table, freq)
    assert np.array_equal(decode(coded, table, freq), symbols)
    if n > 20_000:
        shares = freq[table, symbols] / TOTAL
        bits = -np.log2(shares).sum()
        assert 8 * (coded.words.nbytes + coded.states.nbytes) < 1.02 * bits + 64 * len(coded.states)


def test_damage_is_told() -> None:
    table = np.zeros(5000, np.int64)
    symbols = np.random.default_rng(0).integers(0, 9, 5000).astype(np.uint8)
    freq = frequencies(symbols, table, 1, 9)
    coded = encode(symbols, table, freq)
    with pytest.raises(UsageError, match="too early"):
        decode(Coded(coded.words[:10], coded.states), table, freq)
    with pytest.raises(UsageError, match="does not fit"):
        decode(coded, table[:100], freq)
    with pytest.raises(UsageError, match="does not fit"):
        decode(coded, table, freq + np.uint16(1))
