"""Every lossless verifier writes the model's law, for every way of drafting; the published ways of getting it wrong are
caught."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from hasten.errors import RecipeError, UsageError
from hasten.part import parse
from hasten.samplers.decode.draws import sample
from hasten.samplers.decode.paths import ancestors, path_to
from hasten.samplers.decode.proposal import Proposal, chain, nothing
from hasten.samplers.decode.protocols import Facts, Target, Verdict, Verifier, VerifierState
from hasten.samplers.decode.tree import Tree
from hasten.samplers.decode.verify_law import (
    Block,
    Lossless,
    MultiRound,
    Speculative,
    chain_laws,
    chain_verdict,
)
from hasten.samplers.decode.verify_lossy import Confident, Surprise, Typical
from hasten.samplers.decode.verify_match import GreedyTree, SampleMatch
from tests.samplers.decode.markov import TOKENS, TableTarget, agreement, extended, grown, tables

LEAST = 1e-4

CHAINS = {
    "iid": lambda q: grown(q, "iid", (1, 1)),
    "three": lambda q: grown(q, "iid", (1, 1, 1)),
    "argmax": lambda q: grown(q, "point", (1, 1)),
    "ragged": lambda q: grown(q, "iid", (1, 1), ragged=True),
    "extended": lambda q: extended(q, 3),
    "extended, ragged": lambda q: extended(q, 3, ragged=True),
    "extended, wide": lambda q: extended(q, 2).widened(5),
    "one": lambda q: grown(q, "iid", (1,)),
    "none": lambda q: nothing(torch.zeros(20_000, dtype=torch.long)),
}
TREES = {
    "iid": lambda q: grown(q, "iid", (3, 2)),
    "without replacement": lambda q: grown(q, "without_replacement", (3, 2)),
    "best": lambda q: grown(q, "point", (3, 2)),
    "best, then iid": lambda q: grown(q, "iid", (2, 1), points=2),
    "best, then without": lambda q: grown(q, "without_replacement", (2, 2), points=1),
    "all without replacement": lambda q: grown(q, "without_replacement", (TOKENS, 1)),
    "ragged": lambda q: grown(q, "without_replacement", (2, 2), ragged=True),
}
ANY: list[Verifier] = [Lossless(), MultiRound(), SampleMatch(), GreedyTree()]


@pytest.mark.parametrize("verifier", [*ANY, Speculative(), Block()], ids=lambda each: each.kind)
@pytest.mark.parametrize("drafts", CHAINS)
def test_chains_keep_the_law(verifier: Verifier, drafts: str) -> None:
    torch.manual_seed(0)
    for seed in (0, 1):
        p, q = tables(seed)
        found = agreement(verifier, CHAINS[drafts](q), p)
        assert found.p_value > LEAST, found


@pytest.mark.parametrize("verifier", ANY, ids=lambda each: each.kind)
@pytest.mark.parametrize("drafts", TREES)
def test_trees_keep_the_law(verifier: Verifier, drafts: str) -> None:
    torch.manual_seed(0)
    for seed in (0, 1):
        p, q = tables(seed)
        found = agreement(verifier, TREES[drafts](q), p)
        assert found.p_value > LEAST, found


@pytest.mark.parametrize("verifier", [*ANY, Speculative(), Block(), Typical(allow_lossy=True)], ids=lambda each: each.kind)
def test_without_drafts_the_models_own_token_is_written(verifier: Verifier) -> None:
    torch.manual_seed(0)
    p, _ = tables(0)
    last = torch.zeros(20_000, dtype=torch.long)
    proposal, state = nothing(last), verifier.start(FACTS)
    best = TableTarget(proposal, p, sampled=False)
    assert torch.equal(state.alone(last, best), state.verify(proposal, best).token)
    target = TableTarget(proposal, p)
    shares = state.alone(last, target).bincount(minlength=TOKENS) / len(last)
    torch.testing.assert_close(shares, target.law()[0, 0].float(), atol=0.015, rtol=0.0)


def test_drafts_that_are_the_models_own_are_all_accepted() -> None:
    torch.manual_seed(0)
    p, _ = tables(0)
    for verifier, law in ((Speculative(), "iid"), (Block(), "iid"), (MultiRound(), "iid"), (MultiRound(), "without_replacement")):
        proposal = grown(p, law, (1, 1, 1))
        verdict = verifier.start(FACTS).verify(proposal, TableTarget(proposal, p))
        assert float(verdict.count.float().mean()) > 2.99, verifier.kind


def test_more_is_accepted_by_better_verifiers() -> None:
    """Of the same chains, block verification keeps more than token by token; laws more than matching; trees more than chains."""
    torch.manual_seed(0)
    p, q = tables(1)
    proposal, tree = grown(q, "iid", (1, 1, 1)), grown(q, "without_replacement", (3, 1, 1))

    def kept(verifier: Verifier, of: Proposal) -> float:
        return float(verifier.start(FACTS).verify(of, TableTarget(of, p)).count.float().mean())

    match, token, block = (kept(each, proposal) for each in (SampleMatch(), Speculative(), Block()))
    assert match < token < block
    assert kept(MultiRound(), tree) > token
    assert abs(kept(MultiRound(), proposal) - token) < 0.03


def test_a_chain_is_decided_as_a_whole() -> None:
    """`Lossless` keeps as much of it as `Block`, because the tree knows that it is one; of any other tree it does not know."""
    p, q = tables(1)
    proposal = extended(q, 3)
    assert proposal.straight and proposal.widened(6).straight and proposal.is_chain()
    counts = []
    for verifier in (Lossless(), Block()):
        torch.manual_seed(0)
        counts.append(verifier.start(FACTS).verify(proposal, TableTarget(proposal, p)).count)
    assert torch.equal(*counts)
    torch.manual_seed(0)
    assert float(MultiRound().start(FACTS).verify(proposal, TableTarget(proposal, p)).count.float().mean()) < float(counts[0].float().mean())


@pytest.mark.parametrize("how", ["draw", "add", "redraw", "top", "other parents"])
def test_what_is_no_chain_for_certain_is_not_decided_as_a_whole(how: str) -> None:
    _, q = tables(1)
    rows = torch.zeros(3, 1, dtype=torch.long)
    tree = Tree(rows[:, 0], law="iid")
    tree.know(rows, q[rows].log())
    first = tree.extend()
    tree.know(first, q[tree.tokens.gather(1, first)].log())
    before = tree.proposal()
    if how == "other parents":
        assert before.straight and not replace(before, parent=before.parent.clone()).straight
        return
    steps = {
        "draw": lambda: tree.draw(rows), "add": lambda: tree.add(first, rows), "top": lambda: tree.top(first),
        "redraw": lambda: tree.redraw(first, before, first, torch.ones_like(rows, dtype=torch.bool)),
    }  # fmt: skip
    steps[how]()
    assert not tree.proposal().straight


FACTS = Facts(20_000, TOKENS, torch.device("cpu"), True, lambda logits, *_: logits)


def test_greedy_takes_the_longest_path_of_best_tokens() -> None:
    p, _ = tables(0)
    line = [0]
    for _ in range(4):
        line.append(int(p[line[-1]].argmax()))
    tokens = torch.tensor([[0, 5, line[1], line[2], (line[2] + 1) % 6, line[3]]])
    parent = torch.tensor([[-1, 0, 0, 2, 2, 3]])
    proposal = Proposal(tokens, parent, torch.ones_like(tokens, dtype=torch.bool))
    for verifier in (*ANY, Block()) if line[1] != 5 else ANY:
        if verifier.shape == "tree":
            verdict = verifier.start(FACTS).verify(proposal, TableTarget(proposal, p, sampled=False))
            assert verdict.path.tolist() == [[0, 2, 3, 5, -1, -1]] and verdict.count.tolist() == [3]
            assert verdict.token.tolist() == [line[4]]


# --- what is caught -----------------------------------------------------------------------------------


class RawLaw(Verifier):
    """An argmax draft that is verified against the drafter's whole law, as transformers' single-position candidates were."""

    kind: ClassVar[str] = "test-raw-law"

    def start(self, facts: Facts) -> VerifierState:
        return _RawState(facts)


class _RawState(VerifierState):
    def __init__(self, facts: Facts) -> None:
        self.q = tables(1)[1]

    def verify(self, proposal: Proposal, target: Target) -> Verdict:
        law = target.law()
        q = self.q[proposal.tokens[:, :-1]]
        p_of, q_of = (each.gather(-1, proposal.tokens[:, 1:, None])[..., 0] for each in (law[:, :-1], q))
        count = (torch.rand_like(p_of) * q_of < p_of).long().cumprod(1).sum(1)
        return chain_verdict(proposal, law, count, (law[:, :-1] - q).clamp(min=0))


class FromTheLaw(Verifier):
    """A refused draft is replaced by a draw from the model's law in place of the residual, as in TriForce's middle tier."""

    kind: ClassVar[str] = "test-from-the-law"

    def start(self, facts: Facts) -> VerifierState:
        return _FromState()


class _FromState(VerifierState):
    def verify(self, proposal: Proposal, target: Target) -> Verdict:
        law = target.law()
        p, _, p_of, q_of = chain_laws(proposal, law)
        count = (torch.rand_like(p_of) * q_of < p_of).long().cumprod(1).sum(1)
        return chain_verdict(proposal, law, count, p)


@pytest.mark.parametrize(("verifier", "drafts"), [(RawLaw(), "argmax"), (FromTheLaw(), "iid")], ids=["raw law", "no residual"])
def test_published_bugs_are_caught(verifier: Verifier, drafts: str) -> None:
    torch.manual_seed(0)
    p, q = tables(1)
    found = agreement(verifier, CHAINS[drafts](q), p)
    assert found.p_value < 1e-12 and found.total_variation > 5 * found.expected


@pytest.mark.parametrize("verifier", [Typical(allow_lossy=True), Surprise(allow_lossy=True), Confident(allow_lossy=True, above=0.3)])
def test_lossy_verifiers_are_lossy(verifier: Verifier) -> None:
    torch.manual_seed(0)
    p, q = tables(1)
    found = agreement(verifier, grown(q, "iid", (1, 1)), p)
    assert not verifier.lossless and found.p_value < LEAST


@pytest.mark.parametrize("kind", ["typical", "surprise", "confident"])
def test_lossy_verifiers_have_to_be_asked_for(kind: str) -> None:
    with pytest.raises(RecipeError, match="allow_lossy"):
        parse(Verifier, {"kind": kind}, "recipe")
    assert not parse(Verifier, {"kind": kind, "allow_lossy": True}, "recipe").lossless


# --- proposals ----------------------------------------------------------------------------------------


def test_a_law_cannot_come_from_outside() -> None:
    tree = grown(tables(0)[1], "iid", (2,), rows=3)
    for more in ({"law": "iid"}, {"drawn": tree.drawn}, {"_laws": torch.rand(3, 1, 6)}):
        with pytest.raises(UsageError, match=r"Tree\.draw"):
            Proposal(tree.tokens, tree.parent, tree.valid, **more)


def test_a_node_keeps_the_law_that_it_was_drawn_from() -> None:
    p, q = tables(0)
    root = torch.zeros(4, 1, dtype=torch.long)
    tree = Tree(root[:, 0], law="iid")
    tree.know(root, q[root].log())
    tree.draw(root, 2)
    tree.know(root, p[root].log())
    torch.testing.assert_close(tree.proposal().q(root)[:, 0], q[:1].expand(4, -1))


def test_draws_follow_their_law_and_never_repeat_without_replacement() -> None:
    torch.manual_seed(0)
    _, q = tables(0)
    tokens = sample(q[0].expand(20_000, -1), 3, "without_replacement")
    assert all(len(set(row)) == 3 for row in tokens[:500].tolist())
    shares = torch.bincount(tokens[:, 0], minlength=TOKENS) / len(tokens)
    torch.testing.assert_close(shares, q[0], atol=0.015, rtol=0)
    both = sample(q[0].expand(20_000, -1), 2, "iid")
    torch.testing.assert_close(torch.bincount(both[:, 1], minlength=TOKENS) / len(both), q[0], atol=0.015, rtol=0)


def test_a_second_draw_without_replacement_knows_the_first() -> None:
    torch.manual_seed(0)
    _, q = tables(0)
    root = torch.zeros(500, 1, dtype=torch.long)
    tree = Tree(root[:, 0], law="without_replacement")
    tree.know(root, q[root].log())
    tree.draw(root, 2)
    tree.draw(root, TOKENS)  # two more than there are
    found = tree.proposal()
    rows = [[token for token, there in zip(row[1:], valid[1:], strict=True) if there] for row, valid in zip(found.tokens.tolist(), found.valid.tolist(), strict=True)]
    assert all(sorted(row) == list(range(TOKENS)) for row in rows)


def test_trees_know_their_paths() -> None:
    parent = torch.tensor([[-1, 0, 0, 1, 3, 2], [-1, 0, 1, 2, 3, 4]])
    above = ancestors(parent)
    assert (above.sum(-1) - 1).tolist() == [[0, 1, 1, 2, 3, 2], [0, 1, 2, 3, 4, 5]]
    assert path_to(torch.tensor([4, 5]), above, above.sum(-1) - 1).tolist() == [[0, 1, 3, 4, -1, -1], [0, 1, 2, 3, 4, 5]]
    found = chain(torch.tensor([7]), torch.tensor([[3, 4]]), torch.tensor([[True, True]]))
    found.check(9)
    assert found.is_chain() and not Proposal(torch.zeros(2, 6, dtype=torch.long), parent, parent >= -1).is_chain()


@pytest.mark.parametrize(("name", "value", "words"), [
    ("parent", [[-1, 2, 0]], "before its children"), ("parent", [[0, 0, 1]], "node 0"), ("tokens", [[1, 9, 3]], "below 9"),
    ("valid", [[1, 0, 1]], "parent of a valid node"),
])  # fmt: skip
def test_wrong_trees_are_told(name: str, value: list[list[int]], words: str) -> None:
    parts: dict[str, Tensor] = {"tokens": torch.tensor([[1, 2, 3]]), "parent": torch.tensor([[-1, 0, 1]]), "valid": torch.ones(1, 3) > 0}
    parts[name] = torch.tensor(value).to(parts[name].dtype)
    with pytest.raises(UsageError, match=words):
        Proposal(**parts).check(9)


def test_wider_proposals_are_the_same() -> None:
    torch.manual_seed(0)
    p, q = tables(0)
    found = grown(q, "iid", (3, 2))
    wide = found.widened(16)
    assert wide.size == 16 and wide.law == "iid"
    first, second = (agreement(MultiRound(), each, p) for each in (found, wide))
    assert first.p_value > LEAST and second.p_value > LEAST
