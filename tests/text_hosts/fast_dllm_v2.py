"""Fast-dLLM v2 (block diffusion over Qwen2.5), small.

Read: `modeling.py` of Efficient-Large-Model/Fast_dLLM_v2 as stored in a public copy (2025-10), and its block sampler.
Kept: module names, the forward's signature, `ALL_ATTENTION_FUNCTIONS["sdpa"]` whatever the config says, a block-causal
mask that the model makes itself from the order of the rows (`attention_mask` is not used, nor are position_ids for the
mask), `block_size`, `update_past_key_values`, the cache of the current block with `replace_position`, shifted logits,
and that `inputs_embeds` alone fails. Left out: training, sliding windows, the samplers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.text_hosts.decoder import Decoder, DecoderLM, begun, configured
from tests.text_hosts.facts import MASK, Facts, Host, filled
from tests.text_hosts.layers import heads, rotate

BLOCK = 8


class Fast_dLLM_QwenConfig(PreTrainedConfig):
    model_type = "Fast_dLLM_Qwen"

    def __init__(self, **kwargs: Any) -> None:
        own = {
            "architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": BLOCK, "mask_token_id": None
        }  # fmt: skip
        super().__init__(**configured(self, kwargs, **own))


class Fast_dLLM_QwenAttention(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        size, dim = config.hidden_size, config.head_dim
        self.config, self.layer_idx, self.head_dim, self.scaling = config, layer_idx, dim, dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        self.q_proj = nn.Linear(size, config.num_attention_heads * dim, bias=True)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * dim, bias=True)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * dim, bias=True)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, size, bias=False)

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Tensor | None,
        past_key_value: Any = None, update_past_key_values: bool = False, block_past_key_values: Any = None,
        replace_position: int | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        q, k, v = (heads(project(hidden_states), self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        if block_past_key_values is not None:
            if len(block_past_key_values) <= self.layer_idx:
                k, v = block_past_key_values.update(k, v, self.layer_idx)
            else:
                old = block_past_key_values.layers[self.layer_idx]
                rows = slice(replace_position, (replace_position or 0) + k.shape[2])
                old.keys[:, :, rows], old.values[:, :, rows] = k, v
                k, v = old.keys, old.values
        if past_key_value is not None:
            if update_past_key_values:
                k, v = past_key_value.update(k, v, self.layer_idx)
            elif len(past_key_value) > self.layer_idx:
                old = past_key_value.layers[self.layer_idx]
                k, v = torch.cat((old.keys, k), dim=-2), torch.cat((old.values, v), dim=-2)
        attended, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
            self, q, k, v, attention_mask, is_causal=False, dropout=0.0, scaling=self.scaling, sliding_window=None
        )
        return self.o_proj(attended.flatten(2))


class Fast_dLLM_QwenForCausalLM(DecoderLM):
    config_class = Fast_dLLM_QwenConfig
    _supports_attention_backend = True

    def __init__(self, config: Fast_dLLM_QwenConfig) -> None:
        super().__init__(config, Decoder(config, Fast_dLLM_QwenAttention))

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, use_cache: bool | None = None, cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0, update_past_key_values: bool = False, block_size: int = 32,
        use_block_cache: bool = False, block_past_key_values: Any = None, replace_position: int | None = None,
        mask_id: int = 151665, **kwargs: Any,
    ) -> Any:  # fmt: skip
        x = self.model.embedded(input_ids, inputs_embeds)
        past_key_values, past = begun(past_key_values, use_cache)
        block_past_key_values, inside = begun(block_past_key_values, use_block_cache)
        first = past + (replace_position or 0) if use_block_cache else past
        if use_block_cache and inside:
            mask = None
        else:
            mask = block_mask(input_ids.shape[1], block_size, past, x.device)  # type: ignore[union-attr]
        x = self.model.run(
            x, position_ids, first, attention_mask=mask, past_key_value=past_key_values,
            update_past_key_values=update_past_key_values, block_past_key_values=block_past_key_values,
            replace_position=replace_position,
        )  # fmt: skip
        found = CausalLMOutputWithPast(
            logits=self.logits(x, logits_to_keep), past_key_values=past_key_values if use_cache else None
        )
        found.block_past_key_values = block_past_key_values if use_block_cache else None
        return found


def block_mask(new: int, block: int, past: int, device: torch.device) -> Tensor:
    """[new, past + new] bool by the order of the rows."""
    query = torch.arange(past, past + new, device=device) // block
    return query[:, None] >= torch.arange(past + new, device=device)[None] // block


def plain(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False, block_size=BLOCK).logits


def build(seed: int) -> Host:
    facts = Facts(
        kind="block", block=BLOCK, shifted=True, context=64, positions="argument", padding="none", plain=plain,
        embeds=False, told={"mask_token_id": MASK},
    )  # fmt: skip
    return Host(filled(Fast_dLLM_QwenForCausalLM(Fast_dLLM_QwenConfig()), seed), facts)


FAMILIES = {"fast-dllm-v2": build}
