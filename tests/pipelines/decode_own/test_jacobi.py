"""Speculative Jacobi decoding: windows drafted by the model's last word, in three ways of drawing, all lossless."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import hasten
from hasten.recipe import Recipe
from hasten.samplers.decode.pace import Steady
from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Context, DrafterState, Facts, Outcome
from hasten.samplers.decode.tree import Tree
from hasten.samplers.drafters_own.same_noise import SameNoise
from hasten.samplers.drafters_own.speculative_jacobi import NEVER, SpeculativeJacobi
from hasten.testing import assert_lossless
from tests.pipelines.causal_models import build
from tests.pipelines.decode_own.own_contract import greedy_is_the_same, prompts

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")


@pytest.fixture(scope="module")
def few() -> Any:
    """A model of few tokens, so that guesses are right now and then."""
    return build("llama", vocab_size=14).requires_grad_(False)


def test_greedy_texts_are_the_same() -> None:
    greedy_is_the_same(build("llama").requires_grad_(False), SpeculativeJacobi(nodes=6, row=3))


@pytest.mark.parametrize("noise", ["fresh", "coupled", "same"])
def test_sampled_texts_follow_the_models_law(few: Any, noise: Any) -> None:
    """Five tokens in windows of three: guesses of one round are drawn again, and verified, in the next ones."""
    part = SpeculativeJacobi(nodes=3, noise=noise)
    found = assert_lossless(part, SameNoise() if noise == "same" else None, few, tokens=5, runs=6000, greedy=False, top_k=2)
    assert max(each.accepted for each in found) > 0.1


def test_same_noise_writes_what_it_writes_without_drafts(few: Any) -> None:
    """With noise of its place, every token is what drawing one by one with this noise gives."""
    texts, forwards = [], []
    for nodes in (0, 6):
        recipe = Recipe(draft=SpeculativeJacobi(nodes=6, noise="same"), verify=SameNoise(), pace=Steady(nodes=nodes))
        with hasten.accelerate(few, recipe) as run:
            torch.manual_seed(3)
            texts.append(few.generate(**prompts(3) | {"input_ids": prompts(3)["input_ids"] % 14}, max_new_tokens=30, do_sample=True))
            forwards.append(len(run.trace.rounds))
    assert torch.equal(*texts) and forwards[1] < forwards[0]


class PerPlace(SpeculativeJacobi):
    """The same, with every proposal compared with one that is made place by place."""

    kind: ClassVar[str] = "test-per-place"

    def start(self, facts: Facts) -> DrafterState:
        return _PerPlaceState(self, facts, super().start(facts))


class _PerPlaceState(DrafterState):
    def __init__(self, part: PerPlace, facts: Facts, inner: Any) -> None:
        self.part, self.facts, self.inner = part, facts, inner

    def observe(self, outcome: Outcome, context: Context) -> None:
        self.inner.observe(outcome, context)

    def propose(self, context: Context, nodes: int) -> Proposal:
        made: Proposal = self.inner.propose(context, nodes)
        slow = self.slow(context, made.size - 1)
        assert torch.equal(made.valid, slow.valid) and torch.equal(made.parent, slow.parent) and made.law == slow.law
        if made.law == "point":
            assert torch.equal(made.tokens, slow.tokens)
        else:
            node = torch.arange(made.size - 1).expand(made.rows, -1)
            assert torch.allclose(made.q(node), slow.q(node))
        return made

    def slow(self, context: Context, places: int) -> Proposal:
        """Each place with the law that its own prefix has: the guess there is drawn before the next one is looked at."""
        tree = Tree(context.last, law="iid" if self.drawn else "point", warp=self.facts.warp)
        node = torch.zeros_like(context.last)[:, None]
        for place in range(places):
            laws = tree.know(node, torch.stack([self.said(row, text, place) for row, text in enumerate(context.texts)])[:, None])
            room = torch.tensor([[active and room > place + 1] for active, room in zip(context.active, context.room, strict=True)])
            if self.drawn:
                node = tree.draw(node, 1, room)
            elif self.inner.shared is not None:
                tokens = self.inner.shared.draw(laws.log(), torch.full_like(node, place))
                node = tree.add(node, tokens, room)
            else:
                node = tree.top(node, 1, room)
        return tree.proposal()

    def said(self, row: int, text: list[int], place: int) -> Tensor:
        """Logits [V] of a place: what stands behind the node that was guessed there, one further on; else the text's last tokens."""
        seen: Outcome | None = self.inner.seen
        if seen is not None:
            end = int(seen.verdict.path[row, int(seen.verdict.count[row])].clamp(min=0)) + 1 + place
            if end < seen.proposal.size and bool(seen.proposal.valid[row, end]):
                return seen.logits[row, end].float()
        above = text[-self.part.row :]
        found = torch.full((self.facts.vocabulary,), NEVER)
        found[above[place % len(above)]] = 0.0
        return found

    @property
    def drawn(self) -> bool:
        return self.facts.sampled and self.inner.shared is None


@pytest.mark.parametrize("noise", ["greedy", "fresh", "coupled", "same"])
def test_all_places_at_once_have_the_laws_of_one_after_the_other(few: Any, noise: Any) -> None:
    inputs = prompts(3)
    inputs["input_ids"] %= 14
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 6} if noise != "greedy" else {"do_sample": False}
    draft = PerPlace(nodes=6, noise="fresh" if noise == "greedy" else noise, row=3)
    with hasten.accelerate(few, Recipe(draft=draft, verify=SameNoise() if noise == "same" else None, pace=Steady())) as run:
        few.generate(**inputs, max_new_tokens=20, **sampled)
    assert sum(sum(each.drafted) for each in run.trace.rounds) > 50


def test_processors_that_look_at_the_prefix(few: Any) -> None:
    """The guesses' own prefix is assumed to be the last round's; texts follow the model's law all the same."""
    part = SpeculativeJacobi(nodes=3)
    found = assert_lossless(part, None, few, tokens=4, runs=1500, greedy=True, top_k=2, repetition_penalty=1.5)
    assert max(each.accepted for each in found) > 0.05


def test_coupled_guesses_stay_as_often_as_the_laws_allow() -> None:
    from hasten.samplers.decode.coupling import coupled

    torch.manual_seed(0)
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.2, 0.3, 0.1, 0.4])
    runs = 40_000
    old = torch.multinomial(q, runs, replacement=True)
    new = coupled(p.expand(runs, -1), q.expand(runs, -1), old, torch.ones(runs, dtype=torch.bool))
    assert abs(float((new == old).float().mean()) - float(torch.minimum(p, q).sum())) < 0.01
    shares = [Counter(new.tolist())[token] / runs for token in range(4)]
    assert max(abs(share - float(chance)) for share, chance in zip(shares, p, strict=True)) < 0.01
