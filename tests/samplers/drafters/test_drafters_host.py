"""Drafters that need no network: their contract, and what is particular to each."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Outcome, Prefill, Verdict
from hasten.samplers.drafters.chances import Chances
from hasten.samplers.drafters.contexts import Contexts
from hasten.samplers.drafters.copy_input import Copy, Row
from hasten.samplers.drafters.host_tree import CALLS, HostTree, best_first
from hasten.samplers.drafters.jacobi import Jacobi
from hasten.samplers.drafters.look_up import LookUp
from hasten.samplers.drafters.tri_gram import NUMBERS, Matrix, TriGram
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

    def __init__(self, drafter: Drafter, text: list[int], kept: dict[str, Any] | None = None) -> None:
        warp: Any = lambda logits, nodes, tokens, parent: logits.float()
        self.state: DrafterState = drafter.start(Facts(1, 50, torch.device("cpu"), False, warp, kept={} if kept is None else kept))
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

    def write_alone(self, tokens: list[int], logits: torch.Tensor) -> None:
        """Rounds without drafts, in one go. logits [n, 50]: of the model before each of `tokens`."""
        count = len(tokens)
        read = torch.tensor([[self.text[-1], *tokens[:-1]]])
        index = torch.arange(count)[None]
        proposal = Proposal(read, index - 1, torch.ones_like(read, dtype=torch.bool))
        self.text += tokens
        verdict = Verdict(index, torch.tensor([count - 1]), torch.tensor(tokens[-1:]))
        self.state.observe(Outcome(proposal, verdict, torch.tensor([tokens]), [count], logits[None]), self.context())

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


@pytest.mark.parametrize("drafter", HOST)
def test_asked_late_it_says_what_it_would_have_said_if_it_was_always_asked(drafter: Callable[[], Drafter]) -> None:
    seed = torch.Generator().manual_seed(4)
    prompt = torch.randint(0, 6, (30,), generator=seed).tolist()
    always, late = Hand(drafter(), [*prompt]), Hand(drafter(), [*prompt])
    for length in (1, 1, 5, 2, 9):
        tokens = torch.randint(0, 6, (length,), generator=seed).tolist()
        logits = torch.randn(length, 50, generator=seed)
        always.drafts()
        always.write_alone(tokens, logits)
        late.write_alone(tokens, logits)
    for each in (always, late):  # what it knows of its own chances is another matter: it was asked, and learnt
        each.state.chances = Chances()  # type: ignore[attr-defined]
    assert always.drafts() == late.drafts() != []


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


@pytest.mark.parametrize("drafter", [Trie(keep=True), TriGram(keep=True)])
def test_what_nobody_asked_about_is_remembered_between_calls(drafter: Drafter) -> None:
    kept = dict[str, Any]()
    first = Hand(drafter, [1, 2, 3], kept)
    first.write_alone([4, 5], torch.zeros(2, 50).scatter(1, torch.tensor([[4], [5]]), 9.0))
    first.write_alone([6], torch.zeros(1, 50).scatter(1, torch.tensor([[6]]), 9.0))
    idle = Hand(drafter, [9, 9], kept)
    idle.write_alone([8], torch.zeros(1, 50))
    assert (4, 5, 6) in Hand(drafter, [7, 3], kept).drafts()
    assert (4, 5, 6) in Hand(drafter, [7, 3], kept).drafts(), "and for good"


@pytest.mark.parametrize("drafter", [Trie(keep=True), TriGram(keep=True)])
def test_what_waits_to_be_read_is_bounded(drafter: Drafter) -> None:
    kept = dict[str, Any]()
    for _ in range(3 * CALLS):
        hand = Hand(drafter, [1, 2, 3], kept)
        hand.write_alone([4] * 20, torch.zeros(20, 50))
    assert len(next(iter(kept.values()))._calls) == CALLS


def test_tri_gram_holds_few_logits_while_it_is_idle() -> None:
    """And those of the last rounds; what came before is learnt as a prompt is."""
    hand, kept, steps = Hand(TriGram(), [1, 2, 3]), 0, 16
    wide = torch.zeros(steps, NUMBERS // (8 * steps))
    for _ in range(20):
        hand.write_alone([4, 5] * (steps // 2), wide)
        state: Any = hand.state
        kept = sum(each.logits.numel() for call in state.learnt._calls for each in call.rounds)
        assert kept <= NUMBERS
    assert kept == NUMBERS
    hand.write_alone([4], torch.zeros(1, 2 * NUMBERS))
    assert [each.logits.numel() for call in state.learnt._calls for each in call.rounds] == [2 * NUMBERS]
    assert hand.drafts()[0] == (5,)


def test_tri_gram_learns_what_it_learnt_when_it_looked_at_every_round() -> None:
    """Against a matrix that is moved in every round."""
    seed = torch.Generator().manual_seed(6)
    drafter, prompt = TriGram(rate=0.6, top=4), torch.randint(0, 5, (12,), generator=seed).tolist()
    hand, eager = Hand(drafter, prompt), Matrix(0.6, 4)
    for place in range(2, len(prompt)):
        eager.move((prompt[place - 2], prompt[place - 1]), {prompt[place]: 1.0})
    for turn in range(30):
        if turn % 3 == 0:
            hand.drafts()
        token, logits = int(torch.randint(0, 5, (1,), generator=seed)), torch.randn(1, 50, generator=seed)
        hand.write_alone([token], logits)
        chance, tokens = logits[0].softmax(-1).topk(4)
        eager.move((hand.text[-3], hand.text[-2]), dict(zip(tokens.tolist(), chance.tolist(), strict=True)))
    hand.drafts()
    state: Any = hand.state
    assert state.learnt.matrix.laws == eager.laws


def test_copy_finds_places_as_if_it_looked_at_every_one() -> None:
    """Against a walk over the whole prompt, near the old place first."""
    rng = random.Random(0)
    for _ in range(200):
        prompt = [rng.randrange(4) for _ in range(rng.randrange(1, 20))]
        text = [*prompt, *(rng.randrange(4) for _ in range(9))]
        drafter = Copy(longest=3, shortest=rng.choice([1, 2]), window=4)
        row = Row(drafter, prompt)
        row.left = rng.choice([None, *range(len(prompt))])
        end, old = rng.randrange(1, len(text) + 1), row.left or 0
        slow = [
            place
            for length in range(min(3, end), drafter.shortest - 1, -1)
            for place in (*range(old, min(old + 4, len(prompt))), *range(len(prompt)))
            if place >= length and prompt[place - length : place] == text[end - length : end]
        ]
        assert list(row.found(text, end)) == slow


def test_jacobi_takes_runs_of_rounds_without_a_window() -> None:
    hand = Hand(Jacobi(window=1, run=3, pool=2), [1, 2])
    hand.write_alone([3], torch.zeros(1, 50))
    hand.write_alone([4, 2], torch.zeros(2, 50))
    assert (3, 4) in hand.drafts(), "and across their ends"


def test_jacobi_guesses_what_the_model_said() -> None:
    hand = Hand(Jacobi(window=3, pool=0), [1, 2])
    assert hand.drafts(3) == [(2,), (2, 2), (2, 2, 2)]
    hand.write(7, junk=33)  # behind node 0 stands 7, behind the guesses 33
    assert hand.drafts(3)[-1] == (33, 33, 33)
