"""The echo cache: which tokens it computes again."""

from __future__ import annotations

import torch

from hasten.caching.kv_echo import Echo
from hasten.caching.store import KVStore
from hasten.canvas import DONE, Canvas
from tests.text_models import EOS_ID, facts


def test_it_computes_what_is_open_what_was_written_and_its_other_occurrences() -> None:
    canvas = Canvas.of([torch.tensor([5, 6, 7, 5, 8])], [4], facts())
    canvas.enter(canvas.open, torch.tensor([[5, 9]]))
    state = Echo().start(facts(), KVStore(1, canvas.slots, torch.device("cpu")))
    state.tell(canvas)
    written = torch.zeros(1, 9, dtype=torch.bool)
    written[0, 6] = True
    canvas.write(written, torch.full((1, 9), 5), torch.ones(1, 9))
    canvas.step += 1
    state.changed(written, torch.zeros_like(written), canvas)
    rows = canvas.look(state.tell(canvas))
    [call] = state.plan(canvas, rows)
    assert call.tokens[0].nonzero()[:, 0].tolist() == [0, 3, 5, 6, 7, 8]


def test_frequent_tokens_have_no_echo() -> None:
    canvas = Canvas.of([torch.tensor([5, 5, 5, 6, 8])], [3], facts())
    canvas.enter(canvas.open, torch.tensor([[5, 8]]))
    state = Echo(often=3).start(facts(), KVStore(1, canvas.slots, torch.device("cpu")))
    state.tell(canvas)
    written = torch.zeros(1, 8, dtype=torch.bool)
    written[0, 5:7] = True
    token = torch.tensor([[0, 0, 0, 0, 0, 5, 6, 0]])
    canvas.write(written, token, torch.ones(1, 8))
    canvas.step += 1
    state.changed(written, torch.zeros_like(written), canvas)
    [call] = state.plan(canvas, canvas.look(state.tell(canvas)))
    assert call.tokens[0].nonzero()[:, 0].tolist() == [3, 5, 6, 7]


def test_texts_do_not_hear_each_other() -> None:
    canvas = Canvas.of([torch.tensor([5, 6]), torch.tensor([5, 7])], [2, 2], facts())
    canvas.enter(canvas.open, torch.tensor([[2, 4], [2, 4]]))
    state = Echo().start(facts(), KVStore(2, canvas.slots, torch.device("cpu")))
    state.tell(canvas)
    written = torch.zeros(2, 4, dtype=torch.bool)
    written[0, 2] = True
    canvas.write(written, torch.full((2, 4), 5), torch.ones(2, 4))
    assert int(canvas.status[0, 2]) == DONE and EOS_ID != 5
    canvas.step += 1
    state.changed(written, torch.zeros_like(written), canvas)
    calls = state.plan(canvas, canvas.look(state.tell(canvas)))
    chosen = {member: call.tokens[i].nonzero()[:, 0].tolist() for call in calls for i, member in enumerate(call.members)}
    assert chosen == {0: [0, 2, 3], 1: [2, 3]}
