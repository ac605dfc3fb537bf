"""A session that drafts: what it leaves to transformers, what it says, and that the model is as before."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    T5Config,
    T5ForConditionalGeneration,
)

import hasten
from hasten.errors import ModelError, RefusedError, UsageError
from hasten.pipelines.decode import compat
from hasten.recipe import Recipe
from hasten.samplers.decode.pace import Average, Steady
from hasten.samplers.decode.verify_law import Block, Speculative
from hasten.samplers.drafters.look_up import LookUp
from hasten.samplers.verify import FreeDave
from tests.pipelines.causal_models import build

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")

ALWAYS = Recipe(name="always", draft=LookUp(nodes=9), pace=Steady())
CALL: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama").requires_grad_(False)


def ids(rows: int = 1) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(2, 97, (rows, 6)).repeat(1, 3)


LEFT: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam search"),
    "look-up of their own": ({"prompt_lookup_num_tokens": 3}, "their|own prompt look-up"),
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "attentions": ({"return_dict_in_generate": True, "output_hidden_states": True}, "hidden states"),
    "guidance": ({"guidance_scale": 1.5}, "guidance"),
    "places": ({"position_ids": torch.arange(18)[None]}, "position_ids"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_ours_is_transformers_own(model: Any, name: str) -> None:
    more, words = LEFT[name]
    plain = model.generate(ids(), **CALL, **more)
    with hasten.accelerate(model, ALWAYS) as run:
        left = model.generate(ids(), **CALL, **more)
    same = (plain, left) if isinstance(plain, Tensor) else (plain.sequences, left.sequences)
    assert torch.equal(*same) and run.calls == {"plain": 1}
    assert len(run.trace.notes) == 1
    assert any(word in run.trace.notes[0] for word in words.split("|")), run.trace.notes


def test_an_assistant_of_the_users_own_is_left_alone(model: Any) -> None:
    with hasten.accelerate(model, ALWAYS) as run:
        made = model.generate(ids(), **CALL, assistant_model=model)
    assert torch.equal(made, model.generate(ids(), **CALL)) and "assistant_model" in run.trace.notes[0]


def test_the_model_is_as_before(model: Any) -> None:
    before, method = dict(model.__dict__), model.generate
    with pytest.raises(RuntimeError, match="stop"), hasten.accelerate(model, ALWAYS):
        kept = model.generate
        raise RuntimeError("stop")
    assert dict(model.__dict__) == before and model.generate == method
    with pytest.raises(UsageError, match="accelerated already"), hasten.accelerate(model, ALWAYS):
        hasten.accelerate(model, ALWAYS)
    assert dict(model.__dict__) == before
    assert torch.equal(kept(ids(), **CALL), model.generate(ids(), **CALL))


class Counting(LogitsProcessor):
    """Forbids a token that depends on how often it was asked: what nobody can know from outside."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.asked += 1
        scores = scores.clone()
        scores[:, self.asked % 7 :: 7] = -torch.inf
        return scores


def test_processors_that_remember_are_asked_in_order(model: Any) -> None:
    ends = {"eos_token_id": 31, "pad_token_id": 0}
    for more in ({}, ends):
        plain = model.generate(ids(), **CALL, **more, logits_processor=LogitsProcessorList([Counting()]))
        ours = LogitsProcessorList([Counting()])
        with hasten.accelerate(model, ALWAYS) as run:
            drafted = model.generate(ids(), **CALL, **more, logits_processor=ours)
        assert torch.equal(plain, drafted) and ours[0].asked == drafted.shape[1] - 18
        assert run.calls == {"drafted": 1} and "Counting" in run.trace.notes[0]
    plain = model.generate(ids(3), **CALL, logits_processor=LogitsProcessorList([Counting()]))
    with hasten.accelerate(model, ALWAYS) as run:
        left = model.generate(ids(3), **CALL, logits_processor=LogitsProcessorList([Counting()]))
    assert torch.equal(plain, left) and run.calls == {"plain": 1} and "Counting" in run.trace.notes[0]


def test_the_report_adds_up(model: Any, tmp_path: Path) -> None:
    with hasten.accelerate(model, ALWAYS) as run:
        made = model.generate(ids(2), max_new_tokens=30, do_sample=False)
    report = run.report()
    new = made.shape[1] - 18
    assert report.written == 2 * (new - 1) == sum(sum(each.written) for each in run.trace.rounds)
    accepted = sum(right for _, right in report.drafters.values())
    assert accepted == sum(right for _, right in report.depths.values())
    assert report.written == accepted + sum(each.rows for each in run.trace.rounds)
    assert all(tuple(map(len, each.by)) == each.written for each in run.trace.rounds if each.by)
    assert accepted == sum(row.count("look-up") for each in run.trace.rounds for row in each.by)
    assert len(run.leads) == 1 and [len(row) for row in run.leads[0]] == [new, new]
    data = json.loads(report.save(tmp_path / "report.json").read_text())
    assert data["tokens_per_forward"] == report.tokens_per_forward > 1 and len(data["rounds"]) == len(run.trace.rounds)
    assert "look-up" in report.save(tmp_path / "report.html").read_text() and "exact" in str(report)


def test_parts_have_to_fit_together(model: Any) -> None:
    for verify in (Speculative(), Block()):
        with pytest.raises(UsageError, match="judges chains"):
            hasten.accelerate(model, Recipe(draft=LookUp(width=2), verify=verify))
        with hasten.accelerate(model, Recipe(draft=LookUp(width=1), verify=verify, pace=Average())):
            assert torch.equal(model.generate(ids(2), **CALL), hasten_free(model))
    with pytest.raises(UsageError, match="text diffusion"):
        hasten.accelerate(model, Recipe(draft=LookUp(), verify=FreeDave()))
    with pytest.raises(UsageError, match="sets sampler|joined"):
        hasten.accelerate(model, Recipe(draft=LookUp()) | hasten.recipe("fewer-steps"))


def hasten_free(model: Any) -> Tensor:
    """What the model's class writes, past whatever is put onto this instance."""
    made: Tensor = type(model).generate(model, ids(2), **CALL)
    return made


def test_models_whose_drafts_cannot_be_verified_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(RefusedError, match="encoder with a decoder"):
        hasten.accelerate(T5ForConditionalGeneration(config), ALWAYS)
    other = build("llama")
    with pytest.raises(ModelError, match="no generate"):
        hasten.accelerate(other.model.layers[0], ALWAYS)
    monkeypatch.setattr(compat.metadata, "version", lambda _: "5.17.2")
    with pytest.raises(RefusedError, match=r"5\.18 or later"):
        hasten.accelerate(other, ALWAYS)


def test_a_copy_of_an_accelerated_model_is_plain(model: Any) -> None:
    import copy

    with hasten.accelerate(model, ALWAYS):
        other = copy.deepcopy(model)
    assert "generate" not in other.__dict__ and torch.equal(other.generate(ids(), **CALL), model.generate(ids(), **CALL))


def test_a_cache_that_is_the_users_own(model: Any) -> None:
    with hasten.accelerate(model, ALWAYS) as run:
        made = model.generate(ids(2), **CALL, past_key_values=DynamicCache(config=model.config))
    assert torch.equal(made, hasten_free(model)) and run.calls == {"drafted": 1}


def test_caches_whose_slots_cannot_be_moved(model: Any) -> None:
    cache = DynamicCache(config=model.config, offloading=True)
    assert "offloaded" in compat.why_cache({"past_key_values": cache}, ids())
    sliding = build("mistral-window")
    with hasten.accelerate(sliding, ALWAYS) as run:
        first = sliding.generate(ids(), **CALL, return_dict_in_generate=True, use_cache=True)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1 and run.calls == {"drafted": 1}
    kept = sliding.generate(ids(), **CALL, return_dict_in_generate=True).past_key_values
    with hasten.accelerate(sliding, ALWAYS) as run:
        sliding.generate(first.sequences, **CALL, past_key_values=kept)
    assert "layers that forget" in run.trace.notes[0]


def test_a_file_may_name_every_verifier_and_pace(tmp_path: Path) -> None:
    """In a process of its own, where nothing but the recipes has been imported."""
    kinds = ["lossless", "greedy-tree", "sample-match", "speculative", "multi-round", "block", "typical", "surprise", "confident"]
    files = []
    for kind, pace in itertools.product(kinds, ["goodput", "average", "steady"]):
        lossy = ", allow_lossy: true" if kind in ("typical", "surprise", "confident") else ""
        files.append(tmp_path / f"{kind}-{pace}.yaml")
        text = f"version: 1\ndraft: {{kind: look-up, width: 1}}\nverify: {{kind: {kind}{lossy}}}\npace: {{kind: {pace}}}\n"
        files[-1].write_text(text, encoding="utf-8")
    program = "import sys, hasten; print(*(f'{r.verify.kind}-{r.pace.kind}' for r in map(hasten.recipe, sys.argv[1:])))"
    done = subprocess.run([sys.executable, "-c", program, *map(str, files)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [file.stem for file in files], done.stderr
