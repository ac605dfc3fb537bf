"""Image transformers whose names start with A to H, but for the Flux family."""

from __future__ import annotations

import diffusers
import torch
from torch import Tensor

from tests.conformance.models.arguments import thousand, unit
from tests.conformance.small import Inputs, Small, exclude, normal, register

CHANNELS, TEXT, WIDTH = 4, 5, 16
"""Latent channels, text tokens and their width, unless a class asks for others."""


def side(size: int) -> int:
    """Height and width of the latents."""
    return (8, 12)[size]


def image(seed: int, size: int) -> Tensor:
    """(1, channels, height, width)."""
    return normal(seed, 1, CHANNELS, side(size), side(size))


def text(seed: int, size: int) -> Inputs:
    return {"encoder_hidden_states": normal(1000 + seed, 1, TEXT, WIDTH)}


def sized_text(seed: int, size: int) -> Inputs:
    """Text and the three pairs of numbers that SDXL brought in."""
    pair = torch.full((1, 2), 8.0 * side(size))
    return {**text(seed, size), "original_size": pair, "target_size": pair, "crop_coords": torch.zeros(1, 2)}


def glyphs_and_prior(seed: int, size: int) -> Inputs:
    """Glyph embeddings, and the tokens that an autoregressive model has drawn, one per patch."""
    tokens = (normal(2000 + seed, 1, (side(size) // 2) ** 2).abs() * 10).long() % 32
    return {
        **text(seed, size),
        "prior_token_id": tokens,
        "prior_token_drop": torch.full_like(tokens, seed % 2, dtype=torch.bool),
        "target_size": torch.full((1, 2), 8.0 * side(size)),
        "crop_coords": torch.zeros(1, 2),
    }


def layered_text(seed: int, size: int) -> Inputs:
    """The bundle for the resampler, then one for each of two injecting blocks."""
    return {"encoder_hidden_states": normal(1000 + seed, 1, 3, TEXT, WIDTH)}


def batch_first_text(seed: int, size: int) -> Inputs:
    return {"text_bth": normal(1000 + seed, 1, TEXT, WIDTH), "text_lens": torch.tensor([TEXT])}


def three_texts(seed: int, size: int) -> Inputs:
    """T5, one Llama layer per block, and a pooled embedding."""
    return {
        "encoder_hidden_states_t5": normal(1000 + seed, 1, TEXT, WIDTH),
        "encoder_hidden_states_llama3": normal(2000 + seed, 4, 1, TEXT, 12),
        "pooled_embeds": normal(3000 + seed, 1, 8),
    }


def clip_and_t5(seed: int, size: int) -> Inputs:
    return {
        "encoder_hidden_states": normal(1000 + seed, 1, 4, WIDTH),
        "text_embedding_mask": torch.ones(1, 4),
        "encoder_hidden_states_t5": normal(2000 + seed, 1, 4, WIDTH),
        "text_embedding_mask_t5": torch.tensor([[1.0, 1.0, 1.0, 0.0]]),
        "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]]),
        "style": torch.zeros(1, dtype=torch.long),
    }


def skip_controls(seed: int, size: int) -> Inputs:
    """One residual per skip connection; forward takes them off the list, so each call needs a new one."""
    return {"controlnet_block_samples": [normal(seed, 1, (side(size) // 2) ** 2, 32)]}


def masked_text(seed: int, size: int) -> Inputs:
    mask = torch.ones(1, TEXT)
    mask[:, -1] = 0
    return {**text(seed, size), "encoder_attention_mask": mask}


register(
    Small(
        "AuraFlowTransformer2DModel",
        lambda: diffusers.AuraFlowTransformer2DModel(
            sample_size=16,
            in_channels=CHANNELS,
            num_mmdit_layers=2,
            num_single_dit_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=32,
            out_channels=CHANNELS,
            pos_embed_max_size=64,
        ),
        text,
        image,
        unit,
    )
)
register(
    Small(
        "BriaFibo2Transformer2DModel",
        lambda: diffusers.BriaFibo2Transformer2DModel(
            in_channels=CHANNELS,
            dim=48,
            n_layers=4,
            n_refiner_layers=2,
            n_heads=2,
            cap_feat_dim=WIDTH,
            injection_layer_ids=(1, 3),
            perceiver_num_layers=1,
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=4,
            gist_min_text_len=4,
            gist_max_text_len=16,
            axes_dims=(8, 8, 8),
            axes_lens=(64, 32, 32),
        ),
        layered_text,
        image,
        unit,
    )
)
register(
    Small(
        "CogView3PlusTransformer2DModel",
        lambda: diffusers.CogView3PlusTransformer2DModel(
            in_channels=CHANNELS,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            out_channels=CHANNELS,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=8,
            sample_size=8,
        ),
        sized_text,
        image,
        thousand,
        flow=False,
    )
)
register(
    Small(
        "CogView4Transformer2DModel",
        lambda: diffusers.CogView4Transformer2DModel(
            in_channels=CHANNELS,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            out_channels=CHANNELS,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=8,
            rope_axes_dim=(8, 8),
        ),
        sized_text,
        image,
        thousand,
    )
)
register(
    Small(
        "DiTTransformer2DModel",
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=CHANNELS,
            num_layers=3,
            sample_size=8,
            num_embeds_ada_norm=16,
        ),
        lambda seed, size: {"class_labels": torch.tensor([seed % 16])},
        image,
        thousand,
        flow=False,
    )
)
register(
    Small(
        "ErnieImageTransformer2DModel",
        lambda: diffusers.ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=3,
            ffn_hidden_size=48,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_in_dim=WIDTH,
            rope_axes_dim=(4, 6, 6),
        ),
        batch_first_text,
        image,
        thousand,
    )
)
register(
    Small(
        "GlmImageTransformer2DModel",
        lambda: diffusers.GlmImageTransformer2DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            condition_dim=4,
            prior_vq_quantizer_codebook_size=32,
        ),
        glyphs_and_prior,
        image,
        thousand,
    )
)
register(
    Small(
        "HiDreamImageTransformer2DModel",
        lambda: diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=CHANNELS,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[WIDTH, 12],
            text_emb_dim=8,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(16, 16),
            llama_layers=[0, 1, 2, 3],
            force_inference_output=True,
        ),
        three_texts,
        image,
        thousand,
        timestep_name="timesteps",
    )
)
register(
    Small(
        "HunyuanDiT2DModel",
        lambda: diffusers.HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=CHANNELS,
            patch_size=2,
            sample_size=8,
            hidden_size=32,
            num_layers=4,
            mlp_ratio=2.0,
            cross_attention_dim=WIDTH,
            cross_attention_dim_t5=WIDTH,
            pooled_projection_dim=8,
            text_len=4,
            text_len_t5=4,
        ),
        clip_and_t5,
        image,
        thousand,
        flow=False,
        injections={"controlnet": skip_controls},
        heterogeneous="the rear blocks also take what the front blocks returned",
    )
)
register(
    Small(
        "HunyuanImageTransformer2DModel",
        lambda: diffusers.HunyuanImageTransformer2DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            patch_size=(2, 2),
            text_embed_dim=WIDTH,
            rope_axes_dim=(8, 8),
        ),
        masked_text,
        image,
        thousand,
    )
)

exclude(
    "Cosmos3OmniTransformer",
    "its latents are lists of tensors packed into one sequence with the text, so it has no sample tensor to follow",
)
exclude(
    "DreamLiteTransformer2DModel",
    "an attention layer inside a U-Net, not a denoiser: no pipeline calls it with latents",
)
