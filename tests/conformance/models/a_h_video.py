"""Video (and audio) transformers whose names start with A to H."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.conformance.models.arguments import thousand, unit
from tests.conformance.small import Inputs, Small, normal, register

CHANNELS, FRAMES, TEXT, WIDTH = 4, 2, 5, 16
"""Latent channels and frames, text tokens and their width, unless a class asks for others."""


def side(size: int) -> int:
    """Height and width of the latents."""
    return (8, 12)[size]


def clip(seed: int, size: int) -> Tensor:
    """(1, channels, frames, height, width)."""
    return normal(seed, 1, CHANNELS, FRAMES, side(size), side(size))


def frames_first(seed: int, size: int) -> Tensor:
    """(1, frames, channels, height, width)."""
    return normal(seed, 1, FRAMES, CHANNELS, side(size), side(size))


def text(seed: int, size: int) -> Inputs:
    return {"encoder_hidden_states": normal(1000 + seed, 1, TEXT, WIDTH)}


def per_frame(t: float) -> Tensor:
    return torch.full((1, FRAMES), 1000 * t)


WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": WIDTH,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 3,
}

COGVIDEO: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embed_dim": 8,
    "text_embed_dim": WIDTH,
    "num_layers": 3,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "max_text_seq_length": TEXT,
}

HUNYUAN: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": WIDTH,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}


def sound(seed: int, size: int) -> Tensor:
    return normal(seed, 1, (12, 16)[size], 8)


def sound_conditions(seed: int, size: int) -> Inputs:
    return {
        "timestep_r": torch.zeros(1),
        "encoder_hidden_states": normal(1000 + seed, 1, TEXT, WIDTH),
        "context_latents": normal(7, 1, (12, 16)[size], 16),
    }


def masked_text(seed: int, size: int) -> Inputs:
    """Text of which the last token is padding, its pooled form, and the embedded guidance."""
    mask = torch.ones(1, TEXT)
    mask[:, -1] = 0
    return {
        **text(seed, size),
        "encoder_attention_mask": mask,
        "pooled_projections": normal(2000 + seed, 1, 8),
        "guidance": torch.tensor([6000.0]),
    }


def framepack(seed: int, size: int) -> Inputs:
    """As `masked_text`, with an image and three histories at falling resolution."""
    wide = side(size)
    return {
        **masked_text(seed, size),
        "image_embeds": normal(3000, 1, 3, 8),
        "indices_latents": torch.arange(10, 10 + FRAMES),
        "latents_clean": normal(3001, 1, CHANNELS, 2, wide, wide),
        "indices_latents_clean": torch.tensor([0, 9]),
        "latents_history_2x": normal(3002, 1, CHANNELS, 2, wide, wide),
        "indices_latents_history_2x": torch.tensor([5, 6]),
        "latents_history_4x": normal(3003, 1, CHANNELS, 4, wide, wide),
        "indices_latents_history_4x": torch.tensor([1, 2, 3, 4]),
    }


def two_texts_and_image(seed: int, size: int) -> Inputs:
    return {
        **text(seed, size),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "encoder_hidden_states_2": normal(2000 + seed, 1, 4, 12),
        "encoder_attention_mask_2": torch.ones(1, 4),
        "image_embeds": normal(3000, 1, 3, 8),
    }


def with_history(seed: int, size: int) -> Inputs:
    return {
        **text(seed, size),
        "indices_hidden_states": torch.arange(1, 1 + FRAMES).unsqueeze(0),
        "latents_history_short": normal(3000, 1, CHANNELS, 1, side(size), side(size)),
        "indices_latents_history_short": torch.zeros(1, 1, dtype=torch.long),
    }


def cosmos_controls(seed: int, size: int) -> Inputs:
    """One residual per block, as `CosmosControlNetModel` returns them."""
    tokens = FRAMES * (side(size) // 2) ** 2
    return {"block_controlnet_hidden_states": [normal(seed + i, 1, tokens, 32) for i in range(3)]}


def face(seed: int, size: int) -> Inputs:
    """A face embedding and the features of five layers of a vision tower."""
    return {
        "encoder_hidden_states": normal(1000 + seed, 1, TEXT, WIDTH),
        "id_cond": normal(3000, 1, 12),
        "id_vit_hidden": [normal(3001 + i, 1, 3, 8) for i in range(2)],
    }


register(
    Small(
        "AceStepTransformer1DModel",
        lambda: diffusers.AceStepTransformer1DModel(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            in_channels=24,
            audio_acoustic_hidden_dim=8,
            sliding_window=4,
            encoder_hidden_size=WIDTH,
        ),
        sound_conditions,
        sound,
        unit,
    )
)
register(
    Small(
        "AllegroTransformer3DModel",
        lambda: diffusers.AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=3,
            cross_attention_dim=24,
            sample_height=8,
            sample_width=8,
            sample_frames=FRAMES,
            caption_channels=WIDTH,
        ),
        text,
        clip,
        thousand,
        flow=False,
    )
)
register(
    Small(
        "AnyFlowTransformer3DModel",
        lambda: diffusers.AnyFlowTransformer3DModel(**WAN, rope_max_seq_len=32),
        lambda seed, size: {**text(seed, size), "r_timestep": torch.zeros(1, FRAMES)},
        frames_first,
        per_frame,
    )
)
register(
    Small(
        "AnyFlowFARTransformer3DModel",
        lambda: diffusers.AnyFlowFARTransformer3DModel(**WAN, rope_max_seq_len=32, chunk_partition=(1, 1)),
        lambda seed, size: {
            **text(seed, size),
            "r_timestep": torch.zeros(1, FRAMES),
            "chunk_partition": [1, 1],
        },
        frames_first,
        per_frame,
    )
)
register(
    Small(
        "ChronoEditTransformer3DModel",
        lambda: diffusers.ChronoEditTransformer3DModel(**WAN, rope_max_seq_len=32, rope_temporal_skip_len=2),
        text,
        clip,
        thousand,
    )
)
register(
    Small(
        "CogVideoXTransformer3DModel",
        lambda: diffusers.CogVideoXTransformer3DModel(**COGVIDEO),
        text,
        frames_first,
        thousand,
        flow=False,
    )
)
register(
    Small(
        "ConsisIDTransformer3DModel",
        lambda: diffusers.ConsisIDTransformer3DModel(
            **{**COGVIDEO, "attention_head_dim": 24, "num_layers": 4},
            is_train_face=True,
            cross_attn_interval=2,
            cross_attn_dim_head=8,
            cross_attn_num_heads=2,
            LFE_id_dim=12,
            LFE_vit_dim=8,
            LFE_depth=2,
            LFE_dim_head=8,
            LFE_num_heads=2,
            LFE_num_id_token=2,
            LFE_num_querie=3,
            LFE_output_dim=32,
            LFE_ff_mult=2,
            LFE_num_scale=2,
        ),
        face,
        frames_first,
        thousand,
        flow=False,
        heterogeneous="faces are attended to between the blocks",
    )
)
register(
    Small(
        "CosmosTransformer3DModel",
        lambda: diffusers.CosmosTransformer3DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=3,
            mlp_ratio=2.0,
            text_embed_dim=WIDTH,
            adaln_lora_dim=4,
            max_size=(4, 16, 16),
            controlnet_block_every_n=1,
            concat_padding_mask=False,
        ),
        text,
        clip,
        unit,
        injections={"controlnet": cosmos_controls},
    )
)
register(
    Small(
        "EasyAnimateTransformer3DModel",
        lambda: diffusers.EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            patch_size=2,
            sample_width=8,
            sample_height=8,
            num_layers=4,
            mmdit_layers=2,
            time_embed_dim=8,
            text_embed_dim=WIDTH,
        ),
        text,
        clip,
        thousand,
    )
)
register(
    Small(
        "HeliosTransformer3DModel",
        lambda: diffusers.HeliosTransformer3DModel(**WAN, rope_dim=(4, 4, 4)),
        with_history,
        clip,
        thousand,
    )
)
register(
    Small(
        "HunyuanVideoTransformer3DModel",
        lambda: diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN),
        masked_text,
        clip,
        thousand,
    )
)
register(
    Small(
        "HunyuanVideoFramepackTransformer3DModel",
        lambda: diffusers.HunyuanVideoFramepackTransformer3DModel(
            **HUNYUAN, has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True
        ),
        framepack,
        clip,
        thousand,
    )
)
register(
    Small(
        "HunyuanVideo15Transformer3DModel",
        lambda: diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=3,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=WIDTH,
            text_embed_2_dim=12,
            image_embed_dim=8,
            rope_axes_dim=(4, 6, 6),
        ),
        two_texts_and_image,
        clip,
        thousand,
    )
)
