"""While nothing is drafted, a drafter looks at nothing: not at a token of the texts, and never waits for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch.overrides import TorchFunctionMode, resolve_name

import hasten
from hasten.pipelines.decode.drafters_candidates import Candidates
from hasten.pipelines.recipes import Entry, catalogue
from hasten.recipe import Drafting, FromFile, Recipe
from hasten.samplers.decode.pace import Steady
from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Outcome, Prefill
from hasten.samplers.drafters.tri_gram import TriGram
from hasten.samplers.drafters.trie import Trie
from hasten.samplers.drafters_own.medusa import Medusa
from hasten.samplers.drafters_own.prompts import Prompts
from tests.contract_draft import CODE, ragged, small, tiny
from tests.pipelines.decode_own.own_contract import heads, prompt_tokens

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")

SEEN = "test-seen"
"""Where in `Facts.kept` is counted what was looked at: "text", and names of PyTorch's functions."""

WAITS = {"tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"}


class Looked(list[int]):
    """A text that counts who looks at its tokens."""

    seen: Counter[str]

    def __getitem__(self, place: Any) -> Any:
        self.seen["text"] += 1
        return super().__getitem__(place)

    def __iter__(self) -> Iterator[int]:
        self.seen["text"] += 1
        return super().__iter__()


class Functions(TorchFunctionMode):
    """Counts PyTorch's functions while it is open."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(resolve_name(function)).rpartition(".")[2]] += 1
        return function(*args, **kwargs or {})


class Idle(Drafter):
    """Another drafter, with what it looks at counted."""

    kind: ClassVar[str] = "test-idle"
    inner: Drafter

    @property
    def needs(self) -> Any:  # type: ignore[override]
        return self.inner.needs

    @property
    def shape(self) -> Any:
        return self.inner.shape

    def start(self, facts: Facts) -> DrafterState:
        return _IdleState(self.inner.start(facts), facts.kept.setdefault(SEEN, Counter()))


class _IdleState(DrafterState):
    def __init__(self, inner: DrafterState, seen: Counter[str]) -> None:
        self.inner, self.seen = inner, seen

    def shown(self, context: Context) -> Context:
        texts = [Looked(text) for text in context.texts]
        for text in texts:
            text.seen = self.seen
        return replace(context, texts=list[list[int]](texts))

    def begin(self, prefill: Prefill, context: Context) -> None:
        own = Counter[str]()
        with Functions(own):
            self.inner.begin(prefill, self.shown(context))
        self.seen.update({name: own[name] for name in WAITS})  # others may be: once for each call

    def observe(self, outcome: Outcome, context: Context) -> None:
        self.seen["observe()"] += 1
        self.seen["written"] += sum(outcome.lengths)
        with Functions(self.seen):
            self.inner.observe(outcome, self.shown(context))

    def propose(self, context: Context, nodes: int) -> Proposal:
        raise AssertionError("nobody asked for drafts")


def looks_at_nothing(model: Any, draft: Drafting, inputs: dict[str, Any]) -> None:
    with hasten.accelerate(model, Recipe(draft=Idle(inner=draft), pace=Steady(nodes=0))) as run:
        for _ in range(2):
            model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    seen: Counter[str] = run.kept.pop(SEEN)
    assert seen.pop("written") == 2 * 39 * len(inputs["input_ids"])
    rounds = seen.pop("observe()")
    assert not seen["text"] and not any(seen[name] for name in WAITS), seen
    assert seen.total() <= 2 * rounds, f"so little for all tokens of a stretch of rounds: {seen}"


def trained(entry: Entry) -> bool:
    """Does it need a file that a training left?"""
    draft = entry.recipe.draft
    return isinstance(draft, FromFile) or isinstance(getattr(draft, "skip", None), FromFile)


DRAFTS = {entry.name: entry.recipe.draft for entry in catalogue() if entry.recipe.draft is not None and not trained(entry)}
DRAFTS |= {"trie, kept": Trie(keep=True), "tri-gram, kept": TriGram(keep=True), "assisted": Candidates(which="assisted")}


@pytest.mark.parametrize("name", DRAFTS)
def test_a_drafter_that_is_not_asked_looks_at_nothing(name: str) -> None:
    model, tokenizer = tiny()
    looks_at_nothing(model, DRAFTS[name], dict(tokenizer(list(CODE), return_tensors="pt", padding=True)))


@pytest.mark.parametrize("kind", [Medusa, Prompts])
def test_nor_does_a_trained_one(kind: Any, tmp_path: Path) -> None:
    prompt_tokens(heads(tmp_path))
    looks_at_nothing(small(), kind(path=str(tmp_path)), ragged(3))
