"""Published networks at published sizes: how to build them with random weights and what to feed them.

The configurations are those of the released checkpoints (tencent/HunyuanVideo, Wan-AI/Wan2.1-T2V), which are the
defaults of the diffusers classes; everything that decides the work is written out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import UsageError, nearest


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One network and one size of video.

    cls: transformer class of diffusers. config: its arguments. blocks: arguments that say how many blocks of each kind
    there are. latents: [channels, frames, height, width]. text: (tokens, width) of the prompt's embedding. pooled:
    width of the pooled embedding, 0 for none. evaluations: per step. shape: its name in `roofline.SHAPES`.
    """

    name: str
    cls: str
    config: dict[str, Any]
    blocks: tuple[str, ...]
    latents: tuple[int, int, int, int]
    text: tuple[int, int]
    pooled: int = 0
    evaluations: int = 1
    shape: str = ""

    def build(self, counts: dict[str, int], device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The network with `counts` blocks of each kind in place of its own numbers; random weights, no gradients."""
        import diffusers

        with torch.device(device):
            model: nn.Module = getattr(diffusers, self.cls)(**(self.config | counts))
        kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        for name, parameter in model.named_parameters():
            if kept.isdisjoint(name.split(".")):  # as from_pretrained does
                parameter.data = parameter.data.to(dtype)
        return model.eval().requires_grad_(False)

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """Arguments of one evaluation besides the timestep: noise, and a prompt of random numbers, all of it real."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        found = {"hidden_states": draw(1, *self.latents), "encoder_hidden_states": draw(1, *self.text)}
        if self.pooled:
            found["pooled_projections"] = draw(1, self.pooled)
            found["encoder_attention_mask"] = torch.ones(1, self.text[0], device=device, dtype=torch.bool)
            found["guidance"] = torch.full((1,), 6000.0, device=device, dtype=dtype)
        return found

    @property
    def full(self) -> dict[str, int]:
        """The network's own numbers of blocks."""
        return {name: int(self.config[name]) for name in self.blocks}


HUNYUAN: dict[str, Any] = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20,
    "num_single_layers": 40, "num_refiner_layers": 2, "mlp_ratio": 4.0, "patch_size": 2, "patch_size_t": 1,
    "qk_norm": "rms_norm", "guidance_embeds": True, "text_embed_dim": 4096, "pooled_projection_dim": 768,
    "rope_theta": 256.0, "rope_axes_dim": (16, 56, 56),
}  # fmt: skip

WAN_14B: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13_824, "num_layers": 40, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
}  # fmt: skip

MODELS: dict[str, ModelShape] = {
    model.name: model
    for model in (
        ModelShape(
            "hunyuan-720p", "HunyuanVideoTransformer3DModel", HUNYUAN, ("num_layers", "num_single_layers"),
            latents=(16, 33, 90, 160), text=(256, 4096), pooled=768, shape="hunyuan-720p",
        ),
        ModelShape(
            "wan-14b-720p", "WanTransformer3DModel", WAN_14B, ("num_layers",),
            latents=(16, 21, 90, 160), text=(512, 4096), evaluations=2, shape="wan-14b-720p",
        ),
    )
}  # fmt: skip
"""By name: 129 and 81 frames of 1280 x 720."""


def model_shape(name: str) -> ModelShape:
    """The entry of `MODELS`; `UsageError` names the nearest."""
    if name not in MODELS:
        raise UsageError(f"There is no shape {name!r}; known: {', '.join(MODELS)}.{nearest(name, MODELS)}")
    return MODELS[name]


def small(model: ModelShape) -> ModelShape:
    """The same network of a size for a processor: two heads, one block of each kind twice, a clip of a few tokens."""
    config = model.config | {"num_attention_heads": 2, "attention_head_dim": 24} | dict.fromkeys(model.blocks, 2)
    config |= (
        {"text_embed_dim": 32, "pooled_projection_dim": 16} if model.pooled else {"text_dim": 32, "freq_dim": 32}
    )
    config |= {"rope_axes_dim": (8, 8, 8)} if model.pooled else {"ffn_dim": 64}
    return replace(
        model, config=config, latents=(model.latents[0], 3, 8, 12), text=(5, 32), pooled=16 if model.pooled else 0
    )
