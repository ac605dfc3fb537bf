"""The Flux family, names from A to H: joint blocks, then single blocks."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor, nn

from tests.conformance.models.arguments import thousand, unit
from tests.conformance.small import Inputs, Small, normal, register

CHANNELS, TEXT, WIDTH, INNER = 4, 5, 32, 32


def tokens(size: int) -> int:
    return (16, 24)[size]


def packed(seed: int, size: int) -> Tensor:
    """(1, tokens, channels)."""
    return normal(seed, 1, tokens(size), CHANNELS)


def positions(size: int, axes: int) -> Inputs:
    """Coordinates of the text and of the image, one row per token."""
    image = torch.zeros(tokens(size), axes)
    image[:, -2], image[:, -1] = torch.arange(tokens(size)) // 4, torch.arange(tokens(size)) % 4
    return {"img_ids": image, "txt_ids": torch.zeros(TEXT, axes)}


def text(seed: int, size: int) -> Inputs:
    return {"encoder_hidden_states": normal(1000 + seed, 1, TEXT, WIDTH), **positions(size, 3)}


def pooled_text(seed: int, size: int) -> Inputs:
    return {**text(seed, size), "pooled_projections": normal(2000 + seed, 1, 8)}


def four_axes(seed: int, size: int) -> Inputs:
    return {"encoder_hidden_states": normal(1000 + seed, 1, TEXT, WIDTH), **positions(size, 4)}


def guided(seed: int, size: int) -> Inputs:
    return {**four_axes(seed, size), "guidance": torch.tensor([4.0])}


def layered_text(seed: int, size: int) -> Inputs:
    """Another layer of the text encoder for each of five blocks."""
    return {
        **text(seed, size),
        "text_encoder_layers": [normal(2000 + 10 * seed + i, 1, TEXT, 12) for i in range(5)],
    }


def controls(seed: int, size: int) -> Inputs:
    """What a ControlNet adds behind each joint and each single block."""
    return {
        "controlnet_block_samples": [normal(seed + i, 1, tokens(size), INNER) for i in range(2)],
        "controlnet_single_block_samples": [normal(seed + 10 + i, 1, tokens(size), INNER) for i in range(3)],
    }


def joint_controls(seed: int, size: int) -> Inputs:
    """Behind the joint blocks only: Bria's single blocks cannot take controls (the slice is off by the text's length)."""
    return {"controlnet_block_samples": controls(seed, size)["controlnet_block_samples"]}


def adapter(seed: int, size: int) -> Inputs:
    """Image prompts, already projected, for the IP-Adapter processors of the joint blocks."""
    return {"joint_attention_kwargs": {"ip_hidden_states": [normal(seed, 1, 4, 8)]}}


COMMON: dict[str, Any] = {
    "in_channels": CHANNELS,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
}


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(**COMMON, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8))


def flux_with_adapter() -> nn.Module:
    """A Flux whose joint blocks also attend to image prompts."""
    model = flux()
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(INNER, 8))
    return model


FLUX = register(
    Small("FluxTransformer2DModel", flux, pooled_text, packed, unit, injections={"controlnet": controls})
)
FLUX_WITH_ADAPTER = Small(
    "FluxTransformer2DModel with IP-Adapter",
    flux_with_adapter,
    lambda seed, size: pooled_text(seed, size) | adapter(0, size),
    packed,
    unit,
)
"""Not registered: the class is; used where adapters are asked about."""
register(
    Small(
        "BriaTransformer2DModel",
        lambda: diffusers.BriaTransformer2DModel(**COMMON, axes_dims_rope=[4, 4, 8]),
        text,
        packed,
        thousand,
        injections={"controlnet": joint_controls},
    )
)
register(
    Small(
        "BriaFiboTransformer2DModel",
        lambda: diffusers.BriaFiboTransformer2DModel(**COMMON, axes_dims_rope=[4, 4, 8], text_encoder_dim=12),
        layered_text,
        packed,
        thousand,
        heterogeneous="half of the text stream is replaced before each block",
    )
)
register(
    Small(
        "ChromaTransformer2DModel",
        lambda: diffusers.ChromaTransformer2DModel(
            **COMMON,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        text,
        packed,
        unit,
        injections={"controlnet": controls},
    )
)
register(
    Small(
        "Flux2Transformer2DModel",
        lambda: diffusers.Flux2Transformer2DModel(
            **COMMON, timestep_guidance_channels=16, mlp_ratio=2.0, axes_dims_rope=(4, 4, 4, 4)
        ),
        guided,
        packed,
        unit,
    )
)
register(
    Small(
        "Flux3Transformer2DModel",
        lambda: diffusers.Flux3Transformer2DModel(
            **COMMON,
            cond_in_channels=CHANNELS,
            timestep_channels=16,
            mlp_ratio=2.0,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        four_axes,
        packed,
        unit,
    )
)
