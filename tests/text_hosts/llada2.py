"""LLaDA2.0 and 2.1 (block diffusion, mixture of experts), small.

Read: `modeling_llada2_moe.py`, `modeling_llada21_moe.py`, `configuration_llada2_moe.py` of ZHZisZZ/dllm (ca17675,
2026-04). Kept: module names (`word_embeddings`, `attention.query_key_value`, `attention.dense`), the forward's
signature, masks: 4-D bool or additive as they are, 2-D made *causal*, none for all; partial RoPE before the cache,
`ALL_ATTENTION_FUNCTIONS` by the config, norms of queries and keys, router with sigmoid scores, groups, an expert bias
that only chooses, renormalised and scaled weights, shared experts, a dense first layer, logits in float32, a cache by
default. The mask token (156895) and the block (32) are arguments of its sampler, not in the config.
Left out: flex and eager attention, losses, outputs of attentions and router logits, its sampler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.text_hosts.decoder import Decoder, DecoderLM, begun, configured, dispatched
from tests.text_hosts.facts import MASK, Facts, Host, block_causal, filled
from tests.text_hosts.layers import GatedMLP, RMSNorm, rotate

BLOCK = 8


class LLaDA2MoeConfig(PreTrainedConfig):
    model_type = "llada2_moe"

    def __init__(self, **kwargs: Any) -> None:
        own = {
            "mask_token_id": None, "architectures": ["LLaDA2MoeModelLM"], "use_qkv_bias": False, "use_bias": False,
            "use_qk_norm": True, "partial_rotary_factor": 0.5, "sliding_window": None, "num_experts": 8,
            "num_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
            "routed_scaling_factor": 2.5, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        }  # fmt: skip
        super().__init__(**configured(self, kwargs, **own))
        self.use_cache = True


class LLaDA2MoeAttention(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, False
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.counts = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        width = sum(self.counts) * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, width, bias=config.use_qkv_bias)
        self.query_layernorm, self.key_layernorm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.dense = nn.Linear(self.counts[0] * self.head_dim, config.hidden_size, bias=config.use_bias)

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Tensor | None = None,
        past_key_value: Any = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        packed = self.query_key_value(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = packed.split(self.counts, dim=1)
        q, k = self.query_layernorm(q), self.key_layernorm(k)
        q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        if past_key_value is not None:
            k, v = past_key_value.update(k, v, self.layer_idx)
        attended, _ = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, sliding_window=None
        )
        return self.dense(attended.flatten(2))


class LLaDA2MoeGate(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.linspace(-0.1, 0.1, config.num_experts))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [T, C] -> experts [T, k] within the best groups, weights [T, k]."""
        config = self.config
        scores = (tokens.float() @ self.weight.float().T).sigmoid()
        biased = (scores + self.expert_bias).unflatten(-1, (config.n_group, -1))
        best = biased.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
        allowed = torch.zeros(biased.shape[:2], dtype=torch.bool, device=tokens.device).scatter(1, best, True)
        limited = biased.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
        chosen = limited.topk(config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, chosen)
        return chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor


class LLaDA2MoeSparseMoeBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.moe_intermediate_size
        self.experts = nn.ModuleList(GatedMLP(size, inner) for _ in range(config.num_experts))
        self.gate = LLaDA2MoeGate(config)
        self.shared_experts = GatedMLP(size, inner * config.num_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        return dispatched(self.gate, self.experts, x) + self.shared_experts(x)


def feed_forward(config: Any, layer: int) -> nn.Module:
    if layer >= config.first_k_dense_replace:
        return LLaDA2MoeSparseMoeBlock(config)
    return GatedMLP(config.hidden_size, config.intermediate_size)


class LLaDA2MoeModelLM(DecoderLM):
    config_class = LLaDA2MoeConfig
    _supports_attention_backend = True

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        turned = int(config.head_dim * config.partial_rotary_factor)
        super().__init__(config, Decoder(config, LLaDA2MoeAttention, feed_forward, "attention", "word_embeddings", turned))

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, use_cache: bool | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, output_router_logits: bool | None = None,
        return_dict: bool | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        use_cache = self.config.use_cache if use_cache is None else use_cache
        x = self.model.embedded(input_ids, inputs_embeds)
        past_key_values, past = begun(past_key_values, use_cache)
        mask = as_pairs(attention_mask, x, past)
        x = self.model.run(x, position_ids, past, attention_mask=mask, past_key_value=past_key_values)
        return MoeCausalLMOutputWithPast(
            logits=self.logits(x).float(), past_key_values=past_key_values if use_cache else None
        )


def as_pairs(mask: Tensor | None, x: Tensor, past: int) -> Tensor | None:
    """The additive mask that the original hands to its layers: a 2-D one becomes causal."""
    if mask is None:
        return None
    if mask.dim() == 4 and mask.dtype != torch.bool:
        return mask
    if mask.dim() == 2:
        new = x.shape[1]
        mask = mask.bool()[:, None, None, :] & torch.ones(new, past + new, dtype=torch.bool).tril(past)
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, torch.finfo(x.dtype).min)


def plain(model: Any, ids: Tensor) -> Tensor:
    """As its sampler: an additive block-causal mask [1, 1, N, N] of zeros and minus infinities."""
    mask = block_causal(ids.shape[1], BLOCK).to(model.dtype).log()[None, None]
    return model(ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1])[None]).logits


def build(seed: int) -> Host:
    facts = Facts(
        kind="block", block=BLOCK, shifted=False, context=64, positions="argument", padding="pairs", plain=plain,
        told={"mask_token_id": MASK, "block": BLOCK},
    )  # fmt: skip
    return Host(filled(LLaDA2MoeModelLM(LLaDA2MoeConfig()), seed), facts)


FAMILIES = {"llada2": build}
