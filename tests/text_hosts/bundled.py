"""The form of our own small models: unmodified Llama and Qwen3 classes whose config says how they were trained.

`mask_token_id` and `hasten_diffusion: {"kind": "full" | "block" | "causal", "block": 8, "shifted": false}`. Run in
their own way these classes are causal; a 4-D mask makes them what they were trained to be.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.text_hosts.decoder import SMALL
from tests.text_hosts.facts import Facts, Host, block_causal, filled

BLOCK = 8


def pairs(kind: str, count: int) -> Tensor:
    """[N, N] bool of a kind."""
    return torch.ones(count, count, dtype=torch.bool) if kind == "full" else block_causal(
        count, 1 if kind == "causal" else BLOCK
    )


def plain(model: Any, ids: Tensor) -> Tensor:
    mask = pairs(model.config.hasten_diffusion["kind"], ids.shape[1])[None, None].expand(ids.shape[0], -1, -1, -1)
    return model(ids, attention_mask=mask, use_cache=False).logits


def build(seed: int, kind: Any = "full", shifted: bool = False, qwen: bool = False, tied: bool = False) -> Host:
    told = {"kind": kind, "block": BLOCK, "shifted": shifted}
    keys = SMALL | {"head_dim": 8, "tie_word_embeddings": tied, "hasten_diffusion": told}
    model = Qwen3ForCausalLM(Qwen3Config(**keys)) if qwen else LlamaForCausalLM(LlamaConfig(**keys))
    facts = Facts(
        kind=kind, block=BLOCK if kind == "block" else None, shifted=shifted, context=64, positions="argument",
        padding="pairs", plain=plain,
    )  # fmt: skip
    model.config.architectures = [type(model).__name__]
    return Host(filled(model, seed), facts)


FAMILIES = {
    "bundled-full": functools.partial(build, tied=True),
    "bundled-block": functools.partial(build, kind="block", qwen=True),
    "bundled-shifted": functools.partial(build, shifted=True),
    "bundled-causal": functools.partial(build, kind="causal", shifted=True, tied=True),
}
