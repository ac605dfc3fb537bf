"""`generate` under a recipe that drafts: token for token what it writes without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import StaticCache
from transformers.generation.streamers import BaseStreamer

import hasten
from hasten.pipelines.decode.session import DecodeSession
from hasten.recipe import Recipe
from hasten.samplers.decode.pace import Steady
from hasten.samplers.drafters.look_up import LookUp
from tests.pipelines.causal_models import build

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")

ALWAYS = Recipe(name="always", draft=LookUp(nodes=9), pace=Steady())
CHAIN = Recipe(name="chain", draft=LookUp(nodes=4, width=1), pace=Steady())


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama").requires_grad_(False)


def prompts(rows: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Texts that repeat themselves, of different lengths, padded on the left."""
    torch.manual_seed(seed)
    texts = [torch.randint(2, 97, (length,)).repeat(3) for length in (6, 4, 9, 3)[:rows]]
    longest = max(map(len, texts))
    ids = torch.stack([torch.nn.functional.pad(text, (longest - len(text), 0)) for text in texts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(text), (longest - len(text), 0)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def both(model: Any, inputs: dict[str, Any], recipe: Recipe = ALWAYS, **call: Any) -> tuple[Any, Any, DecodeSession]:
    """What `generate` returns without and with the recipe, and the session."""
    call = {"max_new_tokens": 24, "do_sample": False} | call
    plain = model.generate(**inputs, **call)
    with hasten.accelerate(model, recipe) as run:
        drafted = model.generate(**inputs, **call)
    assert isinstance(run, DecodeSession)
    return plain, drafted, run


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("recipe", [ALWAYS, CHAIN, Recipe(draft=LookUp())], ids=["tree", "chain", "goodput"])
def test_greedy_texts_are_the_same(model: Any, rows: int, recipe: Recipe) -> None:
    plain, drafted, run = both(model, prompts(rows), recipe, max_new_tokens=40)
    assert torch.equal(plain, drafted)
    report = run.report()
    assert report.written == rows * 39 and report.exactness.startswith("exact")
    if recipe.pace is not None:
        assert report.tokens_per_forward > 1.2


@pytest.mark.parametrize("name", ["qwen2-mixed", "qwen3", "mistral-window"])
def test_other_models_and_sliding_windows(name: str) -> None:
    model = build(name).requires_grad_(False)
    for rows in (1, 3):
        plain, drafted, run = both(model, prompts(rows), max_new_tokens=30)
        assert torch.equal(plain, drafted) and run.report().tokens_per_forward > 1


def test_eager_attention_with_soft_caps() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=8, pad_token_id=0, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    model: Any = Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    for rows in (1, 3):
        plain, drafted, _ = both(model, prompts(rows), max_new_tokens=24)
        assert torch.equal(plain, drafted)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("more", [
    {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3}, {"min_new_tokens": 12, "eos_token_id": 5}, {"bad_words_ids": [[7], [9, 11]]},
    {"sequence_bias": {(3,): 4.0, (5, 6): 9.0}}, {"forced_eos_token_id": 5}, {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 5},
    {"suppress_tokens": [3, 4], "begin_suppress_tokens": [8]},
    {"prefix_allowed_tokens_fn": lambda row, text: [1 + (row + int(text.sum()) + each) % 90 for each in range(9)]},
], ids=lambda more: next(iter(more)))  # fmt: skip
def test_processors_see_the_prefix_of_every_node(model: Any, rows: int, more: dict[str, Any]) -> None:
    plain, drafted, _ = both(model, prompts(rows), **more)
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize("rows", [1, 4])
def test_every_token_as_the_end_token(model: Any, rows: int) -> None:
    inputs = prompts(rows)
    free = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for end in free.unique().tolist()[:6]:
        plain, drafted, _ = both(model, inputs, eos_token_id=end, pad_token_id=0)
        assert torch.equal(plain, drafted)


@pytest.mark.parametrize("new", [1, 2, 3, 5, 8])
def test_every_length(model: Any, new: int) -> None:
    for rows in (1, 3):
        plain, drafted, _ = both(model, prompts(rows), max_new_tokens=new)
        assert torch.equal(plain, drafted)


class AtMultiple(StoppingCriteria):
    """A row ends where the sum of its ids is a multiple of `of`; counts how often it is asked."""

    def __init__(self, of: int) -> None:
        self.of, self.asked = of, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.asked += 1
        return input_ids.sum(1) % self.of == 0


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("ends", [{}, {"eos_token_id": 5}])
def test_stopping_criteria_are_asked_after_every_token(model: Any, rows: int, ends: dict[str, Any]) -> None:
    for of in (3, 7):
        ours = StoppingCriteriaList([AtMultiple(of)])
        plain, drafted, _ = both(model, prompts(rows), stopping_criteria=ours, max_new_tokens=30, **ends)
        assert torch.equal(plain, drafted)
        assert rows > 1 or ours[0].asked == 2 * (drafted.shape[1] - prompts()["input_ids"].shape[1])


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.puts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("rows", [1, 3])
def test_streamers_hear_what_they_would_have_heard(model: Any, rows: int) -> None:
    first, second = Heard(), Heard()
    call: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": 31}
    model.generate(**prompts(rows), **call, streamer=first)
    with hasten.accelerate(model, ALWAYS):
        model.generate(**prompts(rows), **call, streamer=second)
    assert first.puts == second.puts and second.ended


@pytest.mark.parametrize("rows", [1, 3])
def test_scores_and_logits_of_every_token(model: Any, rows: int) -> None:
    more: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    plain, drafted, _ = both(model, prompts(rows), **more)
    assert torch.equal(plain.sequences, drafted.sequences) and type(plain) is type(drafted)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(getattr(drafted, name)), torch.stack(getattr(plain, name)), atol=2e-5, rtol=1e-4)
    if rows == 1:
        assert drafted.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()


def test_a_returned_cache_goes_on(model: Any) -> None:
    inputs = prompts()
    with hasten.accelerate(model, ALWAYS):
        first = model.generate(**inputs, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
        more = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
        second = model.generate(more, past_key_values=first.past_key_values, max_new_tokens=10, do_sample=False)
    assert torch.equal(second, model.generate(more, max_new_tokens=10, do_sample=False))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_static_cache(model: Any, rows: int) -> None:
    inputs = prompts(rows)
    for more in ({"cache_implementation": "static"}, {"past_key_values": True}):
        if "past_key_values" in more:
            more = {"past_key_values": StaticCache(config=model.config, max_cache_len=inputs["input_ids"].shape[1] + 24)}
        plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        with hasten.accelerate(model, ALWAYS) as run:
            assert torch.equal(plain, model.generate(**inputs, max_new_tokens=24, do_sample=False, **more))
        assert {each.nodes + 1 for each in run.trace.rounds[:-4]} <= {1, 2, 4, 8, 16}
        assert run.report().tokens_per_forward > 1.2 and run.calls == {"drafted": 1}


def test_prompts_are_read_in_pieces_where_asked(model: Any) -> None:
    plain, drafted, _ = both(model, prompts(3), prefill_chunk_size=4)
    assert torch.equal(plain, drafted)


def test_several_texts_of_one_prompt(model: Any) -> None:
    torch.manual_seed(0)
    with hasten.accelerate(model, ALWAYS) as run:
        made = model.generate(**prompts(2), max_new_tokens=12, do_sample=True, num_return_sequences=3, top_k=20, temperature=0.8)
    assert made.shape == (6, 12 + prompts(2)["input_ids"].shape[1]) and run.report().exactness == "lossless in distribution"
