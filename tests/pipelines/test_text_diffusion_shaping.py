"""Guidance, end tokens held back, and the guide: against plain loops written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.caching.kv import Dual, Prefix, Recompute, TokenKV
from hasten.caching.store import KVStore, Pass
from hasten.canvas import Canvas
from hasten.errors import ModelError, UsageError
from hasten.pipelines.text.diffusion import TextDiffusionPipeline
from hasten.pipelines.text.shaping import HoldEnd
from hasten.pipelines.text_models.guide import Guide
from hasten.recipe import Recipe
from hasten.samplers.commit import Unmask
from hasten.samplers.commit_told import Agreed
from hasten.samplers.text_blocks import Fixed, InBlocks
from tests.pipelines.text_pipes import EOS, MASK, PAD, model, pipe, tokenizer

PROMPT, NEW, SCALE = [1, 2, 3, 4], 6, 1.5


def logits(subject: Any, ids: Tensor) -> Tensor:
    """Of every token, when each sees all: [1, N, V]."""
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    with torch.no_grad():
        found: Tensor = subject.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found


def surest_first(subject: Any, shaped: Any) -> list[int]:
    """LLaDA's loop in one block, one token per evaluation; shaped(ids) gives its logits [1, N, V]."""
    ids = torch.tensor([[*PROMPT, *[MASK] * NEW]])
    while (open_slots := ids[0] == MASK).any():
        values = shaped(ids).index_fill(-1, torch.tensor(subject.host.facts.forbidden), -float("inf"))[0]
        odds = values.softmax(-1)
        sure, token = odds.max(-1)
        slot = sure.masked_fill(~open_slots, -1.0).argmax()
        ids[0, slot] = token[slot]
    found: list[int] = ids[0, len(PROMPT) :].tolist()
    return found


def test_guidance_is_lladas() -> None:
    subject = pipe()

    def guided(ids: Tensor) -> Tensor:
        blind = ids.clone()
        blind[:, : len(PROMPT)] = MASK
        seen, unseen = logits(subject, ids), logits(subject, blind)
        return unseen + (SCALE + 1) * (seen - unseen)

    right = surest_first(subject, guided)
    recipe = Recipe(blocks=InBlocks(rule=Fixed(size=NEW), end=None))
    output = subject.generate([PROMPT], max_new_tokens=NEW, recipe=recipe, cfg_scale=SCALE)
    assert output.sequences[0, len(PROMPT) :].tolist() == right
    assert right != surest_first(subject, lambda ids: logits(subject, ids)), "guidance must matter, or nothing is tested"
    assert output.nfe.tolist() == [2 * NEW]
    assert output.report.computed_fraction == 1


@pytest.mark.parametrize("kv", [Prefix(), Dual()])
def test_guidance_has_caches_of_its_own(kv: TokenKV) -> None:
    """With the block as long as the text, these caches give what computing everything gives; prefix rows differ only in
    what they could not see."""
    whole = Recipe(blocks=InBlocks(rule=Fixed(size=NEW), end=None), kv=Recompute())
    cached = whole.model_copy(update={"kv": kv})
    subject = pipe("block", block=16)
    right = subject.generate([PROMPT, [5]], max_new_tokens=NEW, recipe=whole, cfg_scale=SCALE)
    output = subject.generate([PROMPT, [5]], max_new_tokens=NEW, recipe=cached, cfg_scale=SCALE)
    assert torch.equal(output.sequences, right.sequences)
    assert output.report.bytes_held > 0


def test_no_guidance_at_zero() -> None:
    plain = pipe().generate([PROMPT], max_new_tokens=NEW)
    assert torch.equal(pipe().generate([PROMPT], max_new_tokens=NEW, cfg_scale=0.0).sequences, plain.sequences)


def test_no_end_before_so_many_tokens() -> None:
    subject = pipe()
    plain = subject.generate([PROMPT], max_new_tokens=NEW, block_length=2)
    early = int(plain.sequences[0, len(PROMPT)])
    ended = subject.generate([PROMPT], max_new_tokens=NEW, block_length=2, eos_token_id=early)
    assert ended.lengths.tolist() == [1]
    for least in (1, 3):
        output = subject.generate([PROMPT], max_new_tokens=NEW, block_length=2, eos_token_id=early, min_new_tokens=least)
        assert early not in output.sequences[0, len(PROMPT) : len(PROMPT) + least].tolist()
        assert int(output.lengths[0]) > least


def test_the_penalty_is_taken_off_in_nats() -> None:
    subject = pipe()
    early = int(subject.generate([PROMPT], max_new_tokens=NEW).sequences[0, len(PROMPT)])

    def held_back(ids: Tensor) -> Tensor:
        found = logits(subject, ids)
        found[..., early] -= 2.5
        return found

    right = surest_first(subject, held_back)
    recipe = Recipe(blocks=InBlocks(rule=Fixed(size=NEW), end=None))
    output = subject.generate([PROMPT], max_new_tokens=NEW, recipe=recipe, eos_penalty=2.5, eos_token_id=early)
    assert output.sequences[0, len(PROMPT) :].tolist() == right
    huge = subject.generate([PROMPT], max_new_tokens=NEW, recipe=recipe, eos_penalty=1e4, eos_token_id=early)
    assert early not in huge.sequences[0, len(PROMPT) :].tolist()


def test_end_tokens_are_held_back_where_they_are_and_nowhere_else() -> None:
    canvas = Canvas.of([torch.tensor([1, 2]), torch.tensor([3])], [3, 3], pipe().host.facts)
    slots = torch.tensor([[2, 3, 4], [1, 2, 5]])  # slot 5 is none
    now = Pass(torch.tensor([0, 1]), slots, slots, "none", None, torch.arange(3).expand(2, -1), slots)
    plain = torch.randn(2, 3, 8)
    held = HoldEnd(lambda now, store: plain.clone(), canvas, (4, 6), 1.5, 2)(now, KVStore(2, 5, torch.device("cpu")))
    others = [0, 1, 2, 3, 5, 7]
    assert torch.equal(held[..., others], plain[..., others])
    early = torch.tensor([[True, True, False], [True, True, False]])
    assert torch.equal(torch.isinf(held[..., [4, 6]]).all(-1), early)
    assert torch.allclose(held[:, 2, [4, 6]], plain[:, 2, [4, 6]] - 1.5)


# --- the guide ----------------------------------------------------------------------------------------


def guide(seed: int = 5) -> Any:
    return model("causal", seed=seed)


def test_the_guide_says_what_it_would_have_written() -> None:
    subject, causal = pipe(), guide()
    asked = Guide(causal, subject.host.facts)
    canvas = Canvas.of([torch.tensor([1, 2]), torch.tensor([3])], [3, 2], subject.host.facts)
    proposed = torch.where(canvas.masked, 7, canvas.ids)
    told = asked(proposed, canvas)
    assert told[:, 0].tolist() == [-1, -1]
    for row, length in enumerate((5, 3)):
        with torch.no_grad():
            values = causal(proposed[row : row + 1, :length], use_cache=False).logits[0]
        best = values.index_fill(-1, torch.tensor(subject.host.facts.forbidden), -float("inf")).argmax(-1)
        assert told[row, 1:length].tolist() == best[:-1].tolist()
    assert asked.evaluations == 1


def test_guided_generation_writes_agreement_and_counts_the_guide() -> None:
    recipe = Recipe(name="guided", commit=Unmask(rule=Agreed()), blocks=InBlocks(rule=Fixed(size=4), end=None))
    subject = TextDiffusionPipeline(model(), tokenizer(), recipe, guide=guide(), guide_tokenizer=tokenizer(), probe=False)
    together = subject.generate([PROMPT, [5]], max_new_tokens=8)
    assert together.report.generations[0].guide > 0
    for number, prompt in enumerate([PROMPT, [5]]):
        alone = subject.generate([prompt], max_new_tokens=8)
        assert together.sequences[number, 4:].tolist() == alone.sequences[0, len(prompt) :].tolist()
    twin = TextDiffusionPipeline(model(), tokenizer(), recipe, guide=model(seed=0), probe=False)
    assert int(twin.generate([PROMPT], max_new_tokens=8).nfe[0]) <= 8


def test_a_recipe_that_asks_a_guide_needs_one() -> None:
    with pytest.raises(UsageError, match="Pass guide="):
        pipe().generate([PROMPT], recipe=Recipe(commit=Unmask(rule=Agreed())))


def test_a_guide_of_another_vocabulary_is_refused() -> None:
    from transformers import LlamaForCausalLM

    from tests.pipelines.text_pipes import config

    small = config("causal")
    small.vocab_size, small.pad_token_id = 64, 0
    with pytest.raises(UsageError, match="64 tokens and the guided model 96"):
        TextDiffusionPipeline(model(), guide=LlamaForCausalLM(small).eval(), probe=False)
    other = tokenizer().__class__(tokenizer_object=_shuffled(), mask_token="<mask>", pad_token="<pad>", eos_token="<eos>")
    with pytest.raises(UsageError, match="'w0' is number 0 to the guided model and 1 to the guide"):
        TextDiffusionPipeline(model(), tokenizer(), guide=guide(), guide_tokenizer=other, probe=False)
    with pytest.raises(UsageError, match="training mode"):
        TextDiffusionPipeline(model(), guide=guide().train(), probe=False)
    with pytest.raises(ModelError, match="causal language model"):
        TextDiffusionPipeline(model(), guide=object(), probe=False)


def test_a_text_too_long_for_the_guide() -> None:
    short = guide()
    short.config.max_position_embeddings = 8
    subject = TextDiffusionPipeline(model(), guide=short, probe=False)
    with pytest.raises(UsageError, match="positions for 8 tokens"):
        subject.generate([PROMPT], max_new_tokens=8)


def _shuffled() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"w{number}": (number + 1) % PAD for number in range(PAD)} | {"<pad>": PAD, "<eos>": EOS, "<mask>": MASK}
    return Tokenizer(WordLevel(words, unk_token="<pad>"))
