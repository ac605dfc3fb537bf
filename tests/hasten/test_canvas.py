"""The canvas: what a cut, an erasure and a copy leave behind, and what the host is told.

Shapes: B texts, L slots.
"""

from __future__ import annotations

import torch

from hasten.canvas import DONE, MASK, PAD, PROMPT, Canvas
from tests.text_models import MASK_ID, PAD_ID, open_canvas


def nested() -> Canvas:
    """Texts of 3 + 6 and 1 + 4 slots, in inner blocks of two within outer ones of all."""
    canvas = open_canvas([3, 1], [6, 4])
    canvas.enter(canvas.open, torch.tensor([[3, 5], [1, 3]]), torch.tensor([[3, 9], [1, 5]]))
    return canvas


def test_a_cut_ends_the_text_and_both_of_its_blocks() -> None:
    canvas = nested()
    canvas.cut(torch.tensor([4, 99]), PAD_ID)
    assert canvas.end.tolist() == [4, 5], "a text is never made longer"
    assert canvas.span.tolist() == [[3, 4], [1, 3]] and canvas.outer.tolist() == [[3, 4], [1, 5]]
    assert canvas.status[0].tolist() == [PROMPT] * 3 + [MASK] + [PAD] * 5
    assert canvas.ids[0, 4:].tolist() == [PAD_ID] * 5 and canvas.masked.sum(1).tolist() == [1, 4]


def test_a_cut_leaves_the_prompt() -> None:
    canvas = nested()
    before = canvas.ids[:, :1].clone(), canvas.ids[0, :3].clone()
    canvas.cut(torch.tensor([1, 0]), PAD_ID)
    assert torch.equal(canvas.ids[:, :1], before[0]) and torch.equal(canvas.ids[0, :3], before[1])
    assert canvas.status[:, 0].tolist() == [PROMPT, PROMPT] and not bool(canvas.masked.any())


def test_what_is_erased_was_never_written() -> None:
    canvas = nested()
    chosen = canvas.inside(torch.tensor([4, 2]), torch.tensor([6, 3]))
    canvas.write(chosen, torch.full_like(canvas.ids, 7), torch.full_like(canvas.confidence, 0.5))
    assert canvas.status[chosen].tolist() == [DONE] * 3 and canvas.committed[chosen].tolist() == [0] * 3
    canvas.erase(chosen, MASK_ID)
    assert canvas.status[chosen].tolist() == [MASK] * 3 and canvas.ids[chosen].tolist() == [MASK_ID] * 3
    assert canvas.committed.unique().tolist() == [-1]


def test_a_draft_is_a_copy() -> None:
    canvas = nested()
    draft = canvas.take(torch.tensor([1, 1]))
    draft.write(draft.masked, torch.full_like(draft.ids, 7), torch.ones_like(draft.confidence))
    draft.span += 1
    assert canvas.masked.sum(1).tolist() == [6, 4] and canvas.span[1].tolist() == [1, 3]


def test_the_host_is_told_where_each_text_stands() -> None:
    canvas = nested()
    canvas.step, canvas.since = canvas.step + 5, canvas.since + 2
    rows, ids, status = canvas.read(torch.tensor([[8], [9]]))
    assert rows == canvas.look(torch.tensor([[8], [9]]))
    first = rows[0]
    assert (first.start, first.end, first.low, first.high, first.outer_low, first.outer_high) == (3, 9, 3, 5, 3, 9)
    assert (first.left, first.masks, first.begun, first.step, first.since) == (2, 6, 2, 5, 2)
    assert first.open is True and first.told == (8,) and rows[1].told == (9,)
    assert torch.equal(ids, canvas.ids) and torch.equal(status, canvas.status)
