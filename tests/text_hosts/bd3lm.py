"""BD3-LM, small.

Read: `models/hf/modeling_bd3lm.py`, `configuration_bd3lm.py`, `models/dit.py`, `diffusion.py` of kuleshov-group/bd3lms
(1c3e8f4, 2025-07).
Kept: module names, the forward's signature (input_ids, timesteps, sample_mode, store_kv), the doubled [x_t; x_0] input
unless `sample_mode`, the block-causal mask as a slice of one made for `model_length`, its own cache of packed q, k, v
before RoPE, filled by `store_kv`, sliding when full; `time_conditioning`; torch's attention called by keyword with a
bool mask; raw logits, SUBS outside; the mask token is the last id. Left out: flex attention, dropout, autocast, hidden
states, models without adaptive norms. Differs: `reset_kv_cache` makes the cache on the model's device and in its dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from tests.text_hosts.dit import DDiTBlock, DDitFinalLayer, EmbeddingLayer, Rotary, TimestepEmbedder
from tests.text_hosts.facts import VOCAB, Facts, Host, filled

BLOCK, LENGTH = 4, 64


class BD3LMConfig(PreTrainedConfig):
    model_type = "bd3lm"

    def __init__(self, **kwargs: Any) -> None:
        own = {
            "block_size": BLOCK, "vocab_size": VOCAB, "model_length": LENGTH, "cross_attn": True, "adaln": True,
            "attn_backend": "sdpa", "causal": False, "hidden_dim": 32, "cond_dim": 16, "n_blocks": 2, "n_heads": 4,
            "dropout": 0.1, "time_conditioning": False, "var_min": True, "sampling_eps_min": 1e-3,
            "sampling_eps_max": 0.999, "architectures": ["BD3LM"],
        }  # fmt: skip
        super().__init__(**(own | kwargs))


def doubled_mask(length: int, block: int) -> Tensor:
    """[2n, 2n] bool for [x_t; x_0]: a noisy block reads itself and the clean blocks before; clean ones are
    block-causal."""
    place = torch.arange(2 * length)
    clean, number = place >= length, place % length // block
    q, k, q_clean, k_clean = number[:, None], number[None], clean[:, None], clean[None]
    return (q == k) & (q_clean == k_clean) | (q > k) & k_clean & ~q_clean | (q >= k) & k_clean & q_clean


class Block(DDiTBlock):
    def __init__(self, config: Any) -> None:
        super().__init__(config.hidden_dim, config.n_heads, config.cond_dim)
        self.n, self.block_size, self.causal = config.model_length, config.block_size, config.causal
        self.kv_cache: Tensor | None = None
        self.cache_idx = 0

    def cached(self, x: Tensor, store_kv: bool) -> Tensor:
        """Packed q, k, v of the cached tokens and these."""
        new = self.attn_qkv(x)
        if self.kv_cache is None:
            return new
        end = self.cache_idx + self.block_size
        self.kv_cache[:, self.cache_idx : end] = new
        packed = self.kv_cache[:, :end].clone()
        if store_kv:
            self.cache_idx = end
            if self.cache_idx >= self.n:
                self.cache_idx = self.n - self.block_size
                self.kv_cache[:, : -self.block_size] = self.kv_cache[:, self.block_size :].clone()
        return packed

    def forward(self, x: Tensor, rotary: Any, c: Tensor, mask: Any, sample_mode: bool, store_kv: bool) -> Tensor:
        modulation = self.modulation(c)
        normed = self.norm1(x) * (1 + modulation[1]) + modulation[0]
        if mask is not None and not sample_mode:
            halves = normed.split(mask.shape[-1] // 2, dim=1)
            qkv = torch.cat([self.packed(self.cached(half, False), rotary) for half in halves], dim=1)
        else:
            qkv = self.packed(self.cached(normed, store_kv), rotary)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            query=q, key=k, value=v, attn_mask=mask, is_causal=self.causal, scale=1 / math.sqrt(q.shape[-1])
        )
        attended = attended.transpose(1, 2).flatten(2)
        if self.kv_cache is not None:
            attended = attended[:, -self.block_size :]
        return self.finish(x, attended, modulation)


class DITBackbone(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.n, self.block_size = config, config.model_length, config.block_size
        self.vocab_embed = EmbeddingLayer(config.hidden_dim, config.vocab_size)
        self.sigma_map = TimestepEmbedder(config.cond_dim)
        self.rotary_emb = Rotary(config.hidden_dim // config.n_heads)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.output_layer = DDitFinalLayer(config.hidden_dim, config.vocab_size, config.cond_dim)
        if config.cross_attn:
            self.mask = doubled_mask(config.model_length, config.block_size)

    def forward(self, indices: Tensor, sigma: Tensor, sample_mode: Any = False, store_kv: Any = False) -> Tensor:
        if not self.config.time_conditioning:
            sigma = torch.zeros_like(sigma)
        x = self.vocab_embed(indices)
        c = F.silu(self.sigma_map(sigma))
        mask, first = None, self.blocks[0]
        if not self.config.cross_attn:
            rotary = self.rotary_emb(x)
        elif not sample_mode:
            mask, rotary = self.mask, self.rotary_emb(x[:, : self.n])
        elif first.kv_cache is not None:
            rotary = self.rotary_emb(x.new_zeros(x.shape[0], first.cache_idx + self.block_size, x.shape[2]))
        else:
            rotary = self.rotary_emb(x[:, : self.n])
            mask = self.mask[self.n : self.n + x.shape[1], self.n : self.n + x.shape[1]]
        for block in self.blocks:
            x = block(x, rotary, c, mask, bool(sample_mode), bool(store_kv))
        logits = self.output_layer(x, c)
        return logits[:, : self.n] if self.config.cross_attn and not sample_mode else logits


class BD3LM(PreTrainedModel):
    config_class = BD3LMConfig
    base_model_prefix = "bd3lm"

    def __init__(self, config: BD3LMConfig) -> None:
        super().__init__(config)
        self.backbone = DITBackbone(config)
        self.post_init()

    def reset_kv_cache(self, eval_batch_size: int = 1) -> None:
        for block in self.backbone.blocks:
            weight = block.attn_qkv.weight
            block.kv_cache = weight.new_zeros(eval_batch_size, self.config.model_length, weight.shape[0])
            block.cache_idx = 0

    def forward(
        self, input_ids: Tensor | None = None, timesteps: Tensor | None = None, sample_mode: bool | None = None,
        store_kv: bool | None = None, output_hidden_states: bool | None = None, return_dict: bool | None = None,
    ) -> Any:  # fmt: skip
        assert not sample_mode or self.config.attn_backend == "sdpa", "Sampling only supported with SDPA"
        logits = self.backbone(input_ids, timesteps, sample_mode, store_kv)
        return logits if return_dict is False else MaskedLMOutput(logits=logits)


def plain(model: Any, ids: Tensor) -> Tensor:
    return model(ids, torch.zeros(ids.shape[0]), sample_mode=True).logits


def build(seed: int) -> Host:
    facts = Facts(
        kind="block", block=BLOCK, shifted=False, context=LENGTH, positions="module", padding="none", plain=plain,
        embeds=False, pad=None,
    )  # fmt: skip
    return Host(filled(BD3LM(BD3LMConfig()), seed), facts)


FAMILIES = {"bd3lm": build}
