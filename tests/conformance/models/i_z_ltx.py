"""The family of LTX, and other transformers that denoise video together with sound."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import (
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MiniMaxH3Transformer3DModel,
)
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2RefinerTransformer3DModel

from tests.conformance.models import arguments
from tests.conformance.models.arguments import GRIDS, TEXT, tokens
from tests.conformance.small import Inputs, Small, normal, register


def ltx_grid(size: int) -> Inputs:
    return {"num_frames": 2, "height": GRIDS[size][0], "width": GRIDS[size][1]}


register(
    Small(
        "LTXVideoTransformer3DModel",
        build=lambda: LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=3,
            caption_channels=16,
        ),
        inputs=lambda seed, size: {
            **arguments.prompt(seed),
            "encoder_attention_mask": arguments.everything(),
            **ltx_grid(size),
        },
        sample=lambda seed, size: arguments.packed(4, seed, size, frames=2),
        timestep=arguments.thousand,
    )
)

LTX2: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 3,
    "caption_channels": 16,
    "rope_double_precision": False,
}


def ltx2(seed: int, size: int) -> Inputs:
    """The sound stands still here; it has its own prompt."""
    return {
        **arguments.prompt(seed),
        "audio_hidden_states": normal(60, 1, 3, 4),
        "audio_encoder_hidden_states": normal(seed + 100, 1, TEXT, 16),
        "audio_num_frames": 3,
        **ltx_grid(size),
    }


register(
    Small(
        "LTX2VideoTransformer3DModel",
        build=lambda: LTX2VideoTransformer3DModel(**LTX2),
        inputs=ltx2,
        sample=lambda seed, size: arguments.packed(4, seed, size, frames=2),
        timestep=arguments.thousand,
        injections={"isolated": lambda seed, size: {"isolate_modalities": True}},
    )
)


@functools.cache
def rotations(size: int) -> Any:
    """Cosines and sines for two frames, which the refiner's pipeline asks the network for."""
    model = SanaWMLTX2RefinerTransformer3DModel(**LTX2)
    return model.build_rotary_emb_for_absolute_positions(1, [0, 1], *GRIDS[size], torch.device("cpu"), 24.0)


def refiner(seed: int, size: int) -> Inputs:
    return {
        **arguments.prompt(seed),
        "encoder_attention_mask": arguments.everything(),
        "video_rotary_emb": rotations(size),
    }


register(
    Small(
        "SanaWMLTX2RefinerTransformer3DModel",
        build=lambda: SanaWMLTX2RefinerTransformer3DModel(**LTX2),
        inputs=refiner,
        sample=lambda seed, size: arguments.packed(4, seed, size, frames=2),
        timestep=arguments.thousand,
    )
)


def minimax(seed: int, size: int) -> Inputs:
    """One sequence of text, video and sound; tag and time are given for every token."""
    parts = (TEXT, tokens(size), 3)
    order = torch.arange(sum(parts))
    words, pixels, notes = order.split(parts)
    return {
        **arguments.prompt(seed),
        "audio_hidden_states": normal(60, 1, 3, 4),
        "timestep_indices": torch.zeros_like(order),
        "token_tags": torch.repeat_interleave(torch.arange(3), torch.tensor(parts)),
        "position_ids": order[:, None].expand(-1, 3),
        "text_indices": words,
        "video_indices": pixels,
        "audio_indices": notes,
    }


register(
    Small(
        "MiniMaxH3Transformer3DModel",
        build=lambda: MiniMaxH3Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            hidden_size=24,
            num_layers=3,
            num_refiner_layers=2,
            ffn_dim=32,
            in_channels=4,
            audio_in_channels=4,
            text_dim=16,
            freq_dim=16,
            time_embed_hidden_dim=24,
            time_embed_dim=16,
            rope_freq_dim=2,
        ),
        inputs=minimax,
        sample=lambda seed, size: arguments.packed(16, seed, size),
        timestep=arguments.unit,
    )
)
