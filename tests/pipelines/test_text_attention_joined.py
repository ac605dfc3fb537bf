"""A recipe for prompts and one for caches make one recipe; two for the same are refused."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

import hasten
from hasten.errors import RecipeError
from hasten.pipelines.recipes import catalogue
from hasten.recipe import Recipe, from_yaml
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.scorers.spans import Depth, Near, Spans
from hasten.sparse_attn.text.causal import CausalAttention
from hasten.sparse_attn.text.reader import Recent
from tests.pipelines.causal_models import build, ids, no_grad, pattern  # noqa: F401

PROMPT = CausalAttention(prompt=pattern(Spans(spans=(Near(window=16, sinks=2),))), min_tokens=40)
CACHE = CausalAttention(cache=Recent(window=12, sinks=2), min_tokens=50)
TEXT = [entry for entry in catalogue() if isinstance(entry.recipe.attention, CausalAttention)]


def phases(policy: CausalAttention) -> tuple[bool, bool]:
    return policy.prompt is not None, policy.cache is not None


def test_each_phase_does_what_its_own_recipe_says() -> None:
    """Token for token and pair for pair: prompts as the first alone reads them, caches as the second."""
    model, tokens = build("llama"), ids(2, 61)
    counted, logits = {}, {}
    for name, policy in {"prompt": PROMPT, "cache": CACHE, "both": PROMPT.joined(CACHE)}.items():
        assert policy is not None
        with hasten.accelerate(model, Recipe(name=name, attention=policy)) as run:
            logits[name] = model(tokens).logits
            model.generate(tokens, max_new_tokens=5, do_sample=False)
        counted[name] = {phase: run.report().phases[phase].density for phase in ("prompt", "cache")}
    assert torch.equal(logits["both"], logits["prompt"]) and not torch.equal(logits["both"], logits["cache"])
    assert counted["both"] == {"prompt": counted["prompt"]["prompt"], "cache": counted["cache"]["cache"]}
    assert counted["both"]["prompt"] < 0.9 and counted["both"]["cache"] < 0.5
    assert counted["prompt"]["cache"] == counted["cache"]["prompt"] == 1


@pytest.mark.parametrize(("length", "sparse"), [(45, ["prompt"]), (61, ["prompt", "cache"]), (30, [])])
def test_each_keeps_its_own_least_length(length: int, sparse: list[str]) -> None:
    """Prompts from 40 tokens on, caches from 50, in either order."""
    model = build("llama")
    for policy in (PROMPT.joined(CACHE), CACHE.joined(PROMPT)):
        assert policy == PROMPT.joined(CACHE)
        inert = pytest.warns(UserWarning) if len(sparse) < 2 else contextlib.nullcontext()
        with inert, hasten.accelerate(model, Recipe(attention=policy)) as run:
            model.generate(ids(1, length), max_new_tokens=3, do_sample=False)
        assert [phase for phase in ("prompt", "cache") if run.report().phases[phase].sparse] == sparse


@pytest.mark.parametrize(("one", "two"), list(itertools.combinations([entry.name for entry in TEXT], 2)))
def test_recipes_join_where_their_phases_are_disjoint(one: str, two: str) -> None:
    left, right = hasten.recipe(one).attention, hasten.recipe(two).attention
    assert isinstance(left, CausalAttention) and isinstance(right, CausalAttention)
    if any(map(all, zip(phases(left), phases(right), strict=True))):
        with pytest.raises(RecipeError, match=f"'{one}' and '{two}'.*both say what"):
            hasten.recipe(f"{one}+{two}")
        return
    both = hasten.recipe(f"{one}+{two}")
    assert isinstance(both.attention, CausalAttention) and phases(both.attention) == (True, True)
    assert both.name == f"{one}+{two}" and from_yaml(both.to_yaml()) == both
    assert both.attention == hasten.recipe(f"{two}+{one}").attention
    prompts, caches = (left, right) if left.prompt else (right, left)
    assert prompts.prompt is not None and (both.attention.cache, both.attention.min_tokens) == (caches.cache, caches.min_tokens)
    least = prompts.prompt.min_tokens if prompts.min_tokens == caches.min_tokens else prompts.min_tokens
    assert both.attention.prompt == prompts.prompt.model_copy(update={"min_tokens": least}), "its own least length, as without the other"


def test_some_recipes_do_join() -> None:
    both = hasten.recipe("minference+squeezed").attention
    assert isinstance(both, CausalAttention) and both.prompt and both.cache and both.min_tokens == 4096


def test_a_recipe_of_diffusion_models_is_one_for_prompts() -> None:
    plain = hasten.recipe("xattention").attention
    assert isinstance(plain, SparseAttention)
    for name in ("xattention+squeezed:min_tokens=10", "squeezed:min_tokens=10+xattention"):
        both = hasten.recipe(name).attention
        assert isinstance(both, CausalAttention) and both.cache is not None and both.min_tokens == 10
        assert both.prompt == plain.model_copy(update={"min_tokens": 4096}), "its own least length, as without the other"
    with pytest.raises(RecipeError, match="what prompts read"):
        hasten.recipe("xattention+minference")


def test_different_layers_are_refused() -> None:
    deep = CACHE.model_copy(update={"dense": (Depth(end=0.5),)})
    with pytest.raises(RecipeError, match="different layers dense"):
        Recipe(name="a", attention=PROMPT) | Recipe(name="b", attention=deep)
    same = PROMPT.model_copy(update={"dense": deep.dense})
    joined = (Recipe(attention=same) | Recipe(attention=deep)).attention
    assert isinstance(joined, CausalAttention) and joined.dense == deep.dense


def test_a_part_without_either_changes_nothing() -> None:
    empty = CausalAttention()
    assert empty.joined(CACHE) == CACHE.joined(empty) == CACHE
    assert empty.joined(PROMPT).prompt == PROMPT.prompt  # type: ignore[union-attr]
