"""Video transformers, classes K to S (Wan's family is in `i_z_wan.py`)."""

from __future__ import annotations

import torch
from diffusers import (
    Kandinsky5Transformer3DModel,
    Kandinsky6SRTransformer3DModel,
    Kandinsky6Transformer3DModel,
    LatteTransformer3DModel,
    MochiTransformer3DModel,
    MotifVideoTransformer3DModel,
    SanaVideoTransformer3DModel,
    SanaWMTransformer3DModel,
)

from tests.conformance.models import arguments
from tests.conformance.models.arguments import GRIDS, PIXELS, TEXT, tokens
from tests.conformance.small import Inputs, Small, normal, register


def kandinsky5(seed: int, size: int) -> Inputs:
    rows, columns = GRIDS[size]
    return {
        **arguments.prompt(seed),
        "pooled_projections": normal(seed + 100, 1, 16),
        "visual_rope_pos": (torch.arange(2), torch.arange(rows), torch.arange(columns)),
        "text_rope_pos": torch.arange(TEXT),
    }


register(
    Small(
        "Kandinsky5Transformer3DModel",
        build=lambda: Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=16,
            time_dim=16,
            out_visual_dim=4,
            model_dim=24,
            ff_dim=32,
            num_text_blocks=2,
            num_visual_blocks=3,
            axes_dims=(4, 4, 4),
        ),
        inputs=kandinsky5,
        sample=lambda seed, size: normal(seed, 1, 2, *PIXELS[size], 4),
        timestep=arguments.thousand,
    )
)

register(
    Small(
        "Kandinsky6Transformer3DModel",
        build=lambda: Kandinsky6Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=16,
            time_dim=16,
            model_dim=24,
            ff_dim=32,
            num_text_blocks=2,
            num_visual_blocks=3,
            axes_dims=(4, 4, 4),
            visual_cond=False,
            in_audio_dim=4,
            out_audio_dim=4,
        ),
        inputs=lambda seed, size: {**arguments.prompt(seed), "pooled_projections": normal(seed + 100, 1, 16)},
        sample=lambda seed, size: normal(seed, 1, 2, *PIXELS[size], 4),
        timestep=arguments.thousand,
        injections={"audio": lambda seed, size: {"audio_hidden_states": normal(seed, 1, 6, 4)}},
    )
)

register(
    Small(
        "Kandinsky6SRTransformer3DModel",  # takes no prompt: what it refines is half of the sample's channels
        build=lambda: Kandinsky6SRTransformer3DModel(
            in_visual_dim=2,
            out_visual_dim=5,
            time_dim=16,
            model_dim=24,
            ff_dim=32,
            num_visual_blocks=3,
            axes_dims=(4, 4, 4),
            nabla_threshold=0.9,
            nabla_window=(1, 1, 1),
        ),
        inputs=lambda seed, size: {},
        sample=lambda seed, size: normal(seed, 1, 2, 8, (8, 16)[size], 5),
        timestep=arguments.thousand,
    )
)

register(
    Small(
        "LatteTransformer3DModel",
        build=lambda: LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            cross_attention_dim=24,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=16,
            video_length=2,
        ),
        inputs=lambda seed, size: arguments.prompt(seed),
        sample=lambda seed, size: arguments.video(4, seed, size),
        timestep=arguments.thousand,
        flow=False,
        heterogeneous="blocks over space and over time take turns, and the tokens are regrouped between them",
    )
)

register(
    Small(
        "MochiTransformer3DModel",
        build=lambda: MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            pooled_projection_dim=16,
            in_channels=4,
            out_channels=4,
            text_embed_dim=16,
            time_embed_dim=16,
        ),
        inputs=lambda seed, size: {
            **arguments.prompt(seed),
            "encoder_attention_mask": arguments.everything(),
        },
        sample=lambda seed, size: arguments.video(4, seed, size),
        timestep=arguments.thousand,
    )
)


def motif() -> MotifVideoTransformer3DModel:
    return MotifVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=4,
        num_decoder_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(4, 4, 4),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )


register(
    Small(
        "MotifVideoTransformer3DModel",
        build=motif,
        inputs=lambda seed, size: {
            **arguments.prompt(seed),
            "encoder_attention_mask": arguments.everything(),
        },
        sample=lambda seed, size: arguments.video(4, seed, size),
        timestep=arguments.thousand,
        injections={"image": lambda seed, size: {"image_embeds": normal(seed, 1, 3, 16)}},
        heterogeneous="its last single blocks start again from the noisy tokens",
    )
)


def sana_video_controls(seed: int, size: int) -> Inputs:
    """Residuals of a ControlNet of two blocks, added after blocks 1 and 2."""
    return {"controlnet_block_samples": tuple(normal(seed + i, 1, 2 * tokens(size), 24) for i in range(2))}


register(
    Small(
        "SanaVideoTransformer3DModel",
        build=lambda: SanaVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
            sample_size=8,
            rope_max_seq_len=32,
        ),
        inputs=lambda seed, size: arguments.prompt(seed),
        sample=lambda seed, size: arguments.video(4, seed, size),
        timestep=arguments.thousand,
        injections={"controlnet": sana_video_controls},
    )
)


def sana_wm(seed: int, size: int) -> Inputs:
    return {
        "encoder_hidden_states": normal(seed, 1, 1, TEXT, 16),
        "encoder_attention_mask": arguments.everything()[:, None, None],
    }


def camera(seed: int, size: int) -> Inputs:
    """A camera that moves sideways (world matrix, focal lengths, centre) and the rays that belong to it."""
    rows, columns = GRIDS[size]
    matrix = torch.eye(4).repeat(2, 1, 1)
    matrix[:, 0, 3] = torch.tensor([0.0, 0.1 * seed])
    lens = torch.tensor([4.0, 4.0, columns / 2, rows / 2]).expand(2, 4)
    return {
        "camera_conditions": torch.cat([matrix.flatten(1), lens], dim=1)[None],
        "chunk_plucker": normal(seed, 1, 6, 2, rows, columns),
    }


register(
    Small(
        "SanaWMTransformer3DModel",
        build=lambda: SanaWMTransformer3DModel(
            in_channels=4,
            num_layers=3,
            hidden_size=32,
            num_attention_heads=2,
            softmax_every_n=2,
            linear_head_dim=16,
            chunk_plucker_channels=6,
            chunk_plucker_post_attn_blocks=2,
            image_size=8,
            caption_channels=16,
            mlp_ratio=2.0,
        ),
        inputs=sana_wm,
        sample=lambda seed, size: normal(seed, 1, 4, 2, *GRIDS[size]),
        timestep=lambda t: torch.full((1, 1, 2), round(t * 1000)),
        injections={"camera": camera},
    )
)
