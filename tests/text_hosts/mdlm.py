"""MDLM, small, with torch's attention and with that of a package.

Read: `models/dit.py` and `diffusion.py` of kuleshov-group/mdlm (c112c52, 2025-09), and public copies of the hub's
`modeling_mdlm.py` (2025), with flash-attn and with torch's attention.
Kept: module names, the forward's signature (input_ids, timesteps) without any mask or positions, the embedding as a
bare parameter, `time_conditioning` (False: the noise level is set to zero), raw logits: the SUBS parameterisation
(never the mask token, known tokens copied) is done outside. The mask token is the last id (50257, after GPT-2's
vocabulary) and is in no config. Left out: dropout, autocast to bfloat16, outputs of hidden states.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from tests.text_hosts.dit import DDiTBlock, DDitFinalLayer, EmbeddingLayer, Rotary, TimestepEmbedder
from tests.text_hosts.facts import VOCAB, Facts, Host, filled
from tests.text_hosts.layers import dense_attention


class MDLMConfig(PreTrainedConfig):
    model_type = "mdlm"

    def __init__(self, flash: bool = False, **kwargs: Any) -> None:
        own = {
            "vocab_size": VOCAB, "model_length": 64, "hidden_dim": 32, "cond_dim": 16, "n_blocks": 2, "n_heads": 4,
            "dropout": 0.1, "time_conditioning": False, "architectures": ["MDLM"],
        }  # fmt: skip
        super().__init__(**(own | kwargs))
        self.flash = flash


class Block(DDiTBlock):
    def forward(self, x: Tensor, rotary: Any, c: Tensor, flash: bool) -> Tensor:
        modulation = self.modulation(c)
        qkv = self.packed(self.attn_qkv(self.norm1(x) * (1 + modulation[1]) + modulation[0]), rotary)
        attend = dense_attention if flash else F.scaled_dot_product_attention
        attended = attend(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        return self.finish(x, attended, modulation)


class DITBackbone(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.vocab_embed = EmbeddingLayer(config.hidden_dim, config.vocab_size)
        self.sigma_map = TimestepEmbedder(config.cond_dim)
        self.rotary_emb = Rotary(config.hidden_dim // config.n_heads)
        sizes = (config.hidden_dim, config.n_heads, config.cond_dim)
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(config.n_blocks))
        self.output_layer = DDitFinalLayer(config.hidden_dim, config.vocab_size, config.cond_dim)

    def forward(self, indices: Tensor, sigma: Tensor) -> Tensor:
        if not self.config.time_conditioning:
            sigma = torch.zeros_like(sigma)
        x = self.vocab_embed(indices)
        c = F.silu(self.sigma_map(sigma))
        rotary = self.rotary_emb(x)
        for block in self.blocks:
            x = block(x, rotary, c, self.config.flash)
        return self.output_layer(x, c)


class MDLM(PreTrainedModel):
    config_class = MDLMConfig
    base_model_prefix = "mdlm"

    def __init__(self, config: MDLMConfig) -> None:
        super().__init__(config)
        self.backbone = DITBackbone(config)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, timesteps: Tensor | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None,
    ) -> Any:  # fmt: skip
        logits = self.backbone(input_ids, timesteps)
        return logits if return_dict is False else MaskedLMOutput(logits=logits)


def plain(model: Any, ids: Tensor) -> Tensor:
    return model(ids, torch.zeros(ids.shape[0])).logits


def build(seed: int, flash: bool = False) -> Host:
    facts = Facts(
        kind="full", shifted=False, context=64, positions="module", padding="none", plain=plain, tapped=not flash,
        embeds=False, pad=None,
    )  # fmt: skip
    return Host(filled(MDLM(MDLMConfig(flash=flash)), seed), facts)


FAMILIES = {"mdlm": build, "mdlm-flash": functools.partial(build, flash=True)}
