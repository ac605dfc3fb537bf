"""LLaDA 8B and 1.5 (OLMo-type), small.

Read: `modeling_llada.py` as carried by ZHZisZZ/dllm (ca17675, 2026-04; it uses the mask) and by NVlabs/Fast-dLLM
(24cc59e, 2025-06; as the first release on the hub it does not), `configuration_llada.py`.
Kept: names of config keys and modules, the forward's signature, no position_ids (rotary tables from 0 on the keys'
side), RoPE after the cache, lists of (k, v) as the cache, GQA by repeated heads, a head wider than the vocabulary, tied
heads, masks of keys turned into one additive bias, and the release that passes no mask to the attention at all.
Left out: ALiBi, block groups, other norms and activations, activation checkpointing, initialisation, flash-attention.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.text_hosts.facts import EOS, MASK, PAD, VOCAB, Facts, Host, filled
from tests.text_hosts.layers import RMSNorm, heads, shared


class LLaDAConfig(PreTrainedConfig):
    model_type = "llada"

    def __init__(self, use_cache: bool = False, masks: bool = True, **kwargs: Any) -> None:
        defaults = {
            "d_model": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "mlp_hidden_size": 48, "vocab_size": VOCAB,
            "embedding_size": 128, "max_sequence_length": 64, "rope": True, "rope_theta": 500_000.0,
            "rope_full_precision": True, "alibi": False, "flash_attention": False, "block_type": "llama",
            "block_group_size": 1, "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False,
            "scale_logits": False, "weight_tying": False, "mask_token_id": MASK, "eos_token_id": EOS,
            "pad_token_id": PAD, "architectures": ["LLaDAModelLM"],
        }  # fmt: skip
        super().__init__(**(defaults | kwargs))
        self.use_cache, self.masks = use_cache, masks


class RotaryEmbedding(nn.Module):
    """(q, k) -> rotated; positions count from 0 on the keys, and the queries are the last of them."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.tables: dict[str, Tensor] = {}

    def get_rotary_embedding(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if "rope_pos_sin" not in self.tables or self.tables["rope_pos_sin"].shape[-2] < length:
            dim = self.config.d_model // self.config.n_heads
            frequency = 1.0 / self.config.rope_theta ** (torch.arange(0, dim, 2, device=device).float() / dim)
            angle = torch.arange(length, device=device).float()[:, None] * frequency
            angle = torch.cat((angle, angle), dim=-1)[None, None]
            self.tables |= {"rope_pos_sin": angle.sin(), "rope_pos_cos": angle.cos()}
        return self.tables["rope_pos_sin"][:, :, :length], self.tables["rope_pos_cos"][:, :, :length]

    def apply_rotary_pos_emb(self, sin: Tensor, cos: Tensor, t: Tensor) -> Tensor:
        low, high = t.chunk(2, dim=-1)
        return (t * cos + torch.cat((-high, low), dim=-1) * sin).to(t.dtype)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        wide_q, wide_k = (q.float(), k.float()) if self.config.rope_full_precision else (q, k)
        queries, keys = q.shape[-2], k.shape[-2]
        sin, cos = (table.type_as(wide_q) for table in self.get_rotary_embedding(keys, q.device))
        wide_q = self.apply_rotary_pos_emb(sin[:, :, keys - queries :], cos[:, :, keys - queries :], wide_q)
        return wide_q.type_as(q), self.apply_rotary_pos_emb(sin, cos, wide_k).type_as(k)


class LLaDALlamaBlock(nn.Module):
    def __init__(self, layer_id: int, config: LLaDAConfig) -> None:
        super().__init__()
        size, bias = config.d_model, config.include_qkv_bias
        self.layer_id, self.config = layer_id, config
        self.head_dim = size // config.n_heads
        self.flash_attn_func = None
        self.attn_norm, self.ff_norm = RMSNorm(size), RMSNorm(size)
        self.rotary_emb = RotaryEmbedding(config)
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(size, config.n_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, config.n_kv_heads * self.head_dim, bias=bias)
        self.attn_out = nn.Linear(size, size, bias=False)
        self.ff_proj = nn.Linear(size, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(size, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, size, bias=False)

    def forward(
        self, x: Tensor, attention_bias: Tensor | None = None, layer_past: tuple[Tensor, Tensor] | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
        normed = self.attn_norm(x)
        q, k, v = (heads(project(normed), self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        if layer_past is not None:
            k, v = torch.cat((layer_past[0], k), dim=-2), torch.cat((layer_past[1], v), dim=-2)
        present = (k, v) if use_cache else None
        queries, keys = q.shape[-2], k.shape[-2]
        q, k = self.rotary_emb(q, k)
        if attention_bias is not None:
            attention_bias = attention_bias[:, :, keys - queries : keys, :keys].to(q.dtype)
        groups = self.config.n_heads // self.config.n_kv_heads
        if groups > 1:
            k, v = shared(k, groups), shared(v, groups)
        mask = attention_bias if self.config.masks else None
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(2))
        normed = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed)), present


class LLaDAModel(nn.Module):
    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embedding_size or config.vocab_size
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(width, config.d_model),
            "emb_drop": nn.Dropout(0.0),
            "ln_f": RMSNorm(config.d_model),
            "blocks": nn.ModuleList(LLaDALlamaBlock(number, config) for number in range(config.n_layers)),
        })
        if not config.weight_tying:
            self.transformer["ff_out"] = nn.Linear(config.d_model, width, bias=config.include_bias)

    def bias(
        self, mask: Tensor | None, bias: Tensor | None, past: int, new: int, device: torch.device
    ) -> Tensor | None:
        """One additive float bias [B or 1, 1, L, L] of what was asked for; None where nothing was."""
        lowest = torch.finfo(torch.float).min
        keys = None
        if mask is not None and 0.0 in mask:
            keys = (1.0 - mask.float().view(mask.shape[0], -1)[:, None, None, :]) * lowest
        if bias is None and keys is None and not past:
            return None
        length = past + new
        if bias is None:
            bias = torch.zeros(1, 1, length, length, device=device)
        elif bias.dtype in (torch.int8, torch.bool):
            bias = torch.zeros(bias.shape, device=device).masked_fill(bias == 0, lowest)
        length = keys.shape[-1] if keys is not None else length
        bias = bias[:, :, :length, :length].float()
        return bias if keys is None else (bias + keys).clamp_min(lowest)

    def forward(
        self, input_ids: Tensor | None = None, input_embeddings: Tensor | None = None,
        attention_mask: Tensor | None = None, attention_bias: Tensor | None = None,
        past_key_values: list[tuple[Tensor, Tensor]] | None = None, use_cache: bool = False,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]] | None]:  # fmt: skip
        x = self.transformer.wte(input_ids) if input_embeddings is None else input_embeddings
        past = past_key_values[0][0].shape[-2] if past_key_values else 0
        bias = self.bias(attention_mask, attention_bias, past, x.shape[1], x.device)
        x = self.transformer.emb_drop(x)
        kept: list[Any] | None = [] if use_cache else None
        for number, block in enumerate(self.transformer.blocks):
            layer_past = past_key_values[number] if past_key_values else None
            x, cache = block(x, attention_bias=bias, layer_past=layer_past, use_cache=use_cache)
            if kept is not None:
                kept.append(cache)
        x = self.transformer.ln_f(x)
        if self.config.weight_tying:
            return F.linear(x, self.transformer.wte.weight), kept
        return self.transformer.ff_out(x), kept


class LLaDAModelLM(PreTrainedModel):
    config_class = LLaDAConfig
    base_model_prefix = "model"

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None, attention_bias: Tensor | None = None,
        past_key_values: Any = None, labels: Tensor | None = None, use_cache: bool | None = None,
        output_attentions: bool | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None, cache_position: Any = None,
    ) -> Any:  # fmt: skip
        if output_attentions:
            raise ValueError("output_attentions is not yet supported in LLaDA")
        logits, kept = self.model.forward(
            input_ids=input_ids, input_embeddings=inputs_embeds, attention_mask=attention_mask,
            attention_bias=attention_bias, past_key_values=past_key_values,
            use_cache=self.config.use_cache if use_cache is None else use_cache,
        )  # fmt: skip
        if return_dict is False:
            return (logits, kept)
        return CausalLMOutputWithPast(logits=logits, past_key_values=kept)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer.wte if self.config.weight_tying else self.model.transformer.ff_out


def plain(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


def build(seed: int, masks: bool = True, **keys: Any) -> Host:
    """masks: the release whose attention is given the mask; otherwise it is dropped without a word."""
    facts = Facts(
        kind="full", shifted=False, context=64, positions="module", padding="keys" if masks else "none", plain=plain
    )
    return Host(filled(LLaDAModelLM(LLaDAConfig(masks=masks, **keys)), seed), facts)


FAMILIES = {
    "llada": build,
    "llada-unmasked": functools.partial(build, masks=False, n_kv_heads=2),
    "llada-tied": functools.partial(build, weight_tying=True, embedding_size=VOCAB, rope_full_precision=False),
}
