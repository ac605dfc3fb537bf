"""WINO's shadows: that each is the leave-one-out it is said to be, against a forward pass with the mask written out.

Shapes: B texts, L slots, S shadows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.caching.kv import Dual, Prefix, Recompute, TokenKV
from hasten.caching.kv_attention import AttentionDrift
from hasten.caching.kv_front import BlockCausal
from hasten.caching.store import KVStore, Pass
from hasten.canvas import DONE, Canvas
from hasten.errors import RecipeError
from hasten.pipelines.text.loop import TextLoop
from hasten.pipelines.text_models.host import TextHost
from hasten.recipe import Recipe
from hasten.samplers.commit import Unmask
from hasten.samplers.commit_wide import WideIn
from hasten.samplers.revise_erase import NarrowOut
from hasten.samplers.scores import Draw
from hasten.samplers.text_blocks import Fixed, InBlocks
from tests.text_models import MASK_ID, generate, prompts, texts, tiny_llama


def recipe(kv: TokenKV, below: float = 0.9) -> Recipe:
    return Recipe(
        kv=kv, commit=Unmask(rule=WideIn(above=0.02, least=2)), revise=NarrowOut(below=below),
        blocks=InBlocks(rule=Fixed(size=6), end=None),
    )  # fmt: skip


def reference(host: TextHost, ids: Tensor, low: int, high: int, block: int | None) -> dict[int, Tensor]:
    """Logits [V] for each written slot of [low, high), by one forward pass of the unmodified model over the text with a
    mask behind it for every slot of the block, and a written-out attention mask. ids int64 [L]."""
    slots = len(ids)
    place = torch.cat([torch.arange(slots), torch.arange(low, high)])
    reads = torch.zeros(len(place), len(place), dtype=torch.bool)
    reads[:, :slots] = True  # all read the text
    reads[torch.arange(slots, len(place)), torch.arange(low, high)] = False  # a shadow all but its own slot,
    reads[torch.arange(slots, len(place)), torch.arange(slots, len(place))] = True  # but itself
    if block is not None:
        reads &= (place // block)[:, None] >= (place // block)[None]
    mask = torch.where(reads, 0.0, torch.finfo(torch.float32).min)[None, None]
    tokens = torch.cat([ids, torch.full((high - low,), MASK_ID)])[None]
    with torch.no_grad():
        logits = host.model(input_ids=tokens, position_ids=place[None], attention_mask=mask, use_cache=False).logits[0]
    return {slot: logits[slots + slot - low] for slot in range(low, high)}


class Seen:
    """Keeps each call, its logits and the texts as they were."""

    def __init__(self, host: TextHost, canvas: Canvas) -> None:
        self.host, self.canvas = host, canvas
        self.calls: list[tuple[Pass, Tensor, Tensor, Tensor, Tensor]] = []

    def __call__(self, now: Pass, store: KVStore) -> Tensor:
        logits = self.host.run(now, store)
        canvas = self.canvas
        self.calls.append((now, logits.clone(), canvas.ids.clone(), canvas.status.clone(), canvas.span.clone()))
        return logits


def record(host: TextHost, made: Recipe, lengths: list[int], new: list[int]) -> tuple[Seen, TextLoop]:
    canvas = Canvas.of(prompts(lengths), new, host.facts)
    seen = Seen(host, canvas)
    loop = TextLoop(host, made, canvas, Draw(torch.arange(len(new))), evaluate=seen)
    loop.run()
    return seen, loop


@pytest.mark.parametrize("block", [None, 4])
def test_a_shadow_reads_all_but_its_own_slot(block: int | None) -> None:
    """Without a cache, on texts that fill their canvas, against the model as it is."""
    host = tiny_llama(block)
    seen, loop = record(host, recipe(Recompute()), [5, 3], [8, 10])
    checked = 0
    for now, logits, ids, status, span in seen.calls:
        for row, text in enumerate(now.members.tolist()):
            low, high = span[text].tolist()
            truth = reference(host, ids[text], low, high, block)
            for column, slot in enumerate(now.target[row].tolist()):
                if slot < loop.canvas.slots and status[text, slot] == DONE:
                    torch.testing.assert_close(logits[row, column], truth[slot], atol=2e-4, rtol=2e-4)
                    checked += 1
    assert checked > 5
    assert loop.revise is not None and int(loop.revise.times.sum()) > 0


def test_nobody_reads_a_shadow() -> None:
    """Open slots get the logits that they get without any."""
    host, without = tiny_llama(), Recipe(commit=Unmask(rule=WideIn(above=0.02, least=2)))
    blocks = Recipe(blocks=InBlocks(rule=Fixed(size=6), end=None))
    first, _ = record(host, recipe(Recompute(), below=1e-9), [5, 3], [8, 10])  # nothing is ever taken back
    second, _ = record(host, without | blocks, [5, 3], [8, 10])
    assert sum(now.shadows for now, *_ in first.calls) > 0
    for one, other in zip(first.calls, second.calls, strict=True):
        width = other[0].target.shape[1]
        assert torch.equal(one[0].target[:, :width], other[0].target)
        torch.testing.assert_close(one[1][:, :width], other[1], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(("block", "kv"), [(None, Dual()), (None, Prefix()), (4, BlockCausal())], ids=str)
def test_with_a_cache_shadows_read_it(block: int | None, kv: TokenKV) -> None:
    """One block, which every call computes: then a cache is exact, and all is as without one."""
    host = tiny_llama(block)
    size = Recipe(blocks=InBlocks(rule=Fixed(size=99, aligned=False), end=None))
    parts = Recipe(commit=Unmask(rule=WideIn(above=0.02, least=2)), revise=NarrowOut())
    lengths, new = [5, 3], [8, 7]
    cached = generate(host, prompts(lengths), new, size | parts | Recipe(kv=kv))
    plain = generate(host, prompts(lengths), new, size | parts | Recipe(kv=Recompute()))
    if isinstance(kv, BlockCausal):
        assert texts(cached) == texts(plain)
    assert cached.revise is not None and int(cached.revise.times.sum()) > 0
    assert not bool(cached.canvas.masked.any())


@pytest.mark.parametrize("kv", [Recompute(), Dual(), Prefix()], ids=str)
def test_texts_do_not_know_of_each_other(kv: TokenKV) -> None:
    lengths, new, host = [5, 9, 2], [10, 7, 12], tiny_llama()
    together = generate(host, prompts(lengths), new, recipe(kv))
    for row, prompt in enumerate(prompts(lengths)):
        assert texts(generate(host, [prompt], [new[row]], recipe(kv), seed=row))[0] == texts(together)[row]


def test_other_tokens_in_other_layers_are_refused() -> None:
    with pytest.raises(RecipeError, match="narrow-out"):
        generate(tiny_llama(), prompts([3]), [4], recipe(AttentionDrift()))


