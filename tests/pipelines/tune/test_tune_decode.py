"""The search for the fastest lossless decoding, what is kept of it, and the budget that finds it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten.budget import Budget
from hasten.errors import UsageError
from hasten.pipelines import tiny_models
from hasten.pipelines.bench import decode_texts
from hasten.pipelines.bench.decode_ways import way
from hasten.pipelines.recipes import recipe
from hasten.pipelines.tune import decode_matching, decode_run
from hasten.pipelines.tune.decode_result import DecodeTuned, DecodeVerdict, stamped
from hasten.pipelines.tune.decode_run import DecodeJob, tune_decode
from hasten.pipelines.tune.kept import keep


@pytest.fixture(scope="module")
def lm() -> tuple[Any, Any]:
    return tiny_models.text("tiny-lm")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def _verdict(name: str, speed: float, what: str = "look-up", **row: Any) -> DecodeVerdict:
    return DecodeVerdict(name, recipe(what), {"recipe": name, "speedup_processor": speed, "tokens_per_forward": 2.0, "n": 4} | row)


def test_search_end_to_end(lm: tuple[Any, Any], tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On texts that repeat look-up is faster by far; the recipe is written, kept, and taken by the budget."""
    model, tokenizer = lm
    monkeypatch.setattr(decode_run, "every", lambda: [way("look-up")])
    monkeypatch.setattr(decode_run, "SIZES", (4,))
    job = DecodeJob(decode_texts.repetitive(tokenizer, 4).prompts, 600, new=16, repeats=1)
    out = tmp_path / "recipe.yaml"
    found = tune_decode(model, tokenizer, job, name="tiny-lm", out=out)
    names = [trial.name for trial in found.trials]
    assert names[:2] == ["look-up", "look-up, nodes=4"] and any("steady" in name for name in names)
    assert all(trial.row["exact_match"] == 1.0 for trial in found.trials)
    assert model.generate.__func__ is type(model).generate
    if found.best is None:
        pytest.fail(f"nothing was faster: {found.rows()}")
    assert found.recipe is not None and recipe(out) == found.recipe and len(list(home.rglob("*.yaml"))) == 1
    stamp = found.recipe.tuned
    assert stamp is not None and (stamp.budget, stamp.prompts, stamp.model) == ("lossless", 2, "tiny-lm")
    inputs = next(decode_texts.repetitive(tokenizer, 1, seed=5).batches(1, 0))
    plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    with hasten.accelerate(model, Budget(lossless=True)) as run:
        assert torch.equal(plain, model.generate(**inputs, max_new_tokens=12, do_sample=False))
    assert run.recipe == found.recipe
    assert any("a tuned recipe" in note and "lossless" in note for note in run.report().notes)


def test_a_budget_without_a_kept_recipe_looks_up(lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    with hasten.accelerate(model, Budget(lossless=True)) as run:
        model.generate(**tokenizer("a b a b a b", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert run.recipe.name == "look-up"
    assert any("no tuned recipe is kept here" in note for note in run.report().notes)


def test_only_recipes_of_this_model_fit(lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    found = DecodeTuned("speedup_processor", 1, 8, False)
    own = stamped(found, _verdict("a", 1.5), model, tokenizer, "tiny-lm")
    keep(own)
    assert own.tuned is not None
    keep(own.model_copy(update={"tuned": own.tuned.model_copy(update={"weights": "0" * 16, "speedup": 9.0})}))
    keep(own.model_copy(update={"tuned": own.tuned.model_copy(update={"hardware": "another", "speedup": 8.0})}))
    keep(own.model_copy(update={"tuned": own.tuned.model_copy(update={"budget": "psnr >= 30 dB", "speedup": 7.0})}))
    assert [each.tuned and each.tuned.speedup for each in decode_matching.fitting_drafts(model).ready] == [1.5]


def test_a_kept_recipe_that_cannot_run_is_passed_by(lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    found = DecodeTuned("speedup_processor", 1, 8, False)
    own = stamped(found, _verdict("a", 1.5), model, tokenizer, "tiny-lm")
    keep(own.model_copy(update={"attention": recipe("minference").attention}))
    with hasten.accelerate(model, Budget(lossless=True)) as run:
        pass
    assert run.recipe.name == "look-up" and any("cannot be used" in note for note in run.report().notes)


def test_always_drafting_has_to_be_clearly_faster() -> None:
    steady = recipe("look-up").replace({"pace": {"kind": "steady"}})
    found = DecodeTuned("speedup_processor", 1, 8, False)
    paced = DecodeVerdict("paced", recipe("look-up").replace({"pace": {"kind": "goodput"}}), {"speedup_processor": 2.0})
    found.trials = [DecodeVerdict("always", steady, {"speedup_processor": 2.05}), paced]
    assert [each.name for each in found.fastest(2)] == ["paced", "always"]
    found.trials[0] = DecodeVerdict("always", steady, {"speedup_processor": 2.2})
    assert [each.name for each in found.fastest(1)] == ["always"]


def test_a_network_has_to_be_clearly_faster_than_a_look_up() -> None:
    found = DecodeTuned("speedup_processor", 1, 8, False)
    paced = {"pace": {"kind": "goodput"}}
    found.trials = [
        DecodeVerdict("network", recipe("speculative").replace(paced), {"speedup_processor": 1.51}),
        DecodeVerdict("texts", recipe("look-up").replace(paced), {"speedup_processor": 1.5}),
    ]
    assert [each.name for each in found.fastest(2)] == ["texts", "network"]
    found.trials[0].row["speedup_processor"] = 1.6
    assert [each.name for each in found.fastest(2)] == ["network", "texts"]


def test_what_a_verdict_does_not_say() -> None:
    found = DecodeTuned("speedup_processor", 8, 8, False)
    found.best = _verdict("a", 1.1, tokens_per_forward=1.01)
    said = found.sentences()
    assert "4 at once" in said[0] and "next to no part" in said[1] and "4 held-out prompts say little" in said[2]
    found.best = _verdict("a", 1.5, n=12)
    assert len(found.sentences()) == 1 and "8 at once" in found.sentences()[0]


def test_a_trained_file_is_found_from_anywhere(lm: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe is written elsewhere than where its student was named from."""
    monkeypatch.chdir(tmp_path)
    found = DecodeTuned("speedup_processor", 1, 8, False)
    for which in ("medusa:path=run/student", "first-routers:path=run/student"):
        own = stamped(found, _verdict("a", 1.5, which), *lm, "tiny-lm").to_yaml()
        assert f"path: {tmp_path / 'run' / 'student'}" in own


def test_jobs_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="at least 4 different prompts"):
        DecodeJob([[1, 2], [3], [1, 2], [3]], 60)
    with pytest.raises(UsageError, match="no lossless recipe with drafts"):
        DecodeJob([[1], [2], [3], [4]], 60, recipes=["snapkv"])
    tuning, held = DecodeJob([[1], [2], [3], [4]], 60, batch=2).cells()
    assert tuning.workload.prompts == [[1], [3]] and held.workload.prompts == [[2], [4]] and held.batch == 2


def test_no_time_is_no_recipe(lm: tuple[Any, Any]) -> None:
    found = tune_decode(*lm, DecodeJob([[5], [6], [7], [8]], -1.0))
    assert found.recipe is None and not found.trials and any("time was over" in sentence for sentence in found.sentences())


def test_the_budget_is_of_causal_models() -> None:
    with pytest.raises(ValueError, match="one of"):
        Budget(lossless=True, psnr=30)
    with pytest.raises(ValueError):
        Budget(lossless=False)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="causal language models"):
        _ = Budget(lossless=True).tolerance
    with pytest.raises(UsageError, match="about causal language models, and this model writes texts in any order"):
        hasten.accelerate(hasten.load("tiny-dllm"), Budget(lossless=True))
