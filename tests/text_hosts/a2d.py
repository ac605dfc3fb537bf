"""A2D Qwen3 of ZHZisZZ/dllm (an autoregressive class made bidirectional), small, on the installed Qwen3 classes.

Read: `dllm/pipelines/a2d/models/qwen3/modeling_qwen3.py` of ZHZisZZ/dllm (ca17675, 2026-04).
Kept: model_type and class names, a mask of keys or a 4-D one in place of the causal mask, everything else Qwen3's own.
Left out: flex attention's block masks, sliding windows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.modeling_outputs import BaseModelOutputWithPast

from tests.text_hosts.decoder import SMALL
from tests.text_hosts.facts import Facts, Host, filled


class A2DQwen3Config(Qwen3Config):
    model_type = "a2d-qwen3"


class A2DQwen3Model(Qwen3Model):
    def forward(  # type: ignore[override]
        self, input_ids: Tensor | None = None, attention_mask: Any = None, position_ids: Tensor | None = None,
        past_key_values: Any = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
        cache_position: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        if attention_mask is None:
            attention_mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        if attention_mask.dim() == 2:
            keys = attention_mask[:, None, None, :].expand(-1, 1, attention_mask.shape[1], -1)
            lowest = torch.finfo(x.dtype).min
            attention_mask = torch.zeros(keys.shape, dtype=x.dtype, device=x.device).masked_fill(keys == 0, lowest)
        turned = self.rotary_emb(x, position_ids)
        for layer in self.layers:
            x = layer(
                x, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
                use_cache=use_cache, position_embeddings=turned, **kwargs,
            )  # fmt: skip
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values if use_cache else None
        )


class A2DQwen3LMHeadModel(Qwen3ForCausalLM):
    config: A2DQwen3Config

    def __init__(self, config: A2DQwen3Config) -> None:
        super().__init__(config)
        self.model = A2DQwen3Model(config)
        self.post_init()


def plain(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def build(seed: int) -> Host:
    config = A2DQwen3Config(**SMALL, head_dim=8, architectures=["A2DQwen3LMHeadModel"])
    facts = Facts(kind="full", shifted=False, context=64, positions="argument", padding="keys", plain=plain)
    return Host(filled(A2DQwen3LMHeadModel(config), seed), facts)


FAMILIES = {"a2d-qwen3": build}
