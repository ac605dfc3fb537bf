"""Drafters that need no network: their contract, and what is particular to each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Outcome, Prefill, Verdict
from hasten.samplers.drafters.contexts import Contexts
from hasten.samplers.drafters.copy_input import Copy
from hasten.samplers.drafters.host_tree import HostTree, best_first
from hasten.samplers.drafters.jacobi import Jacobi
from hasten.samplers.drafters.look_up import LookUp
from hasten.samplers.drafters.tri_gram import TriGram
from hasten.samplers.drafters.trie import Trie
from tests.contract_draft import TinyContract


class TestLookUp(TinyContract):
    def make(self, nodes: int) -> Drafter:
        return LookUp(nodes=nodes)


class TestLookUpChain(TinyContract):
    def make(self, nodes: int) -> Drafter:
        return LookUp(nodes=nodes, width=1, fade=0.0)


class TestTrie(TinyContract):
    def make(self, nodes: int) -> Drafter:
        return Trie(nodes=nodes, keep=True)


class TestTriGram(TinyContract):
    def make(self, nodes: int) -> Drafter:
        return TriGram(nodes=nodes)


class TestCopy(TinyContract):
    guesses = False

    def make(self, nodes: int) -> Drafter:
        return Copy(nodes=nodes)


class TestJacobi(TinyContract):
    def make(self, nodes: int) -> Drafter:
        return Jacobi(nodes=nodes)


HOST: list[Callable[[], Drafter]] = [LookUp, Trie, TriGram, Copy]


class Hand:
    """A drafter's state worked by hand on one row; the model's logits are zeros, and the verdict is always the same token."""

    def __init__(self, drafter: Drafter, text: list[int]) -> None:
        warp: Any = lambda logits, nodes, tokens, parent: logits.float()
        self.state: DrafterState = drafter.start(Facts(1, 50, torch.device("cpu"), False, warp))
        self.text = text
        self.drafter = drafter
        ids = torch.tensor([text[:-1]])
        self.state.begin(Prefill(ids, torch.ones_like(ids), torch.zeros(1, 50)), self.context())

    def context(self) -> Context:
        return Context([self.text], torch.tensor(self.text[-1:]), [True], [99])

    def drafts(self, nodes: int = 6) -> list[tuple[int, ...]]:
        """The paths of the proposal."""
        self.last = self.state.propose(self.context(), nodes)
        tokens, parent = self.last.tokens[0].tolist(), self.last.parent[0].tolist()
        paths: list[tuple[int, ...]] = [()]
        for node in range(1, len(tokens)):
            paths.append((*paths[parent[node]], tokens[node]))
        return paths[1:]

    def write(self, token: int, junk: int = 0) -> None:
        """Refuse all drafts and write `token`. junk: what stands in the drafts and in the logits behind them instead."""
        proposal = self.last
        tokens, logits = proposal.tokens.clone(), torch.zeros(1, proposal.size, 50)
        if junk:
            tokens[:, 1:], logits[:, 1:, junk] = junk, 9.0
        proposal = type(proposal)(
            tokens, proposal.parent, proposal.valid, proposal.score, proposal.source, proposal.sources
        )
        path = torch.tensor([[0] + [-1] * (proposal.size - 1)])
        verdict = Verdict(path, torch.tensor([0]), torch.tensor([token]))
        self.text.append(token)
        self.state.observe(Outcome(proposal, verdict, torch.tensor([[token]]), [1], logits), self.context())


@pytest.mark.parametrize("drafter", HOST)
def test_what_was_refused_is_not_learnt(drafter: Callable[[], Drafter]) -> None:
    text = [3, 4, 5, 6, 3, 4, 5, 7, 3, 4]
    clean, dirty = Hand(drafter(), [*text]), Hand(drafter(), [*text])
    for token in (9, 3, 4, 5):
        assert clean.drafts() == dirty.drafts()
        clean.write(token)
        dirty.write(token, junk=33)
    assert clean.drafts() == dirty.drafts() != []
    assert all(33 not in path for path in dirty.drafts())


def test_counts_are_blended_from_long_to_short() -> None:
    contexts = Contexts(1, 3)
    contexts.read([1, 2, 3, 8, 2, 3, 9, 4, 3, 9, 5, 3])
    after = dict(contexts.after([1, 2, 3], 9))
    assert after[8] > after[9] > after[4] if 4 in after else after[8] > after[9]
    assert dict(contexts.after([7, 7, 3], 9)) == pytest.approx({8: 1 / 5, 9: 2 / 5})
    assert contexts.after([40], 9) == []


def test_fading_prefers_what_came_last() -> None:
    text = [1, 5, 1, 5, 1, 5, 1, 6, 1]
    for fade, first in ((1.0, 5), (0.0, 6)):
        contexts = Contexts(1, 1, fade)
        contexts.read(text)
        assert contexts.after(text, 1)[0][0] == first


def test_reading_in_pieces_is_reading_at_once() -> None:
    text = torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    whole, pieces = Contexts(1, 4), Contexts(1, 4)
    whole.read(text)
    for end in (1, 2, 9, 30, 60):
        pieces.read(text[:end])
    assert whole.seen == pieces.seen


def test_best_nodes_are_the_most_probable_ones() -> None:
    law = {(): [(1, 0.6), (2, 0.3)], (1,): [(3, 0.9), (4, 0.1)], (2,): [(5, 0.5)], (1, 3): [(6, 0.2)]}
    tree = HostTree(4, 9)
    best_first(tree, lambda path: law.get(tuple(path), []))
    assert sorted(tree.score[1:], reverse=True) == pytest.approx([0.6, 0.54, 0.3, 0.15])
    shallow = HostTree(9, 1)
    best_first(shallow, lambda path: law.get(tuple(path), []))
    assert shallow.tokens[1:] == [1, 2]


def test_look_up_drafts_a_loop_as_a_loop() -> None:
    assert (8, 9, 8, 9, 8, 9) in Hand(LookUp(width=1), [8, 9, 8, 9]).drafts(6)
    with pytest.raises(ValueError, match="Exchange"):
        LookUp(longest=2, shortest=3)


def test_copy_goes_on_behind_a_replaced_token() -> None:
    prompt = list(range(10, 30))
    hand = Hand(Copy(), [*prompt, 10])
    assert hand.drafts()[-1] == (11, 12, 13, 14), "a guess is tried with a few tokens"
    hand.write(11)
    assert hand.drafts()[-1] == tuple(range(12, 18)), "and then all that fit"
    hand.write(12)
    hand.drafts()
    hand.write(41)  # in place of 13
    drafts = hand.drafts()
    assert any(path[:2] == (14, 15) for path in drafts), "a token was replaced"
    assert any(path[:2] == (13, 14) for path in drafts), "or put in"
    hand.write(20)  # and now 14 to 19 are left out
    assert any(path[:3] == (21, 22, 23) for path in hand.drafts())


def test_trie_remembers_between_calls_if_asked() -> None:
    facts = Facts(1, 50, torch.device("cpu"), False, lambda logits, *_: logits)
    for keep in (True, False):
        hand = Hand(Trie(keep=keep), [1, 2, 3])
        hand.state = Trie(keep=keep).start(facts)
        ids = torch.tensor([[1, 2]])
        hand.state.begin(Prefill(ids, ids, torch.zeros(1, 50)), hand.context())
        for token in (4, 5, 6):
            hand.drafts()
            hand.write(token)
        later = Trie(keep=keep).start(facts)
        text = [9, 3]
        context = Context([text], torch.tensor([3]), [True], [99])
        later.begin(Prefill(ids, ids, torch.zeros(1, 50)), context)
        assert (4 in later.propose(context, 6).tokens[0].tolist()) == keep


def test_jacobi_guesses_what_the_model_said() -> None:
    hand = Hand(Jacobi(window=3, pool=0), [1, 2])
    assert hand.drafts(3) == [(2,), (2, 2), (2, 2, 2)]
    hand.write(7, junk=33)  # behind node 0 stands 7, behind the guesses 33
    assert hand.drafts(3)[-1] == (33, 33, 33)
