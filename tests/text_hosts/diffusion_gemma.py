"""DiffusionGemma, small: the installed class of transformers.

Read: `models/diffusion_gemma` of transformers 5.23. Kept: all of it, at tiny sizes, with one sliding and one full
layer, a mixture of experts and the smallest vision tower. Left out: pictures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.text_hosts.facts import Facts, Host, filled

CANVAS = 8


def plain(model: Any, ids: Tensor) -> Tensor:
    """The first evaluation of a canvas behind a prompt: all but the last `CANVAS` tokens are the prompt."""
    return model(input_ids=ids[:, :-CANVAS], decoder_input_ids=ids[:, -CANVAS:]).logits


def build(seed: int) -> Host:
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    text = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "sliding_window": 16, "num_experts": 4,
        "top_k_experts": 2, "moe_intermediate_size": 16, "max_position_embeddings": 128, "eos_token_id": 94,
        "pad_token_id": 93, "bos_token_id": 92, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16, "patch_size": 4,
    }  # fmt: skip
    config = DiffusionGemmaConfig(
        text_config=text, vision_config={"model_type": "gemma4_vision", **vision}, canvas_length=CANVAS,
        boi_token_id=89, eoi_token_id=90, image_token_id=91,
    )  # fmt: skip
    torch.manual_seed(seed)
    facts = Facts(
        kind="block", block=CANVAS, shifted=False, context=128, positions="argument", padding="keys", plain=plain,
        tapped=False, embeds=False, mask=-1, pad=93,
    )  # fmt: skip
    return Host(filled(DiffusionGemmaForBlockDiffusion(config), seed), facts)


FAMILIES = {"diffusion-gemma": build}
