"""Causal language models of transformers at tiny sizes with random weights, policies that fit them, and comparisons."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hasten.pipelines.causal.session import TextSession
from hasten.sparse_attn.layouts.layout import Identity
from hasten.sparse_attn.pattern import Pattern
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.scorers.spans import Full, Spans
from hasten.sparse_attn.selectors.top import All
from hasten.sparse_attn.text.causal import CausalAttention
from hasten.sparse_attn.text.reader import Reader, Recent

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MIXED = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2-mixed": (Qwen2ForCausalLM, Qwen2Config, MIXED),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 9, "head_dim": 8}),
    "mistral-full": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 8}),
}


def build(name: str, **more: Any) -> Any:
    model, config, own = MODELS[name]
    torch.manual_seed(0)
    built = model(config(**{**SIZES, **own, **more})).eval()
    with torch.no_grad():
        for weight in built.parameters():  # random weights attend to nothing in particular; these do
            if weight.dim() == 2:
                weight.mul_(4)
    return built


def pattern(score: Any, layout: Any = None, **more: Any) -> SparseAttention:
    layout = layout or Identity(block=8)
    return SparseAttention(patterns=(Pattern(layout=layout, score=score, select=All()),), warm=0.0, block_m=16, **more)


def full(cache: Reader | None = None) -> CausalAttention:
    """Everything is kept, through the sparse path."""
    return CausalAttention(prompt=pattern(Spans(spans=(Full(),))), cache=cache or Recent(window=999), min_tokens=0)


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side: str, length: int) -> Tensor:
    mask = torch.ones(3, length, dtype=torch.long)
    if side == "left":
        mask[1, :5] = mask[2, :17] = 0
    if side == "right":
        mask[1, -5:] = mask[2, -17:] = 0
    return mask


def close(ours: Tensor, dense: Tensor, real: Tensor | None = None) -> None:
    if real is not None:
        ours, dense = ours[real.bool()], dense[real.bool()]
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4 * float(dense.abs().max()))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """Of every test whose module imports it: no gradients, and no warnings on the console."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def because(session: TextSession, reason: str) -> None:
    assert any(reason in said for said in session.reasons), session.reasons
    assert not any(row.sparse for row in session.rows.values())
