"""Trees of guesses: the best paths, static shapes, and nodes that ask behind likely ends."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from hasten.samplers.decode.proposal import nothing
from hasten.samplers.decode.protocols import Context, Outcome, Verdict
from hasten.samplers.drafters_own.asked import split, with_questions
from hasten.samplers.drafters_own.lattice import best_paths
from hasten.samplers.drafters_own.trees import along, grown, ranked

CHANCE = torch.tensor([[[0.6, 0.3], [0.5, 0.4], [0.9, 0.05]], [[0.4, 0.35], [0.7, 0.2], [0.3, 0.3]]])
TOKEN = torch.tensor([[[5, 6], [7, 8], [9, 4]], [[1, 2], [3, 4], [5, 6]]])


def context(room: tuple[int, int] = (9, 9), active: tuple[bool, bool] = (True, True)) -> Context:
    return Context([[1, 2], [3, 4]], torch.tensor([2, 4]), list(active), list(room))


def guess(depth: int, before: Tensor) -> tuple[Tensor, Tensor]:
    wide = (-1, before.shape[1], -1)
    return TOKEN[:, depth - 1, None].expand(*wide), CHANCE[:, depth - 1, None].expand(*wide)


def test_ranked_are_the_best_of_all_paths() -> None:
    made = ranked(context(), guess, 3, 6, "x")
    made.check(20)
    for row in range(2):
        every = sorted(
            (float(torch.stack([CHANCE[row, d, r] for d, r in enumerate(path)]).prod())
             for length in (1, 2, 3) for path in itertools.product(range(2), repeat=length)), reverse=True,
        )  # fmt: skip
        assert made.score is not None
        torch.testing.assert_close(made.score[row, 1:].sort(descending=True).values, torch.tensor(every[:6]))


def test_rooms_and_finished_rows() -> None:
    made = ranked(context((2, 9), (True, False)), guess, 3, 6, "x")
    made.check(20)
    assert int(made.depth()[0][made.valid[0]].max()) == 1 and made.valid[1].tolist() == [True, False, False]


def test_static_paths_are_grown_by_what_they_are_worth() -> None:
    paths = grown([[0.6, 0.2], [0.5, 0.1]], 4)
    assert paths == ((0,), (0, 0), (1,), (1, 0))
    made = along(context(), guess, paths, 4, "x")
    made.check(20)
    assert made.tokens[0].tolist() == [2, 5, 7, 6, 7] and made.parent[0].tolist() == [-1, 0, 1, 0, 3]


def test_questions_stand_behind_the_likeliest_ends() -> None:
    drafts = ranked(context(), guess, 2, 3, "x")
    vectors = torch.randn(2, 2, 4)
    made, asked = with_questions(drafts, vectors, 2)
    made.check(20)
    assert made.prompt is not None and made.vectors is not None
    assert made.size == 4 + 8 and int(made.prompt.sum()) == 16 and not bool((made.verified & made.prompt).any())
    above = made.ancestors()
    for row in range(2):
        for anchor in range(2):
            for distance, member in itertools.product(range(2), range(2)):
                node = 4 + anchor * 4 + distance * 2 + member
                read = [int(each) for each in above[row, node].nonzero()[:, 0] if int(each) >= 4]
                assert read == [4 + anchor * 4 + step * 2 + member for step in range(distance + 1)]
                assert torch.equal(made.vectors[row, node], vectors[distance, member])
    end = asked.anchors[:, 1]
    path = torch.full((2, made.size), -1)
    for row in range(2):
        line = above[row, end[row]].nonzero()[:, 0]
        path[row, : len(line)] = line
    verdict = Verdict(path, (path >= 0).sum(1) - 1, torch.tensor([0, 0]))
    index, known = asked.behind(Outcome(made, verdict, path, [1, 1], torch.zeros(2, made.size, 20)))
    assert known.all() and index[0].tolist() == [[8, 9], [10, 11]]


def test_questions_without_drafts_and_with_little_room() -> None:
    assert split(30, 3, 4, 6) == (6, 2, 3, 4) and split(1, 3, 4, 6) == (0, 1, 1, 1) and split(5, 3, 4, 6) == (2, 1, 3, 1)
    assert split(6, 3, 2, 3) == (3, 1, 3, 1) and split(2, 3, 1, 6) == (1, 1, 1, 1)
    made, asked = with_questions(nothing(context().last), torch.randn(3, 1, 4), 5)
    made.check(20)
    assert made.size == 4 and asked.anchors.tolist() == [[0], [0]]


def test_the_proxy_chooses_among_likely_tokens() -> None:
    lattice = [[(1, 0.5), (2, 0.45)], [(3, 0.5), (4, 0.5)]]
    follows = {(9, 2): {2: 0.0, 4: 0.9}, (9,): {2: 0.9}}
    found = best_paths(lattice, [9], lambda tail: follows.get(tuple(tail), {}), 3, 1.0)
    assert found[0][0] == [2, 4] and len(found) == 3
    assert best_paths(lattice, [9], lambda tail: {}, 1, 0.0)[0][0][0] == 1
