"""Image transformers with a prompt beside the image (cross-attention, refiners, lists of images), classes L to Z."""

from __future__ import annotations

import torch
from diffusers import (
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    OmniGenTransformer2DModel,
    PixArtTransformer2DModel,
    PriorTransformer,
    PRXTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

from tests.conformance.models import arguments
from tests.conformance.models.arguments import PIXELS, TEXT, tokens
from tests.conformance.small import Inputs, Small, normal, register

register(
    Small(
        "Lumina2Transformer2DModel",
        build=lambda: Lumina2Transformer2DModel(
            in_channels=4,
            hidden_size=24,
            num_layers=3,
            num_refiner_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(32, 16, 16),
            cap_feat_dim=16,
        ),
        inputs=lambda seed, size: {
            **arguments.prompt(seed),
            "encoder_attention_mask": arguments.everything(),
        },
        sample=lambda seed, size: arguments.image(4, seed, size),
        timestep=arguments.unit,
    )
)


def lumina_next() -> LuminaNextDiT2DModel:
    model = LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=3,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        learn_sigma=False,
        cross_attention_dim=16,
    )
    model.pad_token.data.zero_()  # diffusers leaves it uninitialised
    return model


def lumina_next_inputs(seed: int, size: int) -> Inputs:
    return {
        **arguments.prompt(seed),
        "encoder_mask": arguments.everything(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(12, 16, 16),
        "cross_attention_kwargs": {},
    }


register(
    Small(
        "LuminaNextDiT2DModel",
        build=lumina_next,
        inputs=lumina_next_inputs,
        sample=lambda seed, size: arguments.image(4, seed, size),
        timestep=arguments.unit,
    )
)


def omnigen(seed: int, size: int) -> Inputs:
    """The prompt is token numbers; text, time and image share one sequence."""
    num = TEXT + 1 + tokens(size)
    return {
        "input_ids": torch.randint(1, 32, (1, TEXT), generator=torch.Generator().manual_seed(seed)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(1, num, num),
        "position_ids": torch.arange(num)[None],
    }


register(
    Small(
        "OmniGenTransformer2DModel",
        build=lambda: OmniGenTransformer2DModel(
            in_channels=4,
            hidden_size=24,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            num_layers=3,
            pad_token_id=0,
            vocab_size=32,
            rope_scaling={"long_factor": [1.0] * 6, "short_factor": [1.0] * 6},
            pos_embed_max_size=8,
            time_step_dim=16,
        ),
        inputs=omnigen,
        sample=lambda seed, size: arguments.image(4, seed, size),
        timestep=arguments.unit,
    )
)

register(
    Small(
        "PixArtTransformer2DModel",
        build=lambda: PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            cross_attention_dim=24,
            sample_size=8,
            caption_channels=16,
        ),
        inputs=lambda seed, size: {
            **arguments.prompt(seed),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        sample=lambda seed, size: arguments.image(4, seed, size),
        timestep=arguments.thousand,
        flow=False,
    )
)


def prior(seed: int, size: int) -> Inputs:
    return {
        "proj_embedding": normal(seed + 100, 1 + size, 16),
        "encoder_hidden_states": normal(seed, 1 + size, TEXT, 16),
    }


register(
    Small(
        "PriorTransformer",  # its sample is one embedding: there is no resolution, so size 1 is a batch of two
        build=lambda: PriorTransformer(
            num_attention_heads=2, attention_head_dim=12, num_layers=3, embedding_dim=16, num_embeddings=TEXT
        ),
        inputs=prior,
        sample=lambda seed, size: normal(seed, 1 + size, 16),
        timestep=arguments.thousand,
        flow=False,
    )
)

register(
    Small(
        "PRXTransformer2DModel",
        build=lambda: PRXTransformer2DModel(
            in_channels=4,
            context_in_dim=16,
            hidden_size=24,
            mlp_ratio=2.0,
            num_heads=2,
            depth=3,
            axes_dim=[6, 6],
        ),
        inputs=lambda seed, size: arguments.prompt(seed),
        sample=lambda seed, size: arguments.image(4, seed, size),
        timestep=arguments.unit,
    )
)


def sana_controls(seed: int, size: int) -> Inputs:
    """Residuals of a ControlNet of two blocks, added after blocks 1 and 2."""
    return {"controlnet_block_samples": tuple(normal(seed + i, 1, tokens(size), 24) for i in range(2))}


register(
    Small(
        "SanaTransformer2DModel",
        build=lambda: SanaTransformer2DModel(
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
            patch_size=2,
        ),
        inputs=lambda seed, size: arguments.prompt(seed),
        sample=lambda seed, size: arguments.image(4, seed, size),
        timestep=arguments.thousand,
        injections={"controlnet": sana_controls},
    )
)


def sd3_controls(seed: int, size: int) -> Inputs:
    """Residuals of a ControlNet of two blocks, added after all blocks but the last."""
    return {"block_controlnet_hidden_states": [normal(seed + i, 1, tokens(size), 24) for i in range(2)]}


register(
    Small(
        "SD3Transformer2DModel",
        build=lambda: SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=24,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        inputs=lambda seed, size: {**arguments.prompt(seed), "pooled_projections": normal(seed + 100, 1, 16)},
        sample=lambda seed, size: arguments.image(4, seed, size),
        timestep=arguments.thousand,
        injections={"controlnet": sd3_controls, "skip_layers": lambda seed, size: {"skip_layers": [1]}},
    )
)

register(
    Small(
        "Transformer2DModel",
        build=lambda: Transformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=8,
            num_layers=3,
            norm_num_groups=4,
            cross_attention_dim=16,
            norm_type="ada_norm",
            num_embeds_ada_norm=1000,
        ),
        inputs=lambda seed, size: arguments.prompt(seed),
        sample=lambda seed, size: arguments.image(8, seed, size),
        timestep=lambda t: torch.tensor(round(t * 999)),  # a number, looked up in a table
        flow=False,
    )
)


def z_image_controls(seed: int, size: int) -> Inputs:
    """Residuals of a ControlNet by number of layer; both streams are padded to 32 tokens."""
    return {"controlnet_block_samples": {layer: normal(seed + layer, 1, 64, 24) for layer in (0, 2)}}


register(
    Small(
        "ZImageTransformer2DModel",
        build=lambda: ZImageTransformer2DModel(
            in_channels=4,
            dim=24,
            n_layers=3,
            n_refiner_layers=2,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 4, 4],
            axes_lens=[80, 16, 16],
        ),
        inputs=lambda seed, size: {"cap_feats": [arguments.text(seed)[0]]},
        sample=lambda seed, size: normal(seed, 1, 4, 1, *PIXELS[size]),
        timestep=arguments.unit,
        sample_name="x",
        timestep_name="t",
        takes=lambda x: list(x.unbind(0)),
        injections={"controlnet": z_image_controls},
    )
)
