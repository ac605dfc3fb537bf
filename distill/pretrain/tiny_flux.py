"""Builds the parts of a tiny FLUX.1: an ordinary `FluxPipeline` that draws images with joint attention.

The transformer has double-stream blocks (image and text with weights of their own, one attention over both) and then
single-stream blocks, as in SD3 (https://arxiv.org/abs/2403.03206) and FLUX.1. Two frozen random text encoders: T5
for the tokens, CLIP's pooled vector for the modulation. Guidance is not embedded: that would need a trained teacher
to distil from. The prompt is dropped now and then in training instead, and `true_cfg_scale` guides at sampling with
two branches.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from hasten.distill.pretrain import tiny
from hasten.distill.pretrain.config import DenoiserConfig, PretrainConfig, TextConfig

_diffusers: Any = diffusers  # most of its constructors carry no types


class TextEncoders(NamedTuple):
    """CLIP for the pooled vector, T5 for the tokens; both read the same word-level ids."""

    clip: Any
    t5: Any


def build_text_encoders(config: TextConfig) -> TextEncoders:
    """Both encoders, frozen and random: one-layer T5 as in tiny-image, and a CLIP of the same width."""
    import transformers

    library: Any = transformers
    clip = library.CLIPTextModel(
        library.CLIPTextConfig(
            vocab_size=len(tiny.vocabulary()),
            hidden_size=config.dim,
            projection_dim=config.dim,
            intermediate_size=2 * config.dim,
            num_hidden_layers=config.layers,
            num_attention_heads=2,
            max_position_embeddings=config.length,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,  # where the pooled vector is read; 2 would ask for the largest id of the row instead
        )
    )
    return TextEncoders(clip.eval().requires_grad_(False), tiny.build_text_encoder("image", config))


@torch.no_grad()
def encode_ids(encoders: TextEncoders, ids: Tensor) -> tuple[Tensor, Tensor]:
    """T5 states (n, length, dim) and CLIP's pooled vectors (n, dim) of ids (n, length).

    No padding mask: FluxPipeline passes none, so the padding is read there too.
    """
    return encoders.t5(ids).last_hidden_state, encoders.clip(ids).pooler_output


def build_transformer(config: DenoiserConfig, latents: int, text_dim: int) -> Any:
    """`layers` double-stream and `joint.single` single-stream blocks on 2x2 patches of `latents` channels."""
    assert config.joint is not None
    return _diffusers.FluxTransformer2DModel(
        patch_size=1,  # the pipeline packs 2x2 patches into channels
        in_channels=latents * config.patch**2,
        num_layers=config.layers,
        num_single_layers=config.joint.single,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=text_dim,
        pooled_projection_dim=text_dim,
        guidance_embeds=False,
        axes_dims_rope=config.joint.rope,
    )


def build_scheduler(shift: float) -> Any:
    """Flow matching as FLUX.1-dev has it, its shift exp(mu) at every resolution equal to `shift`.

    FluxPipeline passes mu to every scheduler, and diffusers' multistep solvers take it only when the shift is
    dynamic: with a static one, the control that swaps the solver would fail.
    """
    mu = math.log(shift)
    return _diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=mu, max_shift=mu)


def assemble(config: PretrainConfig, *, vae: Any, denoiser: Any, text_encoder: TextEncoders) -> Any:
    """The pipeline made of the parts, ready to be called or saved."""
    length = config.text.length
    return _diffusers.FluxPipeline(
        scheduler=build_scheduler(config.denoiser.shift),
        vae=vae,
        text_encoder=text_encoder.clip,
        tokenizer=tiny.build_tokenizer(length),  # the pipeline pads CLIP's ids to this length
        text_encoder_2=text_encoder.t5,
        tokenizer_2=tiny.build_tokenizer(length),
        transformer=denoiser,
    )


def velocity(forward: Any, noisy: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    """The transformer's velocity for latents (n, C, H, W) at noise level sigma (n,) in (0, 1), as (n, C, H, W)."""
    height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
    packed: Tensor = forward(
        hidden_states=pack(noisy),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=sigma,
        img_ids=positions(height, width, noisy.device),
        txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device),
        return_dict=False,
    )[0]
    return unpack(packed, height, width)


def pack(latents: Tensor) -> Tensor:
    """(n, C, 2h, 2w) -> (n, h w, 4C): each 2x2 patch becomes one token."""
    n, channels, height, width = latents.shape
    patches = latents.reshape(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, (height // 2) * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: (n, h w, 4C) -> (n, C, 2h, 2w)."""
    n, channels = tokens.shape[0], tokens.shape[-1] // 4
    patches = tokens.reshape(n, height, width, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(n, channels, 2 * height, 2 * width)


def positions(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(h w, 3) float32 of each token's 0, row and column."""
    grid = torch.zeros(height, width, 3, device=device)
    grid[..., 1] = torch.arange(height, device=device)[:, None]
    grid[..., 2] = torch.arange(width, device=device)[None, :]
    return grid.reshape(height * width, 3)
