"""`Budget(exact_match=...)` on text diffusion: a kept recipe where one was tuned for this model and length, else sequential decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten.errors import UsageError
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.tune import kept
from hasten.pipelines.tune.fingerprint import of_text
from hasten.pipelines.tune.text_matching import fitting_texts
from hasten.recipe import Recipe
from hasten.stamp import Stamp
from tests.hosts import small_wan
from tests.pipelines.text_pipes import pipe
from tests.pipelines.tune.test_tune_text_run import tuned as searched

LENGTH, PROMPT = 8, "w1 w2 w3"
BUDGET = hasten.Budget(exact_match=0.9)


def tuned(name: str = "llada:steps=4", **changes: Any) -> Recipe:
    """A recipe that was tuned on the small model, or on what `changes` say."""
    host = pipe()
    stamp = Stamp(**{
        **of_text(host.model, host.tokenizer), "model": "small", "length": LENGTH, "budget": "exact_match >= 95 %", "prompts": 80,
        "kept": 0.98, "worst": 0.91, "speedup": 2.0, "date": "2026-11-22", **changes,
    })  # fmt: skip
    return find_recipe(name).model_copy(update={"name": f"tuned {name}", "tuned": stamp})


def written(length: int = LENGTH, **more: Any) -> Any:
    return pipe().generate(prompts=PROMPT, max_new_tokens=length, temperature=0.0, **more)


def test_a_kept_recipe_is_used_and_named() -> None:
    kept.keep(tuned())
    alone = written(recipe="llada:steps=4")
    with hasten.accelerate(pipe(), BUDGET) as run:
        made = written()
    assert torch.equal(made.sequences, alone.sequences) and made.nfe.tolist() == alone.nfe.tolist() == [4]
    report = run.report()
    assert report.recipe is not None and report.recipe.name == "tuned llada:steps=4" and not report.notes
    said = "a tuned recipe, commit, blocks; tuned for exact_match >= 95 % on 2026-11-22, 2x, 98.0% of the texts kept (91.0% at least) on 80"
    assert said in str(report) and said in report.to_dict()["extras"]["budget"]
    assert written().nfe.tolist() == [LENGTH], "closed: the pipeline's own way again"


def test_another_length_is_decoded_sequentially_and_that_is_said() -> None:
    kept.keep(tuned())
    kept.keep(tuned("llada:steps=2", length=4, speedup=1.5))
    plain = written(6)
    with hasten.accelerate(pipe(), BUDGET) as run:
        six = written(6)
        assert torch.equal(six.sequences, plain.sequences) and six.nfe.tolist() == [6]
        assert "Budget: this call asks for 6 tokens (tuned at 8, 4), so texts are decoded one token after the other" in str(run.report())
        assert written(4).nfe.tolist() == [2] and written(8).nfe.tolist() == [4]
        assert not any("Budget:" in note for note in run.report().notes)


def test_nothing_kept_is_sequential_and_saves_nothing() -> None:
    with hasten.accelerate(pipe(), BUDGET) as run:
        assert "no tuned recipe is kept here" in str(run.report())
        assert written().nfe.tolist() == [LENGTH]
    assert run.report().of_sequential == 1 and any("hasten tune makes a recipe" in note for note in run.report().notes)


@pytest.mark.parametrize(
    "other",
    [{"weights": "0123456789abcdef"}, {"tokenizer": "other"}, {"hardware": "cuda: another"}, {"kept": 0.94}, {"kept": None},
     {"speedup": None}, {"budget": "psnr >= 30 dB"}, {"budget": "exact_match >= 85 %"}],
)  # fmt: skip
def test_what_was_measured_elsewhere_or_less_strictly_is_not_used(other: dict[str, Any]) -> None:
    kept.keep(tuned(**other))
    assert fitting_texts(pipe(), BUDGET).recipe is None


def test_the_fastest_is_taken_and_files_that_are_none_are_named(home: Path) -> None:
    kept.keep(tuned())
    kept.keep(tuned("llada:steps=2", speedup=3.0, budget="exact_match >= 92 %"))
    (home / "tuned" / "broken.yaml").write_text("commit: [")
    with hasten.accelerate(pipe(), BUDGET) as run:
        assert run.recipe.name == "tuned llada:steps=2"
    assert any("broken.yaml" in note for note in run.report().notes)


def test_a_recipe_that_this_model_does_not_take_gives_way() -> None:
    kept.keep(tuned("auto"))
    with hasten.accelerate(pipe(), BUDGET) as run:
        assert written().nfe.tolist() == [LENGTH]
    assert any("cannot be used: Recipe 'tuned auto' sets reuse" in note for note in run.report().notes)


def test_budgets_of_the_other_kind_are_refused_in_words() -> None:
    with pytest.raises(UsageError, match=r"Pass Budget\(exact_match=0.99\)"):
        hasten.accelerate(pipe(), hasten.Budget(psnr=30))
    with pytest.raises(UsageError, match="Pictures and clips have psnr="):
        hasten.accelerate(small_wan(), BUDGET)
    with pytest.raises(UsageError, match="about texts"):
        hasten.tune(small_wan(), ["a one", "a two", "a six", "a ten"], BUDGET)
    with pytest.raises(ValueError, match="exact_match"):
        hasten.Budget(exact_match=0.99, psnr=30)
    with pytest.raises(ValueError, match="exact_match"):
        hasten.Budget(exact_match=0)


def test_tuning_keeps_what_it_finds(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From prompts to a budget that uses the result: the real search, by a clock that does not depend on the machine."""
    found, said = searched(tmp_path, monkeypatch)
    assert found.recipe is not None and found.recipe.tuned is not None, found.why
    assert len(list((home / "tuned").glob("*.yaml"))) == 1 and any("hasten.Budget finds it" in line for line in said)
    with hasten.accelerate(pipe(), hasten.Budget(exact_match=0.1)) as run:
        written(found.recipe.tuned.length)
    assert run.recipe.tuned == found.recipe.tuned
    searched(tmp_path / "again", monkeypatch, keep=False)
    assert len(list((home / "tuned").glob("*.yaml"))) == 1
