"""An entropy coder for small symbols: many range coders (rANS, 1311.2540) side by side, in numpy.

N symbols, T tables of frequencies over A symbols each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hasten.errors import UsageError

BITS = 12
"""Frequencies of a table add up to 2 ** BITS."""

TOTAL = 1 << BITS
LOW = np.uint64(1 << 31)
"""States stay at or above this, below 2 ** 63; a word of 32 bits moves out or in."""

EACH = 1024
"""Symbols per lane, about: a lane's last state costs eight bytes."""


@dataclass(frozen=True, slots=True)
class Coded:
    """words uint32 [W], states uint64 [lanes]: what `decode` needs besides tables and the number of symbols."""

    words: NDArray[np.uint32]
    states: NDArray[np.uint64]


def frequencies(symbols: NDArray[np.uint8], table: NDArray[np.integer], tables: int, alphabet: int) -> NDArray[np.uint16]:
    """How often each symbol occurs in each table's share of the text, as uint16 [T, A] whose rows add up to 4,096; what
    occurs has at least 1. symbols, table: [N], the table of each symbol."""
    counts = np.bincount(table.astype(np.int64) * alphabet + symbols, minlength=tables * alphabet).reshape(tables, alphabet)
    counts[counts.sum(1) == 0, 0] = 1
    present = counts > 0
    room = TOTAL - present.sum(1, keepdims=True)
    found = (counts * room // counts.sum(1, keepdims=True)) + present
    found[np.arange(tables), found.argmax(1)] += TOTAL - found.sum(1)
    freq: NDArray[np.uint16] = found.astype(np.uint16)
    return freq


def encode(symbols: NDArray[np.uint8], table: NDArray[np.integer], freq: NDArray[np.uint16]) -> Coded:
    """symbols [N], each with its table's number [N], into words. Frequencies of what occurs must not be 0."""
    lanes = max(1, len(symbols) // EACH)
    rows, which = _in_rows(symbols, lanes), _in_rows(table.astype(np.int64), lanes)
    wide = freq.astype(np.uint64)
    start = wide.cumsum(1) - wide
    states, words = np.full(lanes, LOW, dtype=np.uint64), []
    for row, own in zip(rows[::-1], which[::-1], strict=True):
        f, c = wide[own, row], start[own, row]
        full = states >= f << np.uint64(63 - BITS)
        words.append((states[full] & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        states[full] >>= np.uint64(32)
        states = (states // f << np.uint64(BITS)) + states % f + c
    return Coded(np.concatenate(words[::-1]) if words else np.empty(0, np.uint32), states)


def decode(coded: Coded, table: NDArray[np.integer], freq: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """The symbols uint8 [N] back; table [N]. Raises `UsageError` where the words do not fit the tables."""
    lanes, n = len(coded.states), len(table)
    if lanes != max(1, n // EACH) or (freq.sum(1, dtype=np.int64) != TOTAL).any():
        raise UsageError("An entropy-coded text does not fit its tables: the file is damaged or not one of ours.")
    which = _in_rows(table.astype(np.int64), lanes)
    wide = freq.astype(np.uint64)
    start = wide.cumsum(1) - wide
    symbol_of = np.stack([np.repeat(np.arange(freq.shape[1], dtype=np.uint8), row) for row in freq])
    found, states, at = np.empty(which.shape, np.uint8), coded.states.copy(), 0
    for number, own in enumerate(which):
        slot = states & np.uint64(TOTAL - 1)
        row = found[number] = symbol_of[own, slot.astype(np.int64)]
        states = wide[own, row] * (states >> np.uint64(BITS)) + slot - start[own, row]
        low = states < LOW
        need = int(low.sum())
        if at + need > len(coded.words):
            raise UsageError("An entropy-coded text ends too early: the file is damaged.")
        states[low] = states[low] << np.uint64(32) | coded.words[at : at + need]
        at += need
    return found.ravel()[:n]


def _in_rows(x: NDArray[np.generic], lanes: int) -> NDArray[np.generic]:
    """[N] as [steps, lanes], filled up with copies of the last."""
    steps = -(-len(x) // lanes)
    return np.pad(x, (0, steps * lanes - len(x)), mode="edge").reshape(steps, lanes) if len(x) else x.reshape(0, lanes)
