"""Text diffusion pipelines for tests: small random models of our own form, and a tokenizer of 96 words."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hasten.pipelines.text.diffusion import TextDiffusionPipeline

VOCAB, MASK, EOS, PAD = 96, 95, 94, 93
"""Ids 0 to 92 are the words w0 to w92."""

TEMPLATE = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w2{% endif %}"


def config(kind: str = "full", block: int = 4, shifted: bool = False, **more: Any) -> LlamaConfig:
    told = {"kind": kind, "block": block, "shifted": shifted}
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=64, mask_token_id=MASK, eos_token_id=EOS,
        pad_token_id=PAD, bos_token_id=None, hasten_diffusion=told, **more,
    )  # fmt: skip


def model(kind: str = "full", block: int = 4, shifted: bool = False, seed: int = 0, cls: Any = LlamaForCausalLM) -> Any:
    """Random weights, large enough that every token depends on every token it reads."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = cls(config(kind, block, shifted)).eval()
    made.config.architectures = [LlamaForCausalLM.__name__]
    return made


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(PAD)} | {"<pad>": PAD, "<eos>": EOS, "<mask>": MASK}
    plain = Tokenizer(WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", mask_token="<mask>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


@cache
def pipe(kind: str = "full", block: int = 4, shifted: bool = False, seed: int = 0, probe: bool = False) -> TextDiffusionPipeline:
    """Shared by tests, which leave it as it was."""
    return TextDiffusionPipeline(model(kind, block, shifted, seed), tokenizer(), probe=probe)


def saved(folder: Any, **about: Any) -> Any:
    """A transformers folder with such a model in it."""
    model(**about).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
