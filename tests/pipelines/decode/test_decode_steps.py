"""Rounds without drafts that are run in one go: token for token as plain decoding, and nobody misses anything."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import StaticCache
from transformers.generation.streamers import BaseStreamer

import hasten
from hasten.pipelines.decode.session import DecodeSession
from hasten.recipe import Recipe
from hasten.samplers.decode.pace import Steady
from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Outcome, Pace, PaceState
from hasten.samplers.drafters.look_up import LookUp
from hasten.samplers.drafters.tri_gram import TriGram
from hasten.testing import compare, exact_law
from tests.pipelines.causal_models import build

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")


class Turns(Pace):
    """Rounds with as many drafts as there may be, and behind each some without any."""

    kind: ClassVar[str] = "test-turns"
    without: int = 3

    def start(self, facts: Facts) -> PaceState:
        return _TurnsState(self)


class _TurnsState(PaceState):
    def __init__(self, pace: Turns) -> None:
        self.pace, self.learned = pace, 0

    def next(self, most: int) -> int:
        return 0 if self.learned % (self.pace.without + 1) else most

    def quiet(self) -> int:
        return self.pace.without - 1

    def learn(self, done: Any) -> None:
        self.learned += 1


IDLE = Recipe(draft=LookUp(), pace=Steady(nodes=0))
TURNS = Recipe(draft=LookUp(nodes=7), pace=Turns())


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama").requires_grad_(False)


def prompts(rows: int) -> dict[str, Tensor]:
    """Texts that repeat themselves, of different lengths, padded on the left."""
    rng = torch.Generator().manual_seed(0)
    texts = [torch.randint(2, 97, (length,), generator=rng).repeat(3) for length in (6, 4, 9)[:rows]]
    longest = max(map(len, texts))
    ids = torch.stack([torch.nn.functional.pad(text, (longest - len(text), 0)) for text in texts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(text), (longest - len(text), 0)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def same(model: Any, rows: int, recipe: Recipe, **call: Any) -> DecodeSession:
    """The session, where the texts are those without it."""
    asked = {**prompts(rows), "max_new_tokens": 24, "do_sample": False} | call
    plain = model.generate(**asked)
    with hasten.accelerate(model, recipe) as run:
        assert torch.equal(plain, model.generate(**asked))
    assert isinstance(run, DecodeSession) and run.calls == {"drafted": 1}
    return run


@pytest.mark.parametrize("recipe", [IDLE, TURNS], ids=["idle", "turns"])
@pytest.mark.parametrize("name", ["llama", "qwen2-mixed", "mistral-window"])
def test_texts_are_the_same_on_every_kind_of_layer(name: str, recipe: Recipe) -> None:
    model = build(name).requires_grad_(False)
    for rows in (1, 3):
        for attention in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
            run = same(model, rows, recipe)
            report = run.report()
            assert report.written == rows * 23
            assert sum(each.rows for each in report.rounds if not each.asked) > 0
            assert recipe is IDLE or report.tokens_per_forward > 1
            assert [len(row) for row in run.leads[0]] == [24] * rows and report.lead is not None and report.lead >= 0


@pytest.mark.parametrize("more", [
    {"repetition_penalty": 1.3}, {"min_new_tokens": 12, "eos_token_id": 5}, {"suppress_tokens": [3, 4]},
    {"prefix_allowed_tokens_fn": lambda row, text: [1 + (row + int(text.sum()) + each) % 90 for each in range(9)]},
], ids=lambda more: next(iter(more)))  # fmt: skip
@pytest.mark.parametrize("recipe", [IDLE, TURNS], ids=["idle", "turns"])
def test_processors_see_the_rows_so_far(model: Any, recipe: Recipe, more: dict[str, Any]) -> None:
    same(model, 3, recipe, **more)


@pytest.mark.parametrize("recipe", [IDLE, TURNS], ids=["idle", "turns"])
def test_rows_end_in_the_middle(model: Any, recipe: Recipe) -> None:
    inputs = prompts(3)
    free = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for end in free.unique().tolist()[:5]:
        same(model, 3, recipe, eos_token_id=end, pad_token_id=0)
        same(model, 3, recipe, eos_token_id=end, pad_token_id=0, repetition_penalty=1.2)
    for new in (1, 2, 3, 6):
        same(model, 3, recipe, max_new_tokens=new)


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.puts: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.puts.append(value.flatten().tolist())

    def end(self) -> None:
        self.puts.append([-1])


def test_streamers_hear_each_token_when_it_is_written(model: Any) -> None:
    first, second = Heard(), Heard()
    call: dict[str, Any] = {**prompts(3), "max_new_tokens": 20, "do_sample": False, "eos_token_id": 31}
    model.generate(**call, streamer=first)
    with hasten.accelerate(model, IDLE):
        model.generate(**call, streamer=second)
    assert first.puts == second.puts


def test_scores_caches_and_fixed_shapes(model: Any) -> None:
    more: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    asked = {**prompts(3), "max_new_tokens": 20, "do_sample": False} | more
    plain = model.generate(**asked)
    for recipe in (IDLE, TURNS):
        with hasten.accelerate(model, recipe):
            made = model.generate(**asked)
            for name in ("scores", "logits"):
                torch.testing.assert_close(torch.stack(getattr(made, name)), torch.stack(getattr(plain, name)), atol=2e-5, rtol=1e-4)
            cache = StaticCache(config=model.config, max_cache_len=asked["input_ids"].shape[1] + 20)
            fixed = model.generate(**prompts(3), max_new_tokens=20, do_sample=False, past_key_values=cache)
            assert torch.equal(fixed, plain.sequences) and torch.equal(made.sequences, plain.sequences)
            if recipe is IDLE:
                held = made.past_key_values.layers[0].keys
                torch.testing.assert_close(held, plain.past_key_values.layers[0].keys, atol=2e-5, rtol=1e-4)


class Listening(Drafter):
    """Look-up that writes down what it is told."""

    kind: ClassVar[str] = "test-listening"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden:-1"})

    def start(self, facts: Facts) -> DrafterState:
        return _ListeningState(facts)


class _ListeningState(DrafterState):
    def __init__(self, facts: Facts) -> None:
        self.inner, self.told = LookUp(nodes=7).start(facts), list[list[list[int]]]()
        self.head = facts.host.lm_head
        facts.kept["listening"] = self

    def propose(self, context: Context, nodes: int) -> Proposal:
        return self.inner.propose(context, nodes)

    def observe(self, outcome: Outcome, context: Context) -> None:
        self.told.append([row[:length] for row, length in zip(outcome.written.tolist(), outcome.lengths, strict=True)])
        for text, new in zip(context.texts, self.told[-1], strict=True):
            assert text[len(text) - len(new) :] == new
        assert torch.equal(context.last, torch.tensor([text[-1] for text in context.texts]))
        path = outcome.verdict.path.clamp(min=0)
        said = self.head(outcome.hidden["hidden:-1"])
        torch.testing.assert_close(said, outcome.logits)
        best = outcome.logits.argmax(-1).gather(1, path)
        for row, length in enumerate(outcome.lengths):
            assert best[row, :length].tolist() == self.told[-1][row], "the model said each token behind the node before it"


def test_the_drafter_is_told_all_of_it(model: Any) -> None:
    run = same(model, 3, Recipe(draft=Listening(), pace=Turns(without=5)), max_new_tokens=40, eos_token_id=31, pad_token_id=0)
    told = run.kept["listening"].told
    assert len(told) < len(run.trace.rounds), "rounds without drafts are told in one go"
    assert sum(len(row) for each in told for row in each) == run.report().written


def test_drafters_that_read_logits_go_on(model: Any) -> None:
    same(model, 3, Recipe(draft=TriGram(), pace=Turns()), max_new_tokens=32)


@pytest.mark.parametrize("recipe", [IDLE, TURNS], ids=["idle", "turns"])
def test_sampled_texts_follow_the_law(model: Any, recipe: Recipe) -> None:
    call: dict[str, Any] = {"top_k": 4, "temperature": 0.8, "repetition_penalty": 1.1}
    inputs = {name: each[:1] for name, each in prompts(1).items()}
    law = exact_law(model, inputs, 3, call)
    torch.manual_seed(0)
    with hasten.accelerate(model, recipe):
        made = model.generate(**inputs, max_new_tokens=3, do_sample=True, num_return_sequences=3000, **call)
    seen = Counter(tuple(row) for row in made[:, inputs["input_ids"].shape[1] :].tolist())
    assert compare(law, seen).p_value > 1e-4
