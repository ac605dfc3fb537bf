"""`hasten.accelerate` on a causal language model: one line, a report that counts right, and refusals in words."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TextGenerationPipeline
from transformers.cache_utils import DynamicCache

import hasten
from hasten.errors import ModelError, RecipeError, RefusedError, UsageError
from hasten.limits import Limits
from hasten.pipelines.loading import check_folder
from hasten.pipelines.recipes import acts_on, catalogue
from hasten.recipe import Recipe
from hasten.sparse_attn.policy import SparseAttention, SparseState
from hasten.sparse_attn.scorers.spans import Depth, Full, Near, Spans
from hasten.sparse_attn.selectors.target import TargetRecall
from hasten.sparse_attn.stand_ins.compensate import Compensate
from hasten.sparse_attn.text.causal import CausalAttention
from hasten.sparse_attn.text.lookup import Lookup
from hasten.sparse_attn.text.reader import Recent
from tests.pipelines.causal_models import build, close, ids, pattern

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")

NEAR = pattern(Spans(spans=(Near(window=8, sinks=2),)))
BOTH = Recipe(name="both", attention=CausalAttention(prompt=NEAR, cache=Recent(window=12, sinks=2), min_tokens=0))
"""61 tokens of prompt in blocks of 8; of the cache 14 keys."""

CALL: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in caught if str(one.message).startswith("hasten:")]


@pytest.fixture
def model() -> Any:
    return build("llama").requires_grad_(False)


# --- one line, one report ---------------------------------------------------------------------------


def test_one_line_and_a_report_that_counts_right(model: Any, tmp_path: Path) -> None:
    tokens = ids(2, 61)
    before, made = model(tokens).logits, model.generate(tokens, **CALL)
    with hasten.accelerate(model, BOTH) as run:
        other = model.generate(tokens, **CALL)
        assert not run.closed
    assert run.closed and run.recipe is BOTH and run.host is model
    assert other.shape == made.shape and torch.equal(model(tokens).logits, before)

    report = run.report()
    cache, prompt = report.phases["cache"], report.phases["prompt"]
    assert (prompt.sparse, prompt.dense, cache.sparse, cache.dense) == (3, 0, 15, 0)
    heads = 3 * 2 * 4  # layers, samples, heads
    assert cache.all == heads * sum(range(62, 67)) and cache.read == heads * 5 * 14
    assert cache.of_sparse == cache.density == pytest.approx(70 / 320)
    assert prompt.all == heads * 61 * 62 / 2 and 0 < prompt.density < 1
    whole = report.attention
    assert whole is not None and whole.all == prompt.all + cache.all and whole.read == prompt.read + cache.read
    assert run.skipped == 1 - report.computed_fraction == 1 - whole.density and 0 < run.skipped < 1
    assert not report.warnings and [row.layer for row in report.rows] == [0, 0, 1, 1, 2, 2]
    assert report.rows[0].site == "model.layers.0.self_attn"

    text = str(report)
    assert "both, LlamaForCausalLM" in text and "15 of 15 calls sparse; they read 21.9% of their pairs" in text
    assert "how much of the mass is not known" in text and "new tokens  222" in text
    data = json.loads(report.save(tmp_path / "r.json").read_text())
    assert data["phases"]["cache"]["sparse"] == 15 and data["recipe"]["name"] == "both" and len(data["rows"]) == 6
    page = report.save(tmp_path / "r.html").read_text()
    assert "model.layers.2.self_attn" in page and "21.9%" in page
    assert run.trace.to_dict()["readings"][0]["layer"] == 0


def test_dense_layers_and_short_inputs_count_as_dense(model: Any) -> None:
    policy = CausalAttention(prompt=NEAR, cache=Recent(window=12, sinks=2), dense=(Depth(end=0.3),), min_tokens=64)
    with hasten.accelerate(model, Recipe(attention=policy)) as run:
        model.generate(ids(2, 61), **CALL)  # caches of 62 to 66 keys: the last three calls are long enough
    phases = run.report().phases
    assert phases["prompt"].sparse == 0 and phases["cache"].sparse == 2 * 3 and phases["cache"].dense == 5 + 2 * 2
    cache = phases["cache"]
    assert cache.rest == 2 * 4 * (sum(range(62, 67)) + 2 * (62 + 63))
    assert cache.density == pytest.approx((cache.read + cache.rest) / (cache.all + cache.rest))
    assert "all together" in str(run.report())


def test_recall_is_told_where_it_is_known(model: Any) -> None:
    prompts = {
        "stands in": pattern(Spans(spans=(Near(window=8),)), compensate=Compensate(order=1)),
        "measured": SparseAttention(
            patterns=(NEAR.patterns[0].model_copy(update={"select": TargetRecall(target=0.9)}),), warm=0.0, block_m=16
        ),
        "unknown": NEAR,
    }
    for name, prompt in prompts.items():
        with hasten.accelerate(model, Recipe(attention=CausalAttention(prompt=prompt, min_tokens=0))) as run:
            model(ids(3, 61))
        whole = run.report().attention
        assert whole is not None and whole.sparse == 3
        if name == "unknown":
            assert whole.recall is None and whole.lowest is None
        else:
            assert whole.recall is not None and whole.lowest is not None and 0 < whole.lowest <= whole.recall < 1.001, name
            assert "of the mass by estimate" in str(run.report())


def test_names_files_and_recipes_are_alike(model: Any, tmp_path: Path) -> None:
    name = "long-gen:window=8,sinks=2,min_tokens=16"
    file = tmp_path / "own.yaml"
    file.write_text(hasten.recipe(name).to_yaml())
    found = []
    for recipe in (name, str(file), file, hasten.recipe(name)):
        with hasten.accelerate(model, recipe) as run:
            found.append(model(ids(2, 150)).logits)
        assert any(row.sparse for row in run.rows.values())
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_plain_only_watches(model: Any) -> None:
    tokens = ids(2, 61)
    before = model.generate(tokens, **CALL), model(tokens).logits
    with warnings.catch_warnings(record=True) as caught, hasten.accelerate(model, "plain") as run:
        warnings.simplefilter("always")
        assert torch.equal(model.generate(tokens, **CALL), before[0]) and torch.equal(model(tokens).logits, before[1])
    assert not told(caught) and not run.report().warnings and run.skipped == 0


def test_a_compiled_model_is_the_model_inside_it(model: Any) -> None:
    tokens, compiled = ids(2, 61), torch.compile(model, backend="eager")
    with torch.no_grad():
        dense = compiled(tokens).logits
        with hasten.accelerate(model, BOTH):
            expected = model(tokens).logits
        with hasten.accelerate(compiled, BOTH) as run:
            close(compiled(tokens).logits, expected)
        assert run.rows[0, "prompt"].sparse == 1
        close(compiled(tokens).logits, dense)


# --- what did nothing says so -------------------------------------------------------------------------


def test_short_inputs_are_named(model: Any) -> None:
    with pytest.warns(UserWarning, match="min_tokens = 4,096"), hasten.accelerate(model, "hip") as run:
        model.generate(ids(1, 9), **CALL)
    found = run.report().warnings
    assert len(found) == 2 and "prompts did nothing" in found[0] and "the longest had 9 tokens" in found[0]
    assert "new tokens did nothing" in found[1] and "the longest had 14 tokens" in found[1]


def test_what_reads_everything_is_named(model: Any) -> None:
    everything = CausalAttention(prompt=pattern(Spans(spans=(Full(),))), min_tokens=0)
    with pytest.warns(UserWarning, match="left out nothing"), hasten.accelerate(model, Recipe(attention=everything)) as run:
        model(ids(2, 61))
    assert any("left out nothing" in warning for warning in run.report().warnings)


def test_a_part_that_was_not_asked_is_named(model: Any) -> None:
    with pytest.warns(UserWarning, match="there were none"), hasten.accelerate(model, BOTH) as run:
        model(ids(2, 61))
    assert run.report().warnings == ["The recipe's part for new tokens did nothing: there were none."]


def test_a_session_without_a_call_says_so(model: Any) -> None:
    with hasten.accelerate(model, BOTH) as run:
        pass
    assert "never ran" in run.report().warnings[0] and run.skipped == 0


def test_windows_of_the_model_are_why_new_tokens_are_dense() -> None:
    model = build("mistral-window").requires_grad_(False)
    with pytest.warns(UserWarning, match="sliding windows"), hasten.accelerate(model, BOTH):
        model.generate(ids(2, 61), **CALL)


# --- what fails, and what is too large ------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["prompt", "cache"])
def test_a_method_that_fails_is_the_models_own(model: Any, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ids(2, 61)
    policy = CausalAttention(**{phase: NEAR if phase == "prompt" else Recent(window=12)}, min_tokens=0)
    plain = model.generate(tokens, **CALL)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of luck")

    with warnings.catch_warnings(record=True) as caught, hasten.accelerate(model, Recipe(attention=policy)) as run:
        warnings.simplefilter("always")
        monkeypatch.setattr(SparseState if phase == "prompt" else type(Recent().start()), "attend", broken)
        assert torch.equal(model.generate(tokens, **CALL), plain)
    assert sum("out of luck" in text for text in told(caught)) == 1, "said once"
    assert any("from here on" in note and "RuntimeError" in note for note in run.report().notes)
    assert run.report().phases[phase].sparse == 0


def test_memory_that_runs_out_is_not_hidden(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    with hasten.accelerate(model, BOTH), pytest.raises(torch.OutOfMemoryError):
        monkeypatch.setattr(SparseState, "attend", broken)
        model(ids(2, 61))


def test_readers_above_the_cap_are_dropped(model: Any) -> None:
    tokens, policy = ids(2, 61), CausalAttention(cache=Lookup(share=0.2, cluster=4), min_tokens=0)
    plain = model.generate(tokens, **CALL)
    with hasten.accelerate(model, Recipe(attention=policy)) as run:
        model.generate(tokens, **CALL)
    held = run.report().bytes_held
    assert held > 3 * 2 * 61 * 2 * 8 * 4, "the prompt's keys and values of three layers, at least"
    small, enough = Limits(max_cache_bytes=held // 2), Limits(max_cache_bytes=held)
    with pytest.warns(UserWarning, match="above the cap"), hasten.accelerate(model, Recipe(attention=policy), limits=small) as run:
        assert torch.equal(model.generate(tokens, **CALL), plain)
    assert run.report().phases["cache"].sparse == 0
    with hasten.accelerate(model, Recipe(attention=policy), limits=enough) as run:
        model.generate(tokens, **CALL)
    assert run.report().phases["cache"].sparse == 15 and run.report().bytes_held == held


def test_memory_above_the_cap_is_given_back_while_the_cache_lives(model: Any) -> None:
    policy, cache = CausalAttention(cache=Lookup(share=0.2, cluster=4), min_tokens=0), DynamicCache(config=model.config)
    with hasten.accelerate(model, Recipe(attention=policy), limits=Limits(max_cache_bytes=30_000)) as run:
        model(ids(2, 61), past_key_values=cache)
        assert run.trace.bytes_peak > 30_000 and run.trace.bytes_held == 0
        assert not any(site.readers for site in run.sites)


def test_min_tokens_of_the_prompt_part_counts(model: Any) -> None:
    longer = NEAR.model_copy(update={"min_tokens": 50})
    with hasten.accelerate(model, Recipe(attention=CausalAttention(prompt=longer, min_tokens=9999))) as run:
        model(ids(1, 61))
        model(ids(1, 49))
    assert run.report().phases["prompt"].sparse == run.report().phases["prompt"].dense == 3
    with hasten.accelerate(model, Recipe(attention=NEAR.model_copy(update={"min_tokens": 0}))) as run:
        model(ids(1, 61))
    assert run.report().phases["prompt"].sparse == 3


# --- what does not fit ----------------------------------------------------------------------------------

DIFFUSION = [entry for entry in catalogue() if acts_on(entry.recipe) == "diffusion models"]
SPARSE = [entry for entry in DIFFUSION if set(entry.recipe.axes) == {"attention"}]
NO_PROMPT = {
    "sparse-videogen": "grid", "adaspa": "dense", "grat": "grid", "re-ttention": "dense", "neighbourhood": "grid",
    "sliding-tile": "grid", "radial": "frames", "nabla": "grid",
}  # fmt: skip
"""Recipes of diffusion models that need what prompts do not have."""


@pytest.mark.parametrize("entry", SPARSE, ids=lambda entry: entry.name)
def test_sparse_attention_of_diffusion_models_is_right_or_refused(entry: Any, model: Any) -> None:
    tokens = ids(1, 200)
    before, recipe = model(tokens).logits, entry.recipe.replace({"attention.min_tokens": 0})
    if entry.name in NO_PROMPT:
        with pytest.raises(RefusedError, match=NO_PROMPT[entry.name]):
            hasten.accelerate(model, recipe)
    else:
        with hasten.accelerate(model, recipe) as run:
            found = model(tokens).logits
        assert torch.isfinite(found).all() and not run.reasons
        assert sum(row.sparse for row in run.rows.values()) >= 2, "some keep the first layer dense"
    assert torch.equal(model(tokens).logits, before)


def test_no_recipe_of_another_axis_fits(model: Any) -> None:
    others = [entry for entry in DIFFUSION if entry not in SPARSE]
    assert len(others) > 10
    before = model.config
    for entry in others:
        axes = [axis for axis in entry.recipe.axes if axis != "attention"]
        with pytest.raises(UsageError, match=f"{axes[0]}.*no seam on a language model"):
            hasten.accelerate(model, entry.recipe)
    for recipe in ("minference+easycache", hasten.Budget(psnr=30)):
        with pytest.raises(UsageError, match="sets reuse, which has no seam on a language model"):
            hasten.accelerate(model, recipe)
    with pytest.raises(RecipeError, match="both say what prompts read"):
        hasten.accelerate(model, "minference+hip")
    assert model.config is before


def test_a_stand_in_that_shows_the_future_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small prompt is what tells: a policy whose output is the mean of all values does not pass."""

    def mean(_: Any, q: Any, k: Any, v: Any, *more: Any) -> Any:
        return v.mean(2, keepdim=True).expand(1, q.shape[1], q.shape[2], -1)

    monkeypatch.setattr(SparseState, "attend", mean)
    with pytest.raises(RefusedError, match="what comes after them"):
        hasten.accelerate(model, BOTH)


def test_hosts_that_are_no_language_model_are_told(model: Any) -> None:
    pipe = object.__new__(TextGenerationPipeline)
    pipe.model = model
    with pytest.raises(ModelError, match=r"TextGenerationPipeline is not a transformers model.*its \.model"):
        hasten.accelerate(pipe, "minference")
    with pytest.raises(UsageError, match="group="):
        hasten.accelerate(model, "minference", group=object())
    with pytest.raises(UsageError, match="A denoiser takes kind 'sparse'"):
        hasten.accelerate(torch.nn.Linear(2, 2), "minference")
    with hasten.accelerate(model, "minference"), pytest.raises(UsageError, match="accelerated already"):
        hasten.accelerate(model, "squeezed")


def test_the_folder_of_a_language_model_is_known(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"language model \(LlamaForCausalLM\).*hasten.accelerate"):
        check_folder(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(ModelError, match="one component of a pipeline"):
        check_folder(tmp_path)
