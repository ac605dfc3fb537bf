"""LLaDA-MoE 7B-A1B, small.

Read: `modeling_lladamoe.py`, `configuration_lladamoe.py` of ZHZisZZ/dllm (ca17675, 2026-04).
Kept: module names, the forward's signature, that it refuses any cache (`cache_position` included), a 2-D mask that
every layer turns into its own additive one, softmax router with an expert bias and no renormalisation, shared expert, a
dense first layer, norms of queries and keys per head, unshifted logits. The config has no mask token: the authors'
sampler is told it (156895). Left out: eager and flash attention, clipping, router losses, RoPE scaling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from tests.text_hosts.decoder import Decoder, DecoderLM, configured, dispatched
from tests.text_hosts.facts import MASK, Facts, Host, filled
from tests.text_hosts.layers import GatedMLP, RMSNorm, heads, rotate, shared


class LLaDAMoEConfig(PreTrainedConfig):
    model_type = "lladamoe"

    def __init__(self, **kwargs: Any) -> None:
        own = {
            "mask_token_id": None, "architectures": ["LLaDAMoEModelLM"], "attention_bias": False, "qk_layernorm": True,
            "dense_intermediate_size": 48, "expert_intermediate_size": 16, "shared_expert_intermediate_size": 16,
            "num_experts": 8, "num_experts_per_tok": 2, "moe_layer_freq": [0, 1], "norm_topk_prob": False,
            "moe_router_enable_expert_bias": True, "moe_router_score_function": "softmax",
        }  # fmt: skip
        super().__init__(**configured(self, kwargs, **own))


class LLaDAMoESdpaAttention(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        size, kv, bias = config.hidden_size, config.num_key_value_heads * config.head_dim, config.attention_bias
        self.config, self.layer_idx, self.head_dim, self.is_causal = config, layer_idx, config.head_dim, False
        self.q_proj, self.o_proj = nn.Linear(size, size, bias=bias), nn.Linear(size, size, bias=bias)
        self.k_proj, self.v_proj = nn.Linear(size, kv, bias=bias), nn.Linear(size, kv, bias=bias)
        if config.qk_layernorm:
            self.q_norm, self.k_norm = RMSNorm(config.head_dim), RMSNorm(config.head_dim)

    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, **_: Any) -> Tensor:
        q, k, v = (heads(project(hidden_states), self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_layernorm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        mask = None
        if attention_mask is not None:  # 2-D by construction; anything else fails in the original, too
            keys = attention_mask[:, None, None, :].expand(-1, 1, q.shape[2], -1)
            mask = torch.zeros(keys.shape, dtype=q.dtype, device=q.device)
            mask = mask.masked_fill(keys == 0, torch.finfo(q.dtype).min)
        attended = F.scaled_dot_product_attention(
            q, shared(k, groups), shared(v, groups), attn_mask=mask, dropout_p=0.0, is_causal=False
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class LLaDAMoESparseMoeBlock(nn.Module):
    """Weights of the chosen experts are their share of a softmax over all (plus the bias), as they are."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        sizes = (config.hidden_size, config.expert_intermediate_size)
        self.experts = nn.ModuleList(GatedMLP(*sizes) for _ in range(config.num_experts))
        self.shared_expert = GatedMLP(config.hidden_size, config.shared_expert_intermediate_size)
        self.register_buffer("expert_bias", torch.linspace(-0.05, 0.05, config.num_experts))

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = (self.gate(tokens).float().softmax(-1) + self.expert_bias).topk(self.top_k, dim=-1)
        return chosen, weights

    def forward(self, x: Tensor) -> Tensor:
        return dispatched(self.route, self.experts, x) + self.shared_expert(x)


def feed_forward(config: Any, layer: int) -> nn.Module:
    if config.moe_layer_freq[layer]:
        return LLaDAMoESparseMoeBlock(config)
    return GatedMLP(config.hidden_size, config.dense_intermediate_size)


class LLaDAMoEModelLM(DecoderLM):
    config_class = LLaDAMoEConfig

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__(config, Decoder(config, LLaDAMoESdpaAttention, feed_forward))

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, use_cache: bool | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, output_router_logits: bool | None = None,
        return_dict: bool | None = None, cache_position: Tensor | None = None, num_logits_to_keep: int = 0,
    ) -> Any:  # fmt: skip
        assert labels is None and num_logits_to_keep == 0, "no loss in the forward pass"
        assert not use_cache and past_key_values is None and cache_position is None, "no cache"
        x = self.model.embedded(input_ids, inputs_embeds)
        x = self.model.run(x, position_ids, attention_mask=attention_mask)
        return MoeCausalLMOutputWithPast(logits=self.logits(x))


def plain(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


def build(seed: int) -> Host:
    facts = Facts(
        kind="full", shifted=False, context=64, positions="argument", padding="keys", plain=plain,
        told={"mask_token_id": MASK},
    )  # fmt: skip
    return Host(filled(LLaDAMoEModelLM(LLaDAMoEConfig()), seed), facts)


FAMILIES = {"llada-moe": build}
