"""Drafts on every family of text diffusion models: the text that is written without them."""

from __future__ import annotations

import pytest
import torch

from hasten.caching.kv import Dual, Recompute, TokenKV
from hasten.canvas import Canvas
from hasten.pipelines.text.loop import TextLoop
from hasten.pipelines.text_models.families import choose
from hasten.pipelines.text_models.host import TextHost
from hasten.pipelines.text_models.probe import probe
from hasten.recipe import Recipe
from hasten.samplers.commit import Unmask
from hasten.samplers.commit_sure import Factor
from hasten.samplers.scores import Draw
from hasten.samplers.text_blocks import Fixed, InBlocks
from hasten.samplers.verify import FreeDave
from tests.text_hosts import MASKED, mdlm
from tests.text_hosts.facts import filled


def generated(host: TextHost, recipe: Recipe) -> TextLoop:
    g = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 92, (length,), generator=g) for length in (5, 9, 2)]
    loop = TextLoop(host, recipe, Canvas.of(prompts, [9, 7, 11], host.facts), Draw(torch.zeros(3, dtype=torch.int64)))
    loop.run()
    return loop


def same(host: TextHost, kv: TokenKV) -> None:
    recipe = Recipe(kv=kv, blocks=InBlocks(rule=Fixed(size=8), end=None))
    for made in (recipe, recipe | Recipe(commit=Unmask(rule=Factor(factor=4.0)))):
        plain, drafted = generated(host, made), generated(host, made | Recipe(verify=FreeDave(most=3)))
        assert torch.equal(plain.canvas.ids, drafted.canvas.ids)
        assert torch.equal(plain.canvas.committed, drafted.canvas.committed)
        assert bool((drafted.tally.evaluations <= plain.tally.evaluations).all())


@pytest.mark.parametrize("name", MASKED)
def test_every_family_writes_the_same_with_drafts(name: str) -> None:
    model, facts = MASKED[name](2)
    host = probe(choose(model, **facts.told)).host
    same(host, Recompute())
    if host.caches:
        same(host, Dual())


def test_drafts_are_whole_texts_to_a_model_that_looks_at_the_noise() -> None:
    """Each draft has a noise level of its own."""
    host = choose(filled(mdlm.MDLM(mdlm.MDLMConfig(time_conditioning=True)), 1))
    assert not host.caches
    same(host, Recompute())
