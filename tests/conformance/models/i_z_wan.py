"""The family of Wan: video, with hints, faces and reference images between the blocks or inside them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    SkyReelsV2Transformer3DModel,
    WanAnimate2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch.nn.attention.flex_attention import create_block_mask

from tests.conformance.models import arguments
from tests.conformance.models.arguments import GRIDS, PIXELS, TEXT, tokens
from tests.conformance.small import Inputs, Small, normal, register

WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}


def frame(seed: int, size: int) -> Inputs:
    """The features of a first frame, read beside the prompt."""
    return {"encoder_hidden_states_image": normal(seed, 1, 3, 16)}


for kind in (WanTransformer3DModel, SkyReelsV2Transformer3DModel):
    register(
        Small(
            kind.__name__,
            build=lambda kind=kind: kind(**WAN, image_dim=16, added_kv_proj_dim=24),
            inputs=lambda seed, size: {**arguments.prompt(seed), **frame(seed + 100, size)},
            sample=lambda seed, size: arguments.video(4, seed, size),
            timestep=arguments.thousand,
            injections={"image": frame},
        )
    )


def hints(seed: int, size: int) -> Inputs:
    return {
        "control_hidden_states": normal(seed, 1, 8, 2, *PIXELS[size]),
        "control_hidden_states_scale": torch.tensor([1.0, 0.7]),
    }


register(
    Small(
        "WanVACETransformer3DModel",
        build=lambda: WanVACETransformer3DModel(
            **WAN | {"num_layers": 4}, vace_layers=[0, 2], vace_in_channels=8
        ),
        inputs=lambda seed, size: {**arguments.prompt(seed), **hints(50, size)},
        sample=lambda seed, size: arguments.video(4, seed, size),
        timestep=arguments.thousand,
        injections={"vace": hints},
    )
)


def face(seed: int, size: int) -> Inputs:
    """Pixels of a face, four for every latent frame but the first; loud, since random weights silence them."""
    return {"face_pixel_values": 1e8 * normal(seed, 1, 3, 4, 16, 16)}


def animate(seed: int, size: int) -> Inputs:
    return {
        **arguments.prompt(seed),
        "pose_hidden_states": normal(60, 1, 4, 1, *PIXELS[size]),
        **face(61, size),
    }


register(
    Small(
        "WanAnimateTransformer3DModel",
        build=lambda: WanAnimateTransformer3DModel(
            **WAN | {"in_channels": 12, "num_layers": 4},
            latent_channels=4,
            image_dim=None,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=8,
            face_encoder_hidden_dim=8,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        inputs=animate,
        sample=lambda seed, size: arguments.video(12, seed, size),
        timestep=arguments.thousand,
        injections={"face": face},
        heterogeneous="what is added between its blocks is computed from what the blocks return",
    )
)


def generation(seed: int, size: int) -> Inputs:
    """The pass that denoises: the prompt, the condition's latents and a reference image's keys and values."""
    reference = WanAnimate2KVCache(3)
    for i in range(3):
        reference.get(i).store(*normal(seed + 70 + i, 2, 1, tokens(size), 2, 12))
    height, width = PIXELS[size]
    return {
        "encoder_hidden_states": [arguments.text(seed)[0]],
        "condition_latents": [normal(60, 4, 2, height, width)],
        "kv_cache": reference,
        "kv_cache_mode": "cached",
        "seq_len": 2 * tokens(size),
        "reference_grid_sizes": torch.tensor([[1, *GRIDS[size]]]),
        "origin_len": 1,
        "origin_area": [8 * height, 8 * width],
    }


def animate2() -> WanAnimate2Transformer3DModel:
    """With masks made beforehand: the class would compile the function that makes them."""
    model = WanAnimate2Transformer3DModel(
        text_len=TEXT,
        in_dim=8,
        dim=24,
        ffn_dim=32,
        freq_dim=16,
        text_dim=16,
        out_dim=4,
        num_heads=2,
        num_layers=3,
        use_img_emb=False,
    )
    for size in (0, 1):
        num = tokens(size)
        model.block_masks[1, num] = create_block_mask(
            lambda b, h, q, k, num=num: (q < 2 * num) & ((k < 2 * num) | ((k >= 128) & (k < 128 + num))),
            None, None, 128, 256, device="cpu",
        )  # fmt: skip
    return model


register(
    Small(
        "WanAnimate2Transformer3DModel",
        build=animate2,
        inputs=generation,
        sample=lambda seed, size: arguments.video(4, seed, size),
        timestep=arguments.thousand,
        takes=lambda x: list(x.unbind(0)),
        injections={"reference": lambda seed, size: {"kv_cache": generation(seed, size)["kv_cache"]}},
    )
)
