"""SDAR and TraDo (block diffusion over Qwen3), small.

Read: `modeling_sdar.py`, `configuration_sdar.py`, `generate.py` of JetAstra/SDAR (c2041a8, 2025-12).
Kept: module names, the forward's signature with `store_kv`, RoPE before the cache, norms of queries and keys per head,
a mask of zeros and ones [B or 1, q, k] or 4-D that must not be None, `enable_gqa`, keyword arguments for torch's
function, and that a mask of ones takes the way of the flash-attn package (here a function of its own, which nothing can
catch either). A 3-D mask lines its first dimension up with the heads, so it serves one row only: kept. The config has
no mask token: generation is told it (151669, in the tokenizer).
Left out: training, flex attention, sliding windows, outputs of attentions and hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.text_hosts.decoder import Decoder, DecoderLM, begun, configured
from tests.text_hosts.facts import Facts, Host, block_causal, filled
from tests.text_hosts.layers import RMSNorm, dense_attention, heads, rotate

BLOCK = 4


class SDARConfig(PreTrainedConfig):
    model_type = "sdar"

    def __init__(self, **kwargs: Any) -> None:
        own = {"architectures": ["SDARForCausalLM"], "attention_bias": False, "block_size": BLOCK}
        super().__init__(**configured(self, kwargs, **own))
        self.use_cache = True


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, softmax_scale: float | None = None
) -> Tensor:
    """The package's: [B, N, H, D]."""
    return dense_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale).transpose(1, 2)


class SDARAttention(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        size, dim = config.hidden_size, config.head_dim
        self.config, self.layer_idx, self.head_dim, self.scaling = config, layer_idx, dim, dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(size, config.num_attention_heads * dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, size, bias=config.attention_bias)
        self.q_norm, self.k_norm = RMSNorm(dim), RMSNorm(dim)

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, past_key_value: Any = None,
        store_kv: bool = False, **_: Any,
    ) -> Tensor:  # fmt: skip
        q = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        v = heads(self.v_proj(hidden_states), self.head_dim)
        q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        if past_key_value is not None and store_kv:
            k, v = past_key_value.update(k, v, self.layer_idx)
        elif past_key_value is not None and len(past_key_value) > self.layer_idx:
            old = past_key_value.layers[self.layer_idx]
            if old.get_seq_length():
                k, v = torch.cat((old.keys, k), dim=-2), torch.cat((old.values, v), dim=-2)
        attention_mask = attention_mask.bool() if attention_mask is not None else None
        if torch.all(attention_mask):  # None: the original fails here, too
            attended = flash_attn_func(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=False, softmax_scale=self.scaling
            ).flatten(2)
        else:
            attended = F.scaled_dot_product_attention(
                query=q, key=k, value=v, attn_mask=attention_mask, is_causal=False, scale=self.scaling, enable_gqa=True
            ).transpose(1, 2).flatten(2)  # fmt: skip
        return self.o_proj(attended)


class SDARForCausalLM(DecoderLM):
    config_class = SDARConfig

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config, Decoder(config, SDARAttention))

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, use_cache: bool | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0, **kwargs: Any,
    ) -> Any:  # fmt: skip
        use_cache = self.config.use_cache if use_cache is None else use_cache
        x = self.model.embedded(input_ids, inputs_embeds)
        past_key_values, past = begun(past_key_values, use_cache)
        x = self.model.run(
            x, position_ids, past, attention_mask=attention_mask, past_key_value=past_key_values,
            store_kv=kwargs.get("store_kv", False),
        )  # fmt: skip
        return CausalLMOutputWithPast(
            logits=self.logits(x, logits_to_keep), past_key_values=past_key_values if use_cache else None
        )


def plain(model: Any, ids: Tensor) -> Tensor:
    """Prefill of whole rows, each alone: the mask of the authors' sampler is [1, N, N]."""
    mask = block_causal(ids.shape[1], BLOCK)[None]
    where = torch.arange(ids.shape[1])[None]
    return torch.cat([model(row[None], attention_mask=mask, position_ids=where, use_cache=False).logits for row in ids])


def build(seed: int) -> Host:
    facts = Facts(
        kind="block", block=BLOCK, shifted=False, context=64, positions="argument", padding="pairs", plain=plain
    )
    return Host(filled(SDARForCausalLM(SDARConfig()), seed), facts)


FAMILIES = {"sdar": build}
