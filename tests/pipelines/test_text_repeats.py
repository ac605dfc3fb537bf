"""Revisers that ask about written tokens are used on models that were taught to answer, and left out, aloud, on others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.caching.store import Pass
from hasten.pipelines.text_models.host import TextHost
from hasten.pipelines.text_models.repeats import ENOUGH, repeats
from hasten.recipe import Recipe
from hasten.samplers.commit import Threshold, Unmask
from hasten.samplers.revise import RevisePolicy
from hasten.samplers.revise_edit import Edit
from hasten.samplers.revise_erase import Backtrack, NarrowOut, Remask
from tests.pipelines.text_pipes import pipe
from tests.text_models import VOCAB, facts, prompts, tiny_llama

LONG = [prompt.tolist() for prompt in prompts([12, 9])]


class Echo(TextHost):
    """Says what stands there, but for every `wrong`-th slot."""

    wrong = 99

    def run(self, now: Pass, store: object) -> Tensor:
        slots = now.target.clamp(max=now.slots.shape[1])
        stands = torch.nn.functional.pad(now.ids, (0, 1)).gather(1, slots)
        said = torch.where(now.target % self.wrong == self.wrong - 1, (stands + 1) % VOCAB, stands)
        return torch.nn.functional.one_hot(said, VOCAB).float()


@pytest.mark.parametrize("shifted", [False, True])
def test_the_share_is_counted(shifted: bool) -> None:
    """Texts of different lengths; with shifted logits nothing is said of the first token."""
    host = Echo(tiny_llama().model, facts(shifted=shifted))
    assert repeats(host, prompts([9, 12, 3])) == 1.0
    host.wrong = 3
    asked = 24 - 3 * shifted
    assert repeats(host, prompts([9, 12, 3])) == pytest.approx((asked - 3 - 4 - 1) / asked)


def test_few_tokens_say_nothing() -> None:
    host = Echo(tiny_llama().model, facts())
    assert repeats(host, prompts([ENOUGH - 1])) is None and repeats(host, prompts([0])) is None
    assert repeats(host, prompts([ENOUGH - 1, 1])) == 1.0


@pytest.mark.parametrize("revise", [Edit(), Remask(), Backtrack()], ids=lambda part: part.kind)
def test_it_is_left_out_and_told(revise: RevisePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(name="mine", commit=Unmask(rule=Threshold(above=0.1)), revise=revise)
    subject = pipe()
    monkeypatch.setattr(subject.host, "repeats", None)
    told = subject.generate(LONG, max_new_tokens=6, recipe=recipe)
    plain = subject.generate(LONG, max_new_tokens=6, recipe=recipe.model_copy(update={"revise": None}))
    assert torch.equal(told.sequences, plain.sequences)
    assert any("was left out" in warning and revise.kind in warning for warning in told.report.warnings)
    assert not any("left out" in warning for warning in plain.report.warnings)


def test_one_that_asks_with_masks_is_not_questioned(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(commit=Unmask(rule=Threshold(above=0.1)), revise=NarrowOut())
    subject = pipe()
    monkeypatch.setattr(subject.host, "repeats", None)
    assert not any("left out" in warning for warning in subject.generate(LONG, max_new_tokens=6, recipe=recipe).report.warnings)
    assert subject.host.repeats is None


def test_a_model_that_repeats_is_revised(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = pipe()
    monkeypatch.setattr(subject.host, "repeats", 0.97)
    recipe = Recipe(commit=Unmask(rule=Threshold(above=0.1)), revise=Edit(above=0.0))
    told = subject.generate(LONG, max_new_tokens=6, recipe=recipe)
    assert not any("left out" in warning for warning in told.report.warnings)
