"""`hasten.testing.assert_lossless` on a real model: it passes what is right, and fails on the two published bugs."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from hasten.errors import UsageError
from hasten.samplers.decode.draws import Law
from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import (
    Context,
    Drafter,
    DrafterState,
    Facts,
    Target,
    Verdict,
    Verifier,
    VerifierState,
)
from hasten.samplers.decode.tree import Tree
from hasten.samplers.decode.verify_law import Block, Lossless, MultiRound, Speculative, chain_verdict
from hasten.samplers.decode.verify_lossy import Typical
from hasten.samplers.decode.verify_match import SampleMatch
from hasten.testing import assert_lossless, exact_law
from tests.pipelines.causal_models import build

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")

TOKENS = 9
RUNS = {"runs": 1200, "greedy": False}


def table() -> Tensor:
    return 2 * torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(5))


class Table(Drafter):
    """Drafts from a fixed table: what follows a token. width: children of every node, of two levels. law: how they are chosen;
    "best" takes the most probable as points."""

    kind: ClassVar[str] = "test-table"
    nodes: int = 6
    width: int = 1
    law: Law = "iid"

    @property
    def shape(self) -> Any:
        return "chain" if self.width == 1 else "tree"

    def start(self, facts: Facts) -> DrafterState:
        return _TableState(self, facts)


class _TableState(DrafterState):
    def __init__(self, drafter: Table, facts: Facts) -> None:
        self.drafter, self.facts, self.table = drafter, facts, table()

    def propose(self, context: Context, nodes: int) -> Proposal:
        tree = Tree(context.last, law=self.drafter.law, warp=self.facts.warp)
        level, width = torch.zeros(len(context.last), 1, dtype=torch.long), self.drafter.width
        for _ in range(2):
            if tree.size - 1 + width * level.shape[1] > nodes:
                break
            tree.know(level, self.table[tree.tokens.gather(1, level)])
            level = tree.top(level, width) if self.drafter.law == "point" or not self.facts.sampled else tree.draw(level, width)
        return tree.proposal()


class RawLaw(Verifier):
    """Argmax drafts, verified with the whole law of the drafter (transformers' single-position candidates)."""

    kind: ClassVar[str] = "test-e2e-raw-law"
    shape: ClassVar[Any] = "chain"

    def start(self, facts: Facts) -> VerifierState:
        return _Wrong(facts, raw=True)


class NoResidual(Verifier):
    """What is refused is drawn again from the model's law (TriForce's middle tier)."""

    kind: ClassVar[str] = "test-e2e-no-residual"
    shape: ClassVar[Any] = "chain"

    def start(self, facts: Facts) -> VerifierState:
        return _Wrong(facts, raw=False)


class _Wrong(VerifierState):
    def __init__(self, facts: Facts, raw: bool) -> None:
        self.facts, self.raw, self.table = facts, raw, table()

    def verify(self, proposal: Proposal, target: Target) -> Verdict:
        law = target.law()
        nodes = torch.arange(proposal.size).expand_as(proposal.tokens)
        q = self.facts.warp(self.table[proposal.tokens], nodes, proposal.tokens, proposal.parent).softmax(-1)[:, :-1]
        p_of, q_of = (each.gather(-1, proposal.tokens[:, 1:, None])[..., 0] for each in (law[:, :-1], q))
        passed = proposal.verified[:, 1:] & (torch.rand_like(p_of) * q_of < p_of)
        rest = (law[:, :-1] - q).clamp(min=0) if self.raw else law[:, :-1]
        return chain_verdict(proposal, law, passed.long().cumprod(1).sum(1), rest)


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", vocab_size=TOKENS).requires_grad_(False)


def prompts() -> dict[str, Tensor]:
    ids = torch.tensor([[0, 0, 3, 8, 6], [4, 7, 5, 3, 2]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.mark.parametrize(("drafter", "verifier"), [
    (Table(), None), (Table(), Speculative()), (Table(), Block()), (Table(law="point"), SampleMatch()),
    (Table(width=2, law="without_replacement"), MultiRound()), (Table(width=2), Lossless()), (Table(width=2, law="point"), None),
], ids=lambda each: each.kind if each is not None else "default")  # fmt: skip
def test_what_is_right_passes(model: Any, drafter: Drafter, verifier: Verifier | None) -> None:
    for found in assert_lossless(drafter, verifier, model, prompts(), **RUNS):
        assert found.accepted > 0.01 and found.cells <= 64 and found.runs == 1200


@pytest.mark.parametrize("more", [
    {"repetition_penalty": 1.4}, {"eos_token_id": 4, "pad_token_id": 0}, {"top_p": 0.8, "temperature": 0.6}, {"no_repeat_ngram_size": 1},
], ids=lambda more: next(iter(more)))  # fmt: skip
def test_with_processors_and_ends(model: Any, more: dict[str, Any]) -> None:
    runs = {**RUNS, "runs": 500}
    assert_lossless(Table(width=2, law="without_replacement"), None, model, prompts(), **runs, **more)


def test_greedy_texts_are_compared(model: Any) -> None:
    assert_lossless(Table(width=2), None, model, prompts(), runs=300)


@pytest.mark.parametrize(("drafter", "verifier"), [(Table(law="point"), RawLaw()), (Table(), NoResidual())], ids=["raw law", "no residual"])
def test_the_published_bugs_are_caught(model: Any, drafter: Drafter, verifier: Verifier) -> None:
    with pytest.raises(AssertionError, match="does not write the model's texts"):
        assert_lossless(drafter, verifier, model, prompts(), **RUNS)


def test_greedy_texts_of_a_lossy_verifier_differ(model: Any) -> None:
    with pytest.raises(AssertionError, match="another greedy text|does not write"):
        assert_lossless(Table(), Typical(allow_lossy=True, epsilon=0.001, alpha=0.001), model, prompts(), runs=300)


def test_drafts_that_say_nothing_are_told(model: Any) -> None:
    far = {"input_ids": torch.tensor([[2, 3]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    with pytest.raises(AssertionError, match="nothing was tested"):
        assert_lossless(Table(), SampleMatch(), model, far, tokens=1, **RUNS)
    with pytest.raises(UsageError, match="possible texts"):
        assert_lossless(Table(), None, model, far, tokens=5, top_k=9, **RUNS)


def test_the_exact_law_is_that_of_generate(model: Any) -> None:
    call = {"top_k": 3, "temperature": 0.8, "eos_token_id": 4, "pad_token_id": 0}
    one = {name: each[:1] for name, each in prompts().items()}
    law = exact_law(model, one, 2, call)
    assert abs(sum(law.values()) - 1) < 1e-6
    assert all(cell[1] == 0 for cell in law if cell[0] == 4)
