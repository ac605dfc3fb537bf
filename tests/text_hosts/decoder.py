"""The skeleton that Dream, SDAR, Fast-dLLM v2, LLaDA-MoE and LLaDA2 share: layers of attention and MLP over rotary
positions.

A family brings its attention, its MLP and the signature of its forward; everything else it is given goes to the
attention as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from tests.text_hosts.facts import EOS, MASK, PAD, VOCAB
from tests.text_hosts.layers import GatedMLP, RMSNorm, Rotary

SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0, "tie_word_embeddings": False, "mask_token_id": MASK, "eos_token_id": EOS,
    "pad_token_id": PAD,
}  # fmt: skip


def configured(config: PreTrainedConfig, given: dict[str, Any], **own: Any) -> dict[str, Any]:
    """Keys of a small config: the common ones, the family's own, what the caller gave."""
    assert type(config).model_type
    return SMALL | {"head_dim": 8, "rope_theta": 10_000.0} | own | given


class DecoderLayer(nn.Module):
    """name: what the attention is called. Whatever else forward is given reaches the attention."""

    def __init__(self, config: Any, attention: nn.Module, mlp: nn.Module, name: str = "self_attn") -> None:
        super().__init__()
        self.add_module(name, attention)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.name = name

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + getattr(self, self.name)(self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Decoder(nn.Module):
    """attention, mlp: (config, layer) -> module; without mlp, a gated one. name, embed: what the attention and the
    embedding are called. turned: how many of a head's dimensions are rotated, all by default."""

    def __init__(
        self, config: Any, attention: Any, mlp: Any = None, name: str = "self_attn", embed: str = "embed_tokens",
        turned: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.embed = config, embed
        self.add_module(embed, nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id))
        mlp = mlp or (lambda config, _: GatedMLP(config.hidden_size, config.intermediate_size))
        self.layers = nn.ModuleList(
            DecoderLayer(config, attention(config, number), mlp(config, number), name)
            for number in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size)
        self.rotary_emb = Rotary(turned or config.head_dim, config.rope_theta)

    def embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        made: Tensor = getattr(self, self.embed)(input_ids) if inputs_embeds is None else inputs_embeds
        return made

    def run(self, x: Tensor, position_ids: Tensor | None, past: int = 0, **kwargs: Any) -> Tensor:
        """Hidden states after the last norm. position_ids None: counted from `past`."""
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        kwargs["position_embeddings"] = self.rotary_emb(x, position_ids)
        for layer in self.layers:
            x = layer(x, **kwargs)
        return self.norm(x)


class DecoderLM(PreTrainedModel):
    """A decoder under a linear head. A family gives `config_class`, the decoder, and a forward with its own signature."""

    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: Any, decoder: Decoder) -> None:
        super().__init__(config)
        self.model = decoder
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self.model, self.model.embed)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def logits(self, x: Tensor, keep: int | Tensor = 0) -> Tensor:
        """Of the last `keep` tokens (0: of all), or of those at these indices."""
        return self.lm_head(x[:, -keep:] if isinstance(keep, int) else x[:, keep])


def begun(cache: Any, wanted: bool | None) -> tuple[Any, int]:
    """The cache that a forward goes on with, made where it is wanted and there is none; and the tokens in it."""
    if wanted and cache is None:
        cache = DynamicCache()
    return cache, 0 if cache is None else cache.get_seq_length()


def dispatched(gate: Callable[[Tensor], tuple[Tensor, Tensor]], experts: nn.ModuleList, x: Tensor) -> Tensor:
    """Each token through its experts. gate(tokens [T, C]) -> (experts [T, k], weights [T, k]); x [B, N, C]."""
    tokens = x.flatten(0, 1)
    chosen, weights = gate(tokens)
    out = torch.zeros_like(tokens)
    for number, expert in enumerate(experts):
        row, slot = torch.where(chosen == number)
        out = out.index_add(0, row, expert(tokens[row]) * weights[row, slot, None].to(x.dtype))
    return out.view_as(x)
