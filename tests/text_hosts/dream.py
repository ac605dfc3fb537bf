"""Dream 7B, small, as released and as patched by Fast-dLLM v1.

Read: `modeling_dream.py`, `configuration_dream.py` of ZHZisZZ/dllm (ca17675, 2026-04) and NVlabs/Fast-dLLM (24cc59e,
2025-06). Kept: module names, the forward's signature, `attention_mask` as "full", None, 2-D (made [B, 1, L, L]) or 4-D,
position_ids, `num_logits_to_keep`, a rotary module in the model and one in every layer, shifted logits; in the patched
release the cache of keys before RoPE as lists of [B, L, C], `dual_cache` and `replace_position`, and that position_ids
are not used. Left out: flash-attention, eager attention, outputs of hidden states, loss, Dream's own sampler.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_outputs import MaskedLMOutput

from tests.text_hosts.decoder import Decoder, DecoderLM, configured
from tests.text_hosts.facts import Facts, Host, filled
from tests.text_hosts.layers import Rotary, heads, rotate, shared


class DreamConfig(PreTrainedConfig):
    model_type = "Dream"

    def __init__(self, patched: bool = False, **kwargs: Any) -> None:
        super().__init__(**configured(self, kwargs, architectures=["DreamModel"]))
        self.patched = patched


class DreamSdpaAttention(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        size, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.config, self.layer_idx, self.head_dim, self.is_causal = config, layer_idx, config.head_dim, False
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(size, size), nn.Linear(size, kv), nn.Linear(size, kv)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.rotary_emb = Rotary(config.head_dim, config.rope_theta)

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, past_key_value: Any = None,
        position_embeddings: Any = None, dual_cache: bool = False, replace_position: Tensor | None = None,
        kept: list[tuple[Tensor, Tensor]] | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        q, k, v = (project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj))
        end = None
        if past_key_value is not None and self.config.patched:
            old_k, old_v = past_key_value[self.layer_idx]
            if dual_cache and replace_position is not None:
                rows = replace_position.nonzero(as_tuple=True)[1]
                old_k[:, rows], old_v[:, rows] = k, v
                k, v, end = old_k, old_v, int(rows.max()) + 1
            else:
                k, v = torch.cat((old_k, k), dim=1), torch.cat((old_v, v), dim=1)
        if kept is not None:
            kept.append((k, v))
        q, k, v = (heads(x, self.head_dim) for x in (q, k, v))
        cos, sin = position_embeddings
        end = k.shape[2] if end is None else end
        start = end - q.shape[2]
        q = rotate(q, cos[:, start:end], sin[:, start:end])
        k = rotate(k, cos, sin)
        if past_key_value is not None and not self.config.patched:
            k, v = past_key_value.update(k, v, self.layer_idx)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        mask = attention_mask if isinstance(attention_mask, Tensor) else None
        attended = F.scaled_dot_product_attention(
            q, shared(k, groups), shared(v, groups), attn_mask=mask, dropout_p=0.0, is_causal=False
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class DreamModel(DecoderLM):
    config_class = DreamConfig

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config, Decoder(config, DreamSdpaAttention))

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Any = None, position_ids: Tensor | None = None,
        past_key_values: Any = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None,
        cache_position: Tensor | None = None, num_logits_to_keep: int = 0, **loss_kwargs: Any,
    ) -> Any:  # fmt: skip
        x = self.model.embedded(input_ids, inputs_embeds)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        x = self.model.run(
            x, position_ids, past, attention_mask=as_pairs(attention_mask), past_key_value=past_key_values
        )
        return MaskedLMOutput(logits=self.logits(x, num_logits_to_keep))


class PatchedDreamModel(DreamModel):
    """Fast-dLLM v1's. The class on the hub is called DreamModel, too."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor | None = None, attention_mask: Any = None, position_ids: Tensor | None = None,
        past_key_values: Any = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None,
        cache_position: Tensor | None = None, num_logits_to_keep: int = 0, dual_cache: bool = False,
        replace_position: Tensor | None = None, **loss_kwargs: Any,
    ) -> Any:  # fmt: skip
        x = self.model.embedded(input_ids, inputs_embeds)
        past = past_key_values[0][0].shape[1] if past_key_values is not None else 0
        length = past if dual_cache and past else past + x.shape[1]
        kept: list[tuple[Tensor, Tensor]] | None = [] if use_cache else None
        x = self.model.run(
            x, torch.arange(length, device=x.device)[None], attention_mask=attention_mask,
            past_key_value=past_key_values, dual_cache=dual_cache, replace_position=replace_position, kept=kept,
        )  # fmt: skip
        found = MaskedLMOutput(logits=self.logits(x, num_logits_to_keep))
        found.past_key_values = kept
        return found


PatchedDreamModel.__name__ = PatchedDreamModel.__qualname__ = "DreamModel"


def as_pairs(mask: Any) -> Any:
    """What the released forward makes of `attention_mask`: "full", None, or a bool mask of queries by keys."""
    if not isinstance(mask, Tensor):
        if mask is None or mask == "full":
            return mask
        raise TypeError(f"Unsupported attention_mask type: {type(mask)}")
    if not torch.any(mask == 0.0):
        return "full"
    if mask.dim() == 2:
        return torch.logical_and(mask[:, None, None, :], mask[:, None, :, None])
    return mask.bool()


def plain(model: Any, ids: Tensor) -> Tensor:
    return model(ids, "full").logits


def build(seed: int, patched: bool = False) -> Host:
    facts = Facts(
        kind="full", shifted=True, context=64, positions="lost" if patched else "argument",
        padding="none" if patched else "keys", plain=plain,
    )  # fmt: skip
    kind = PatchedDreamModel if patched else DreamModel
    return Host(filled(kind(DreamConfig(patched=patched)), seed), facts)


FAMILIES = {"dream": build, "dream-fast-dllm": functools.partial(build, patched=True)}
