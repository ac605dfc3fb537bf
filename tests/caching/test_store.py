"""Keys and values kept by slot: what is read after what was written, and that nothing is copied where all take part."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.caching.depth import put
from hasten.caching.store import KVStore, Pass, numbered

HEADS, DIM, WIDE = 2, 3, 4


def call(members: list[int], slots: list[list[int]], keep: str = "store", **given: object) -> Pass:
    place = torch.tensor(slots)
    visible = torch.ones(len(members), place.shape[1], 1, dtype=torch.bool)
    none = torch.zeros(len(members), 0, dtype=torch.int64)
    return Pass(torch.tensor(members), place, place, keep, visible, none, none, **given)  # type: ignore[arg-type]


def rows(texts: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(texts, HEADS, count, DIM, generator=g), torch.randn(texts, HEADS, count, WIDE, generator=g)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.sets(st.integers(0, 4)), min_size=2, max_size=2), min_size=1, max_size=5))
def test_what_is_read_is_what_was_written_last(calls: list[list[set[int]]]) -> None:
    """Against a dictionary. Slot 5, the bin, is nobody's."""
    store, truth = KVStore(2, 5, torch.device("cpu")), {}
    for number, sets in enumerate(calls):
        width = max(1, *(len(each) for each in sets))
        slots = [[*sorted(each), *[5] * (width - len(each))] for each in sets]
        now = call([0, 1], slots, run=slice(0, 2) if number % 2 else None)
        k, v = rows(2, width, number)
        keys, values = store.exchange(0, k, v, now)
        store.note(now)
        truth |= {(text, slot): (k[text, :, i], v[text, :, i]) for text in (0, 1) for i, slot in enumerate(slots[text])}
        for (text, slot), (key, value) in truth.items():
            if slot < 5:
                assert torch.equal(keys[text, :, slot], key) and torch.equal(values[text, :, slot], value)
    held = {(text, slot) for text, slot in truth if slot < 5}
    assert {(text, slot) for text, slot in store.present.nonzero().tolist()} == held
    places = store.positions()
    assert all(int(places[text, slot]) == (slot if (text, slot) in held else -1) for text in (0, 1) for slot in range(6))


def test_a_call_on_neighbouring_texts_reads_a_view() -> None:
    store = KVStore(3, 4, torch.device("cpu"))
    whole = call([0, 1, 2], [[0, 1, 2, 3]] * 3, whole=True, run=slice(0, 3))
    keys, values = store.exchange(0, *rows(3, 4, 1), whole)
    assert keys.data_ptr() == store.keys[0].data_ptr() and values.data_ptr() == store.values[0].data_ptr()
    store.note(whole)
    assert store.full == {0, 1, 2}
    some, _ = store.exchange(0, *rows(2, 1, 2), call([1, 2], [[2], [0]], run=slice(1, 3)))
    assert some.data_ptr() == store.keys[0][1:].data_ptr()
    apart, _ = store.exchange(0, *rows(2, 1, 3), call([0, 2], [[2], [0]]))
    assert apart.data_ptr() != store.keys[0].data_ptr()
    assert torch.equal(apart[1, :, 0], rows(2, 1, 3)[0][1, :, 0])


def test_whole_writes_what_slots_would() -> None:
    one, other = KVStore(2, 4, torch.device("cpu")), KVStore(2, 4, torch.device("cpu"))
    k, v = rows(2, 4, 1)
    one.exchange(0, k, v, call([0, 1], [[0, 1, 2, 3]] * 2, whole=True, run=slice(0, 2)))
    other.exchange(0, k, v, call([0, 1], [[0, 1, 2, 3]] * 2))
    assert torch.equal(one.keys[0], other.keys[0]) and torch.equal(one.values[0], other.values[0])


def test_without_a_mask_the_bin_is_not_read() -> None:
    store = KVStore(1, 4, torch.device("cpu"))
    now = call([0], [[0, 1, 2, 3]], whole=True, run=slice(0, 1))
    now.visible = None
    assert store.exchange(0, *rows(1, 4, 1), now)[0].shape == (1, HEADS, 4, DIM)


def test_scratch_leaves_nothing() -> None:
    store = KVStore(1, 4, torch.device("cpu"))
    kept = call([0], [[0, 1]])
    store.exchange(0, *rows(1, 2, 1), kept)
    store.note(kept)
    before = store.keys[0].clone()
    drafts = call([0], [[1, 2, 1, 2]], "scratch")
    k, v = rows(1, 4, 2)
    keys, _ = store.exchange(0, k, v, drafts)
    store.note(drafts)
    assert keys.shape[2] == 5 + 4 and torch.equal(keys[:, :, 5:], k)
    assert torch.equal(store.keys[0], before) and store.present.sum() == 2


def test_what_is_forgotten_is_gone_until_it_comes_again() -> None:
    store = KVStore(1, 3, torch.device("cpu"))
    now = call([0], [[0, 1, 2]], whole=True, run=slice(0, 1))
    store.exchange(0, *rows(1, 3, 1), now)
    store.note(now)
    store.forget(torch.tensor([[False, True, False]]))
    assert store.present.tolist() == [[True, False, True, False]] and not store.full
    store.note(call([0], [[1, 3]]))
    assert store.present.tolist() == [[True, True, True, False]]


def test_bytes_are_those_of_the_tensors() -> None:
    store = KVStore(2, 5, torch.device("cpu"))
    assert store.bytes == 0
    for layer in range(3):
        k, v = rows(2, 1, layer)
        store.exchange(layer, k.half(), v.half(), call([0, 1], [[0], [1]]))
    assert store.bytes == 3 * 2 * (5 + 1) * HEADS * (DIM + WIDE) * 2


def test_part_of_a_call() -> None:
    now = call([0, 1], [[2, 3, 5], [0, 1, 2]])
    now.visible = torch.arange(3)[None, :, None].expand(2, -1, 6) < torch.tensor([1, 2, 3, 4, 5, 6])
    part = now.part(torch.tensor([[2, 3], [0, 2]]), 9)
    assert part.slots.tolist() == [[5, 9], [0, 2]]
    assert part.visible is not None and torch.equal(part.visible[1, 1], now.visible[1, 2])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=6, max_size=6))
def test_numbers_of_columns(chosen: list[bool]) -> None:
    table = torch.tensor(chosen).view(2, 3)
    for row, numbers in zip(table, numbered(table, 3, 7).tolist(), strict=True):
        expected = row.nonzero()[:, 0].tolist()
        assert numbers == expected + [7] * (3 - len(expected))


def test_rows_are_put_and_none_is_no_row() -> None:
    x = torch.zeros(1, 3, 2)
    found = put(x, torch.ones(1, 2, 2), torch.tensor([[1, 3]]))
    assert found[0, :, 0].tolist() == [0, 1, 0] and not bool(x.any())
