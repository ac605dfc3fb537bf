"""Chains whose places are drawn at once: each place has its law, and independent of the others."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from hasten.samplers.decode.line import Line
from hasten.samplers.decode.tree import Tree
from hasten.testing import Cell, compare

TOKENS, ROWS = 4, 20_000


def logits(seed: int, places: int = 2) -> Tensor:
    found = torch.randn(places, TOKENS, generator=torch.Generator().manual_seed(seed))
    found[0, 1] = -torch.inf
    return found


def line(each: Tensor, where: Tensor | None = None, rows: int = ROWS, warp: Any = None) -> Line:
    wide = each.expand(rows, -1, -1)
    here = torch.ones(rows, len(each), dtype=torch.bool) if where is None else where
    assumed = torch.zeros(rows, len(each), dtype=torch.long)
    return Line(torch.full((rows,), 3), wide, here, warp, assumed, "line")


def law(each: Tensor) -> dict[Cell, float]:
    first, second = each.softmax(-1)
    return {(a, b): float(first[a] * second[b]) for a in range(TOKENS) for b in range(TOKENS) if first[a] > 0}


def seen(tokens: Tensor) -> Counter[Cell]:
    return Counter(map(tuple, tokens[:, 1:].tolist()))


def test_places_follow_their_laws_independently() -> None:
    torch.manual_seed(0)
    made = line(logits(0)).drawn()
    made.check(TOKENS)
    assert made.is_chain() and made.law == "iid" and bool(made.verified[:, 1:].all())
    assert compare(law(logits(0)), seen(made.tokens), 0.0).p_value > 1e-3
    assert torch.equal(made.q(torch.tensor([[0, 1]]).expand(ROWS, -1))[0], logits(0).softmax(-1))


def test_what_was_drawn_before_stays_as_often_as_the_laws_allow() -> None:
    torch.manual_seed(1)
    before = line(logits(1, 3)).drawn()
    node = torch.tensor([[2, 3]]).expand(ROWS, -1)
    made = line(logits(0)).redrawn(before, node, torch.tensor([[True, False]]).expand(ROWS, -1))
    assert compare(law(logits(0)), seen(made.tokens), 0.0).p_value > 1e-3
    kept = (made.tokens[:, 1] == before.tokens[:, 2]).float().mean()
    most = torch.minimum(logits(0).softmax(-1)[0], logits(1, 3).softmax(-1)[1]).sum()
    assert abs(float(kept - most)) < 0.02


def test_a_line_of_points_is_the_tree_of_the_same_chain() -> None:
    where = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    said = torch.randn(3, 3, TOKENS, generator=torch.Generator().manual_seed(2))
    made = Line(torch.tensor([3, 1, 2]), said, where, None, torch.zeros(3, 3, dtype=torch.long), "line").best()
    tree, node = Tree(torch.tensor([3, 1, 2]), law="point"), torch.zeros(3, 1, dtype=torch.long)
    for place in range(3):
        tree.know(node, said[:, place : place + 1])
        node = tree.top(node, 1, where[:, place : place + 1])
    slow = tree.proposal()
    assert torch.equal(made.valid, slow.valid) and torch.equal(made.parent, slow.parent) and made.score is not None
    assert torch.equal(made.tokens, slow.tokens) and slow.score is not None and torch.allclose(made.score, slow.score)


def test_processors_that_look_at_the_prefix_see_what_is_assumed() -> None:
    told = []

    def warp(logits: Tensor, nodes: Tensor, tokens: Tensor, parent: Tensor) -> Tensor:
        told.append((nodes.tolist(), tokens.tolist(), parent.tolist()))
        return logits

    assumed = torch.tensor([[7, 8, 9]])
    Line(torch.tensor([3]), torch.zeros(1, 3, TOKENS), torch.ones(1, 3, dtype=torch.bool), warp, assumed, "line")
    assert told == [([[0, 1, 2]], [[3, 7, 8]], [[-1, 0, 1]])]
