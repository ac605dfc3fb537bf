"""Image transformers in which text and image share one sequence or attend jointly, classes I to R."""

from __future__ import annotations

import torch
from diffusers import (
    Ideogram4Transformer2DModel,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    Krea2Transformer2DModel,
    LongCatImageTransformer2DModel,
    NucleusMoEImageTransformer2DModel,
    OvisImageTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
)

from tests.conformance.models import arguments
from tests.conformance.models.arguments import GRIDS, PIXELS, TEXT, tokens
from tests.conformance.small import Inputs, Small, normal, register


def ideogram4(seed: int, size: int) -> Inputs:
    """Text and image are rows of one sequence; `indicator` says which is which."""
    num = TEXT + tokens(size)
    return {
        "encoder_hidden_states": normal(seed, 1, num, 16),
        "position_ids": arguments.joint_positions(size)[None],
        "segment_ids": torch.ones(1, num, dtype=torch.long),
        "indicator": torch.tensor([[3] * TEXT + [2] * tokens(size)]),
    }


register(
    Small(
        "Ideogram4Transformer2DModel",
        build=lambda: Ideogram4Transformer2DModel(
            in_channels=4,
            num_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=16,
            mrope_section=(2, 2, 2),
        ),
        inputs=ideogram4,
        sample=lambda seed, size: normal(seed, 1, TEXT + tokens(size), 4),
        timestep=arguments.unit,
    )
)


register(
    Small(
        "JoyImageEditTransformer3DModel",
        build=lambda: JoyImageEditTransformer3DModel(
            in_channels=4,
            hidden_size=24,
            num_attention_heads=2,
            text_dim=16,
            mlp_width_ratio=2.0,
            num_layers=3,
            rope_dim_list=[4, 4, 4],
        ),
        inputs=lambda seed, size: arguments.prompt(seed),
        sample=lambda seed, size: normal(seed, 1, 4, 1, *PIXELS[size]),
        timestep=arguments.thousand,
    )
)


def joyimage_plus(seed: int, size: int) -> Inputs:
    return {
        **arguments.prompt(seed),
        "encoder_hidden_states_mask": arguments.everything(),
        "shape_list": [[(1, *GRIDS[size])]],
    }


register(
    Small(
        "JoyImageEditPlusTransformer3DModel",
        build=lambda: JoyImageEditPlusTransformer3DModel(
            in_channels=4,
            hidden_size=24,
            num_attention_heads=2,
            text_dim=16,
            mlp_width_ratio=2.0,
            num_layers=3,
            rope_dim_list=[4, 4, 4],
        ),
        inputs=joyimage_plus,
        sample=lambda seed, size: normal(seed, 1, tokens(size), 4, 1, 2, 2),
        timestep=arguments.thousand,
    )
)


def krea2(seed: int, size: int) -> Inputs:
    """The prompt comes as the features of two layers of the text encoder."""
    return {
        "encoder_hidden_states": normal(seed, 1, TEXT, 2, 16),
        "position_ids": arguments.joint_positions(size),
        "encoder_attention_mask": arguments.everything(torch.bool),
    }


register(
    Small(
        "Krea2Transformer2DModel",
        build=lambda: Krea2Transformer2DModel(
            in_channels=4,
            num_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            axes_dims_rope=(4, 4, 4),
        ),
        inputs=krea2,
        sample=lambda seed, size: arguments.packed(4, seed, size),
        timestep=arguments.unit,
    )
)


def two_grids(seed: int, size: int) -> Inputs:
    """Prompt and positions as in the family of Flux."""
    places = arguments.joint_positions(size)
    return {**arguments.prompt(seed), "txt_ids": places[:TEXT], "img_ids": places[TEXT:]}


register(
    Small(
        "LongCatImageTransformer2DModel",
        build=lambda: LongCatImageTransformer2DModel(
            in_channels=4,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=[4, 4, 4],
        ),
        inputs=two_grids,
        sample=lambda seed, size: arguments.packed(4, seed, size),
        timestep=arguments.unit,
    )
)

register(
    Small(
        "OvisImageTransformer2DModel",
        build=lambda: OvisImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 4),
        ),
        inputs=two_grids,
        sample=lambda seed, size: arguments.packed(4, seed, size),
        timestep=arguments.unit,
    )
)

register(
    Small(
        "NucleusMoEImageTransformer2DModel",
        build=lambda: NucleusMoEImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=4,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 4),
            mlp_ratio=8.0,  # rounded down to a multiple of 128 channels
            dense_moe_strategy="leave_first_block_dense",
            num_experts=4,
            moe_intermediate_dim=16,
            capacity_factors=2.0,
        ),
        inputs=lambda seed, size: {**arguments.prompt(seed), "img_shapes": [(1, *GRIDS[size])]},
        sample=lambda seed, size: arguments.packed(16, seed, size),
        timestep=arguments.unit,
    )
)


def qwen(seed: int, size: int) -> Inputs:
    return {
        **arguments.prompt(seed),
        "encoder_hidden_states_mask": arguments.everything(),
        "img_shapes": [[(1, *GRIDS[size])]],
    }


def qwen_controls(seed: int, size: int) -> Inputs:
    """Residuals of a ControlNet of two blocks, added after blocks 0, 1 and 2."""
    return {"controlnet_block_samples": [normal(seed + i, 1, tokens(size), 24) for i in range(2)]}


register(
    Small(
        "QwenImageTransformer2DModel",
        build=lambda: QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 4),
        ),
        inputs=qwen,
        sample=lambda seed, size: arguments.packed(16, seed, size),
        timestep=arguments.unit,
        injections={"controlnet": qwen_controls},
    )
)


def qwen21(seed: int, size: int) -> Inputs:
    """One slot of the prompt stands for four tokens of the image."""
    slots = torch.tensor([[False] * TEXT + [True] * (tokens(size) // 4)])
    return {**arguments.prompt(seed), "img_shapes": [[(1, *GRIDS[size])]], "img_mask": slots}


register(
    Small(
        "QwenImage21Transformer2DModel",
        build=lambda: QwenImage21Transformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=12,
            num_attention_heads=2,
            context_in_dim=16,
            mlp_ratio=2,
            axes_dims_rope=(4, 4, 4),
        ),
        inputs=qwen21,
        sample=lambda seed, size: arguments.packed(16, seed, size),
        timestep=arguments.unit,
    )
)
