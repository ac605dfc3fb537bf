"""Reordering what may stand in any order: how tokens are dealt, and what a teacher lets pass.

Shapes: B texts of at most L tokens; V logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch
from hasten.distill.methods.dparallel import DParallel
from hasten.distill.network.host_call import Condition
from hasten.distill.text.reorder import dealt, reordered
from hasten.distill.text.roles import Texts
from tests.distill.test_text_methods import MASK, VOCAB, texts, trainer


class _Player:
    """Says that token `wants(b, l)` stands in slot l of row b, and how sure it is."""

    def __init__(self, wants: Tensor, sure: float) -> None:
        self.wants, self.sure = wants, sure
        self.shown: list[Tensor] = []

    def logits(self, ids: Tensor, end: Tensor, asked: Tensor) -> Tensor:
        self.shown.append(ids)
        wants = self.wants.repeat(len(ids) // len(self.wants), 1)
        return self.sure * F.one_hot(wants[asked], VOCAB).float()


def test_the_surest_pair_is_dealt_first() -> None:
    p = torch.tensor([[0.5, 0.4, 0.1], [0.6, 0.3, 0.1], [0.2, 0.1, 0.7]])  # slot x token
    logits = torch.full((3, VOCAB), -30.0)
    logits[:, [7, 8, 9]] = p.log()
    ids, inside = torch.tensor([[4, 9, 8, 7, 5]]), torch.tensor([[False, True, True, True, False]])
    assert dealt(logits, ids, inside).tolist() == [[4, 8, 7, 9, 5]]  # 9 in the third slot, 7 in the second, 8 is left
    twice = torch.tensor([[4, 9, 9, 7, 5]])
    assert sorted(dealt(logits, twice, inside)[0].tolist()) == sorted(twice[0].tolist())


def test_tokens_are_dealt_within_their_row_and_none_is_lost() -> None:
    rows, g = texts(20), torch.Generator().manual_seed(0)
    inside = (rows.place >= rows.start[:, None]) & (rows.place < rows.end[:, None]) & (torch.rand(20, 17, generator=g) < 0.7)
    inside[3] = False
    found = dealt(torch.randn(int(inside.sum()), VOCAB, generator=g), rows.ids, inside)
    assert torch.equal(found[~inside], rows.ids[~inside]) and not torch.equal(found, rows.ids)
    for row in range(20):
        assert sorted(found[row].tolist()) == sorted(rows.ids[row].tolist())


def question() -> tuple[Texts, Tensor, Tensor]:
    """Two rows of one text; its second to fourth generated token may change places."""
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9]]).repeat(2, 1)
    words = torch.tensor([[False, False, True, True, True, False, False]]).repeat(2, 1)
    return Texts(ids, torch.tensor([2, 2]), torch.tensor([7, 7])), words, words & (ids == 6)


def test_what_the_student_prefers_is_taken_where_the_teacher_does_not_mind() -> None:
    rows, words, first = question()
    backwards = torch.tensor([[3, 4, 7, 6, 5, 8, 9], [3, 4, 5, 6, 7, 8, 9]])
    student: Any = _Player(backwards, 3.0)
    ids, moved = reordered(student, _Player(rows.ids, 0.0), rows, words, first, MASK, 0.1)  # type: ignore[arg-type]
    assert torch.equal(ids, backwards) and moved.tolist() == [True, False]
    assert student.shown[0].tolist() == [[3, 4, MASK, MASK, MASK, MASK, MASK]] * 2
    teacher = _Player(rows.ids, 3.0)
    ids, moved = reordered(student, teacher, rows, words, first, MASK, 0.1)  # type: ignore[arg-type]
    assert torch.equal(ids, rows.ids) and not moved.any(), "this teacher knows the right order"
    shown = teacher.shown[0]  # each word is asked for once, among the others; nothing behind them is shown
    assert shown[0].tolist() == [3, 4, 5, MASK, 7, MASK, MASK] and shown[2].tolist() == [3, 4, MASK, 6, MASK, MASK, MASK]
    assert shown[4].tolist() == [3, 4, 7, MASK, 5, MASK, MASK]


def test_the_tolerance_is_in_nats_per_token() -> None:
    """Two of three words of the proposal are not what the teacher wants: (2 x 3 nats) / 3 words."""
    rows, words, first = question()
    student, teacher = _Player(torch.tensor([[3, 4, 7, 6, 5, 8, 9]]).repeat(2, 1), 3.0), _Player(rows.ids, 3.0)
    for slack, expected in ((1.99, False), (2.01, True)):
        _, moved = reordered(student, teacher, rows, words, first, MASK, slack)  # type: ignore[arg-type]
        assert moved.tolist() == [expected] * 2


def test_without_a_tolerance_nothing_is_asked_and_with_one_rows_stay_their_own(tmp_path: Path) -> None:
    rows = texts(8)
    losses = {}
    for slack in (None, 0.0, 1e9):
        state: Any = trainer(DParallel(block=6, slack=slack), tmp_path, full=True).state
        network = state.learner.call.network
        with torch.no_grad():
            for value in network.parameters():
                value.add_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
            losses[slack] = state.loss("student", Batch(rows.condition, Condition({})), Draw(0, 1, range(8)), 1, {})
            for row in (0, 5):
                alone = Texts(rows.ids[row : row + 1], rows.start[row : row + 1], rows.end[row : row + 1])
                loss = state.loss("student", Batch(alone.condition, Condition({})), Draw(0, 1, [row]), 1, {})
                torch.testing.assert_close(loss.rows, losses[slack].rows[row : row + 1], rtol=1e-4, atol=1e-4)
    assert "moved" not in losses[None].metrics
    assert 0 < float(losses[1e9].metrics["moved"]) and float(losses[0.0].metrics["moved"]) < float(losses[1e9].metrics["moved"])
    assert not torch.allclose(losses[None].rows, losses[1e9].rows)
