"""What every drafter must do, whichever paper it is from. A test class that has `make` inherits all of it.

The drafter works in the real loop on a real model; `Watched` stands between the two and looks at every proposal.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import hasten
from hasten.part import Part
from hasten.pipelines import tiny_models
from hasten.pipelines.decode.session import DecodeSession
from hasten.recipe import Recipe
from hasten.samplers.decode.pace import Steady
from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Outcome, Prefill
from tests.pipelines.causal_models import build


class Watched(Drafter):
    """Another drafter, with its proposals looked at."""

    inner: Drafter

    @property
    def shape(self) -> Any:
        return self.inner.shape

    @property
    def needs(self) -> Any:  # type: ignore[override]
        return self.inner.needs

    def start(self, facts: Facts) -> DrafterState:
        return _WatchedState(self, facts)


class _WatchedState(DrafterState):
    def __init__(self, drafter: Watched, facts: Facts) -> None:
        self.drafter, self.facts, self.inner = drafter, facts, drafter.inner.start(facts)

    def begin(self, prefill: Prefill, context: Context) -> None:
        with unchanged(context):
            self.inner.begin(prefill, context)

    def reading(self, proposal: Proposal) -> Any:
        return self.inner.reading(proposal)

    def observe(self, outcome: Outcome, context: Context) -> None:
        with unchanged(context):
            self.inner.observe(outcome, context)

    def propose(self, context: Context, nodes: int) -> Proposal:
        with unchanged(context):
            proposal = self.inner.propose(context, nodes)
        proposal.check(self.facts.vocabulary)
        assert torch.equal(proposal.tokens[:, 0], context.last), "node 0 is the last committed token"
        assert proposal.rows == len(context.texts) and proposal.size - 1 <= nodes
        depth = torch.where(proposal.verified, proposal.depth(), 0).amax(1).tolist()
        for row, (deep, active, room) in enumerate(zip(depth, context.active, context.room, strict=True)):
            assert active or not bool(proposal.verified[row].any()), "nothing is drafted for a finished row"
            assert not active or deep <= max(0, room - 1), "a node deeper than the room is of no use"
        if self.drafter.inner.shape == "chain":
            assert proposal.is_chain()
        if proposal.score is not None:
            score = proposal.score[proposal.verified]
            assert bool(((score >= 0) & (score <= 1.001)).all())
        return proposal


class unchanged:
    """Raises where the texts are not what they were."""

    def __init__(self, context: Context) -> None:
        self.context, self.before = context, copy.deepcopy(context.texts)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        assert self.context.texts == self.before, "a drafter leaves the texts as they are"


@cache
def small() -> Any:
    """A llama with random weights; 97 tokens."""
    return build("llama").requires_grad_(False)


@cache
def tiny() -> tuple[Any, Any]:
    """The bundled language model, and its tokenizer."""
    pipe = tiny_models.load("tiny-lm")
    pipe.tokenizer.padding_side = "left"
    return pipe.model.requires_grad_(False), pipe.tokenizer


def ragged(rows: int) -> dict[str, Tensor]:
    """Texts of different lengths that repeat themselves, padded on the left; below 97."""
    seed = torch.Generator().manual_seed(1)
    texts = [torch.randint(2, 97, (length,), generator=seed).repeat(3) for length in (5, 3, 8)[:rows]]
    longest = max(map(len, texts))
    ids = torch.stack([torch.nn.functional.pad(text, (longest - len(text), 0)) for text in texts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(text), (longest - len(text), 0)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


CODE = (
    "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n    return width *",
    "import os\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n\n    def read(self",
    "for name in names:\n    print(name)\n\nfor name in",
)


@pytest.mark.filterwarnings("ignore:hasten:UserWarning")
class DraftContract:
    """Inherit, and give `make`. model: on which it works, where it does not work on every one. drafts: are some of its drafts
    accepted on code? guesses: does it draft on a text that the model does not go on copying, too?"""

    new: ClassVar[int] = 20
    drafts: ClassVar[bool] = True
    guesses: ClassVar[bool] = True

    def make(self, nodes: int) -> Drafter:
        """The drafter with so many nodes."""
        raise NotImplementedError

    def model(self) -> Any:
        """A causal model of 97 tokens."""
        return small()

    def watched(self, nodes: int = 6) -> Recipe:
        return Recipe(name="watched", draft=Watched(nodes=nodes, inner=self.make(nodes)), pace=Steady())

    def run(self, model: Any, inputs: dict[str, Tensor], nodes: int = 6, **call: Any) -> tuple[Tensor, DecodeSession]:
        with hasten.accelerate(model, self.watched(nodes)) as run:
            written = model.generate(**inputs, **({"max_new_tokens": self.new, "do_sample": False} | call))
        assert isinstance(run, DecodeSession)
        return written, run

    def same(self, inputs: dict[str, Tensor], nodes: int = 6, **call: Any) -> DecodeSession:
        """Greedy texts are the model's own."""
        model = self.model()
        plain = model.generate(**inputs, **({"max_new_tokens": self.new, "do_sample": False} | call))
        drafted, run = self.run(model, inputs, nodes, **call)
        assert torch.equal(plain, drafted)
        return run

    @pytest.mark.parametrize("rows", [1, 3])
    def test_greedy_texts_are_the_same(self, rows: int) -> None:
        run = self.same(ragged(rows))
        assert not self.guesses or sum(sum(each.drafted) for each in run.trace.rounds) > 0, "it drafted nothing at all"

    @pytest.mark.parametrize("nodes", [1, 2, 9])
    def test_never_more_than_nodes(self, nodes: int) -> None:
        self.same(ragged(2), nodes, max_new_tokens=10)

    def test_never_more_than_room(self) -> None:
        for new in (1, 2, 3, 5):
            self.same(ragged(3), max_new_tokens=new)

    def test_finished_rows(self) -> None:
        inputs = ragged(3)
        free = self.model().generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for row in range(3):
            self.same(inputs, eos_token_id=int(free[row, 3]), pad_token_id=0)

    def test_processors_that_look_at_the_prefix(self) -> None:
        self.same(ragged(2), max_new_tokens=10, repetition_penalty=1.5)

    def test_sampled_texts_repeat_with_the_seed(self) -> None:
        found = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            found.append(self.run(self.model(), ragged(3), do_sample=True, temperature=4.0)[0])
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])

    def test_is_a_part(self) -> None:
        drafter = self.make(5)
        again: Part = type(drafter)(**{name: getattr(drafter, name) for name in type(drafter).model_fields})
        assert again == drafter and drafter.nodes == 5 and type(drafter).__doc__


class TinyContract(DraftContract):
    """The same, and on the bundled language model."""

    @pytest.mark.parametrize("rows", [1, 3])
    def test_greedy_texts_of_the_bundled_model_are_the_same(self, rows: int) -> None:
        model, tokenizer = tiny()
        inputs = dict(tokenizer(list(CODE[:rows]), return_tensors="pt", padding=True))
        inputs.pop("token_type_ids", None)
        plain = model.generate(**inputs, max_new_tokens=self.new, do_sample=False)
        drafted, run = self.run(model, inputs)
        assert torch.equal(plain, drafted)
        if self.drafts:
            assert run.report().tokens_per_forward > 1
