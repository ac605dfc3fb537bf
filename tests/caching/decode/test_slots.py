"""A store against lists of places: whatever is appended, drafted, evicted or reordered, each slot holds its token."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from hasten.caching.decode.packed import NONE, Flat, stored
from hasten.caching.decode.slots import Slots
from hasten.errors import UsageError

HEADS, DIM = 2, 4


def tokens(names: list[list[int]], places: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values that say whose they are: row name, head, place."""
    b, n = places.shape
    k = torch.zeros(b, HEADS, n, DIM)
    for row, name in enumerate(names):
        for head in range(HEADS):
            k[row, head] = torch.stack(
                [torch.full((n,), float(name[0])), torch.full((n,), float(head)), places[row].float(), torch.ones(n)], 1
            )
    return k, -k


def check(store: Slots, names: list[list[int]], expected: list[list[list[int]]]) -> None:
    """expected[row][head]: the places held, in order."""
    view = store.view()
    place = view.place.expand(-1, HEADS, -1)
    assert view.k.shape[2] == place.shape[2]
    assert bool((place >= 0).all()) or view.holes
    assert store.tokens == [sum(map(len, row)) / HEADS for row in expected]
    for row, name in enumerate(names):
        for head in range(HEADS):
            real = place[row, head] >= 0
            assert place[row, head][real].tolist() == expected[row][head]
            want, _ = tokens([name], place[row, head][real][None])
            assert torch.equal(view.k[row, head][real], want[0, head])
            assert torch.equal(view.v[row, head][real], -want[0, head])
            for note in store.notes.values():
                known = store.place.expand(-1, HEADS, -1)[row, head] >= 0
                written = note[row, head][known]
                assert bool(((written == place[row, head][: len(known)][known]) | (written == 0)).all())


class Model:
    """The same as lists, and the operations on both."""

    def __init__(self, rows: int, dice: random.Random) -> None:
        self.store, self.dice = Slots(), dice
        self.names = [[row + 1] for row in range(rows)]
        self.next = [0] * rows
        self.held: list[list[list[int]]] = [[[] for _ in range(HEADS)] for _ in range(rows)]

    def _new(self, n: int) -> Tensor:
        return torch.tensor([[start + j for j in range(n)] for start in self.next])

    def append(self) -> None:
        places = self._new(self.dice.randint(1, 5))
        holes = self.dice.random() < 0.3
        if holes:
            for row in range(len(places)):
                pad = self.dice.randint(0, places.shape[1] - 1)
                places[row] = torch.cat([torch.full((pad,), NONE), places[row][: places.shape[1] - pad]])
        self.store.append(*tokens(self.names, places), places, holes=holes)
        self._took([row[row >= 0].tolist() for row in places])

    def draft(self) -> None:
        n = self.dice.randint(1, 5)
        places = self._new(n)
        self.store.scratch(*tokens(self.names, places), places)
        if self.dice.random() < 0.2:
            self.store.discard()
            return
        taken = [sorted(self.dice.sample(range(n), self.dice.randint(0, n))) for _ in self.names]
        most = max(map(len, taken))
        index = torch.tensor([row + [NONE] * (most - len(row)) for row in taken], dtype=torch.int64).view(len(taken), most)
        self.store.commit(index)
        self._took([places[row][chosen].tolist() for row, chosen in enumerate(taken)])

    def evict(self) -> None:
        if not self.store.slots:
            return
        planes = self.dice.choice([1, HEADS])
        mask = torch.tensor([[[self.dice.random() < 0.6 for _ in range(self.store.slots)] for _ in range(planes)] for _ in self.names])
        place, wide = self.store.place.expand(-1, HEADS, -1), mask.expand(-1, HEADS, -1)
        self.held = [
            [place[row, head][wide[row, head] & (place[row, head] >= 0)].tolist() for head in range(HEADS)]
            for row in range(len(self.names))
        ]
        self.store.keep(mask)

    def reorder(self) -> None:
        order = [self.dice.randrange(len(self.names)) for _ in self.names]
        self.store.rows(torch.tensor(order))
        for name in ("names", "next", "held"):
            setattr(self, name, [list(getattr(self, name)[row]) if name != "next" else self.next[row] for row in order])
        self.held = [[list(head) for head in row] for row in self.held]

    def note(self) -> None:
        if self.store.slots:
            self.store.notes["mine"] = self.store.place.expand(-1, HEADS, -1).float().clamp(min=0)

    def _took(self, places: list[list[int]]) -> None:
        for row, new in enumerate(places):
            for head in range(HEADS):
                self.held[row][head] += new
            self.next[row] = max([self.next[row], *[place + 1 for place in new]])


@pytest.mark.parametrize("seed", range(40))
def test_slots_hold_their_tokens(seed: int) -> None:
    dice = random.Random(seed)
    model = Model(dice.randint(1, 3), dice)
    model.append()
    for _ in range(25):
        getattr(model, dice.choice(["append", "draft", "draft", "evict", "reorder", "note"]))()
        check(model.store, model.names, model.held)


def filled(rows: int, n: int, dtype: torch.dtype = torch.float32) -> Slots:
    store = Slots()
    places = torch.arange(n).expand(rows, n)
    store.append(torch.randn(rows, HEADS, n, 16).to(dtype), torch.randn(rows, HEADS, n, 16).to(dtype), places)
    return store


def test_eviction_frees_memory() -> None:
    store = filled(2, 1000)
    before = stored([store.k, store.v])
    assert before == 2 * 2 * HEADS * 1000 * 16 * 4
    store.keep(torch.arange(1000).view(1, 1, -1) % 4 == 0)
    assert stored([store.k, store.v]) == before // 4
    assert store.bytes < before // 3


def test_uneven_heads_pay_for_what_they_hold() -> None:
    store = filled(1, 1000)
    mask = torch.zeros(1, HEADS, 1000, dtype=torch.bool)
    mask[0, 0, :900] = True
    mask[0, 1, :100] = True
    store.keep(mask)
    assert store.old is not None and isinstance(store.old[0], Flat)
    assert stored([*store.old[0].tensors(), *store.old[1].tensors()]) == 2 * 1000 * 16 * 4
    assert stored([store.k, store.v]) == 0


def test_appending_does_not_copy_every_time() -> None:
    store = filled(1, 100)
    seen = set()
    for place in range(100, 160):
        store.append(torch.zeros(1, HEADS, 1, 16), torch.zeros(1, HEADS, 1, 16), torch.tensor([[place]]))
        seen.add(store.k.data_ptr())
    assert len(seen) <= 5


def test_padding_is_zero() -> None:
    """Whatever stood there: what is not read must not turn the rest into NaN."""
    store, k = Slots(), torch.full((1, HEADS, 3, DIM), float("nan"))
    k[:, :, 1:] = 1.0
    store.append(k, k, torch.tensor([[NONE, 0, 1]]), holes=True)
    assert torch.equal(store.view().k[0, :, 0], torch.zeros(HEADS, DIM))
    assert store.held().tolist() == [[2]]


def test_refresh_rewrites_in_place() -> None:
    store = filled(2, 6)
    new = torch.full((2, HEADS, 2, 16), 7.0)
    store.refresh(torch.tensor([[1, 3], [0, 5]]), new, -new)
    view = store.view()
    assert torch.equal(view.k[0, :, 3], new[0, :, 0]) and torch.equal(view.v[1, :, 5], -new[0, :, 0])
    assert view.place[0, 0].tolist() == list(range(6))


def test_misuse_is_refused_in_words() -> None:
    store = filled(1, 4)
    with pytest.raises(UsageError, match="no draft"):
        store.commit()
    store.scratch(torch.zeros(1, HEADS, 1, 16), torch.zeros(1, HEADS, 1, 16), torch.tensor([[4]]))
    with pytest.raises(UsageError, match="open already"):
        store.scratch(torch.zeros(1, HEADS, 1, 16), torch.zeros(1, HEADS, 1, 16), torch.tensor([[4]]))
    with pytest.raises(UsageError, match="draft is open"):
        store.keep(torch.ones(1, 1, 4, dtype=torch.bool))
