"""Real diffusers pipelines, tiny and with random weights: hosts for tests. Offline, seconds to build.

The classes are the ones users run; only the sizes are small. Each function builds a fresh pipeline from
one seed in well under a second, so a test may change it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.contract import seeded

WORDS = [
    "a",
    "the",
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "moving",
    "standing",
    "still",
    "left",
    "right",
    "up",
    "down",
    "slowly",
    "fast",
    "and",
    "on",
    "of",
    "with",
    "blurry",
    "red",
    "green",
    "blue",
    "cat",
    "dog",
]

WAN_CALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 6}
PIXART_CALL: dict[str, Any] = {
    "height": 32,
    "width": 32,
    "num_inference_steps": 6,
    "use_resolution_binning": False,
    "clean_caption": False,
}
FLUX_CALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 6, "max_sequence_length": 16}
UNET_CALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 6}
"""What a quick call of each host looks like: `small_wan()("a seven", **WAN_CALL)`."""


def word_tokenizer(*, start: bool = False, length: int = 32) -> PreTrainedTokenizerFast:
    """A whole-word tokenizer over `WORDS`. start: also put a start token in front, as CLIP does."""
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if start else "$A </s>", special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=length,
        padding_side="right",
    )


VOCABULARY = 4 + len(WORDS)


def small_wan(*, layers: int = 4, seed: int = 0) -> WanPipeline:
    """Wan 2.1: flow matching, two sequential branches (`cache_context`), 32 tokens at `WAN_CALL`."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=48,
        num_layers=layers,
        rope_max_seq_len=32,
    )
    config = UMT5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    encoder = _loud(UMT5EncoderModel(config))
    pipe = WanPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=encoder,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return _quiet(pipe)


def small_pixart(*, layers: int = 4, seed: int = 0) -> PixArtSigmaPipeline:
    """PixArt-Sigma: noise prediction, both branches in one batch, DPM-Solver++(2M)."""
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        sample_size=4,
        num_layers=layers,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        use_additional_conditions=False,
    )
    pipe = PixArtSigmaPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=_t5(),
        vae=_autoencoder(4, downs=4).eval(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(),
    )
    return _quiet(pipe)


def small_flux(*, layers: int = 2, single_layers: int = 3, seed: int = 0) -> FluxPipeline:
    """FLUX.1: joint attention, two block lists, guidance embedded; `true_cfg_scale=4` adds a second branch."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_autoencoder(1, downs=1, norm_groups=1, quant_conv=False).eval(),
        text_encoder=_clip().eval(),
        tokenizer=word_tokenizer(start=True, length=16),
        text_encoder_2=_t5(),
        tokenizer_2=word_tokenizer(length=16),
        transformer=transformer.eval(),
    )
    return _quiet(pipe)


def small_unet(*, seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x: a UNet, noise prediction, both branches in one batch, DDIM."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipe = StableDiffusionPipeline(
        vae=_autoencoder(4, downs=2).eval(),
        text_encoder=_clip().eval(),
        tokenizer=word_tokenizer(start=True, length=16),
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _quiet(pipe)


def wan_arguments() -> dict[str, Any]:
    """One call of `small_wan`'s network alone: 8 tokens of a video, 5 of text."""
    return {
        "hidden_states": seeded(0, 1, 16, 2, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": seeded(1, 1, 5, 32),
    }


def flux_arguments(*, joint: int = 0, single: int = 0) -> dict[str, Any]:
    """One call of a FLUX network alone, as wide as `small_flux`'s: 16 tokens of an image, 7 of text.

    joint, single: how many residuals a ControlNet adds behind the blocks of each list.
    """
    controls = {"controlnet_block_samples": (10, joint), "controlnet_single_block_samples": (20, single)}
    return {
        "hidden_states": seeded(0, 1, 16, 4),
        "encoder_hidden_states": seeded(1, 1, 7, 32),
        "pooled_projections": seeded(2, 1, 32),
        "timestep": torch.tensor([0.7]),
        "img_ids": seeded(3, 16, 3),
        "txt_ids": seeded(4, 7, 3),
        **{name: [seeded(first + i, 1, 16, 32) for i in range(num)] for name, (first, num) in controls.items() if num},
    }


def saved(pipe: Any, folder: Path) -> Path:
    """Write `pipe` as a diffusers folder of safetensors and give the folder back."""
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _t5() -> T5EncoderModel:
    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return _loud(T5EncoderModel(config))


def _loud(encoder: Any) -> Any:
    """Random text encoders whisper; louder ones make prompts, and so the two branches, differ visibly."""
    with torch.no_grad():
        encoder.encoder.final_layer_norm.weight.fill_(40.0)
    return encoder.eval()


def _clip() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=16,
            pad_token_id=0,
            bos_token_id=3,
            eos_token_id=1,
        )
    )


def _autoencoder(
    channels: int, *, downs: int, norm_groups: int = 4, quant_conv: bool = True
) -> AutoencoderKL:
    """An image autoencoder that shrinks by 2 ** (downs - 1)."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(8,) * downs,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * downs,
        up_block_types=("UpDecoderBlock2D",) * downs,
        norm_num_groups=norm_groups,
        sample_size=32,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
    )
