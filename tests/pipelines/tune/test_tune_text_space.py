"""What is searched for texts: every choice gives a recipe, and sequential decoding is where nothing is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
import pytest

from hasten.errors import HastenError
from hasten.part import Part
from hasten.pipelines.tune.text_space import TextSpace, first_guesses
from hasten.recipe import Recipe, from_yaml
from hasten.samplers.commit import Quota, Unmask
from hasten.samplers.text_blocks import Fixed, InBlocks
from tests.pipelines.text_pipes import pipe

SPACES = {
    "short": TextSpace(9), "one": TextSpace(1), "long": TextSpace(200), "causal": TextSpace(16, block=4),
    "plain": TextSpace(16, caches=False), "filtered": TextSpace(16, filtered=True),
}  # fmt: skip


@pytest.mark.parametrize("name", SPACES)
def test_every_guess_is_a_recipe_that_can_be_written_down_and_asked_again(name: str) -> None:
    space = SPACES[name]
    guesses = first_guesses(space)
    labels = set()
    for guess in guesses:
        recipe = space.recipe(guess)
        assert from_yaml(recipe.to_yaml()) == recipe
        assert space.ask(optuna.trial.FixedTrial(guess)) == guess
        labels.add(recipe.name)
    assert len(labels) == len(guesses) > 20
    assert "sequential" not in labels


@pytest.mark.parametrize("name", SPACES)
def test_where_nothing_is_chosen_is_sequential_decoding(name: str) -> None:
    recipe = SPACES[name].recipe(SPACES[name].params())
    assert recipe == Recipe(name="sequential")


def test_random_compositions_are_recipes_in_range() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    kinds: dict[str, set[str]] = {}
    for _ in range(150):
        params = SPACES["long"].ask(study.ask())
        recipe = SPACES["long"].recipe(params)
        assert from_yaml(recipe.to_yaml()) == recipe
        for axis in SPACES["long"].axes:
            kinds.setdefault(axis, set()).add(params[axis])
    assert kinds == {axis: set(choices) for axis, choices in SPACES["long"].axes.items()}


def test_every_choice_alone_writes_texts_or_says_why_not() -> None:
    space, refused = TextSpace(9), []
    for axis, kinds in space.axes.items():
        for kind in kinds:
            params = space.params(**({"commit": "threshold"} | {axis: kind}))
            try:
                output = pipe().generate(prompts=["w1 w2 w3"], max_new_tokens=9, recipe=space.recipe(params))
                assert output.lengths.tolist() == [9] or int(output.lengths) < 9 and axis == "end"
            except HastenError as error:
                refused.append((kind, str(error)))
    assert {kind for kind, _ in refused} <= {"at-delimiter"}, refused


@pytest.mark.parametrize(
    ("choice", "axes"),
    [
        ({"blocks": ("fixed", {"size": 32})}, set()), ({"blocks": "whole"}, set()), ({"blocks": ("fixed", {"size": 4})}, {"blocks"}),
        ({"commit": ("quota", {"steps": 9})}, set()), ({"commit": ("quota", {"steps": 8})}, {"commit"}), ({"kv": "dual"}, {"kv"}),
        ({"end": "predicted-end"}, {"blocks"}), ({"extra": "drafts"}, {"verify"}), ({"extra": "outbid"}, {"revise"}),
    ],
)  # fmt: skip
def test_only_what_differs_from_sequential_decoding_is_on_an_axis(choice: Mapping[str, Any], axes: set[str]) -> None:
    assert set(TextSpace(9).recipe(TextSpace(9).params(**choice)).axes) == axes


def test_a_text_longer_than_a_block_has_whole_and_fixed_blocks_apart() -> None:
    space = TextSpace(40)
    assert space.recipe(space.params(blocks="fixed")).blocks is None
    whole: Part | None = space.recipe(space.params(blocks="whole")).blocks
    assert isinstance(whole, InBlocks) and not isinstance(whole.rule, Fixed)
    commit = space.recipe(space.params(commit=("quota", {"steps": 20}))).commit
    assert isinstance(commit, Unmask) and commit.rule == Quota(steps=20)


def test_names_say_what_differs() -> None:
    space = TextSpace(9)
    assert space.name(space.params(commit=("threshold", {"doubt": 0.03}), kv="echo")) == "threshold (doubt 0.03) + echo (often 4, every 0)"
    assert space.name(space.params(kv="freeze")) == "freeze"
