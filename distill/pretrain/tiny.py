"""Builds the bundled tiny models: text encoder, tokenizer, autoencoder and denoiser of a diffusers pipeline.

Everything is an unmodified diffusers or transformers class, only small: `WanPipeline` for video
(https://arxiv.org/abs/2503.20314) and `PixArtSigmaPipeline` for images (https://arxiv.org/abs/2403.04692); what
`FluxPipeline` has of its own is in `tiny_flux`.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from hasten.distill.pretrain.config import DenoiserConfig, PretrainConfig, TextConfig, VaeConfig
from hasten.pipelines.judge import DIGITS, DIRECTIONS, SPEEDS

_diffusers: Any = diffusers  # most of its constructors carry no types

COMMON_WORDS = (
    "a an the is are of at in on to and with , . ' - digit number moving moves going goes slow fast slowly quickly "
    "left right up down top bottom center middle corner thin thick small large black white handwritten image video "
    "picture clip drawn written still blurry sharp bright dark upwards downwards leftwards rightwards towards from "
    "speed one two three not no photo big little large line stroke background"
)


def vocabulary() -> list[str]:
    """The words both models know, special tokens first; ids are the positions."""
    words = [
        "<pad>",
        "</s>",
        "<unk>",
        *DIGITS,
        *map(str, range(10)),
        *DIRECTIONS,
        *SPEEDS,
        *COMMON_WORDS.split(),
    ]
    return list(dict.fromkeys(words))


def build_tokenizer(length: int = 64) -> Any:
    """A fast word-level tokenizer: lower case, punctuation apart, `</s>` at the end, padded with `<pad>`.

    length: the longest prompt in tokens, for pipelines that pad to it.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocab["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_text_encoder(kind: str, config: TextConfig) -> Any:
    """A one-layer (U)MT5 encoder with frozen random weights: every word gets its own direction."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": len(vocabulary()),
        "d_model": config.dim,
        "d_kv": 32,
        "d_ff": 2 * config.dim,
        "num_layers": config.layers,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "is_encoder_decoder": False,
        "use_cache": False,
    }
    library: Any = transformers
    if kind == "video":
        model = library.UMT5EncoderModel(library.UMT5Config(**common))
    else:
        model = library.T5EncoderModel(library.T5Config(**common))
    return model.eval().requires_grad_(False)


def build_vae(kind: str, config: VaeConfig) -> Any:
    """The autoencoder. Video: (3, F, H, W) -> (latents, 1 + (F-1)/2, H/4, W/4); image: (3, H, W) -> (latents, H/2, W/2)."""
    if kind == "video":
        return _diffusers.AutoencoderKLWan(
            base_dim=config.base_dim,
            z_dim=config.latents,
            dim_mult=[1, 2],
            num_res_blocks=1,
            attn_scales=[],
            temperal_downsample=[True],
            patch_size=2,
            in_channels=12,
            out_channels=12,
            scale_factor_temporal=2,
            scale_factor_spatial=4,
            latents_mean=[0.0] * config.latents,
            latents_std=[1.0] * config.latents,
        )
    return _diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(config.base_dim, 2 * config.base_dim),
        layers_per_block=1,
        latent_channels=config.latents,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def decode_unclamped(vae: Any, latents: Tensor) -> Tensor:
    """Decode without AutoencoderKLWan's final clamp, whose gradient is zero wherever a dark pixel overshoots."""
    from diffusers.models.autoencoders import autoencoder_kl_wan

    if not hasattr(vae, "temperal_upsample"):
        image: Tensor = vae.decode(latents).sample
        return image
    vae.clear_cache()
    hidden, chunks = vae.post_quant_conv(latents), []
    for i in range(latents.shape[2]):
        vae._conv_idx = [0]
        chunks.append(
            vae.decoder(
                hidden[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0
            )
        )
    vae.clear_cache()
    unpatchify: Any = autoencoder_kl_wan.unpatchify
    video: Tensor = unpatchify(torch.cat(chunks, 2), patch_size=vae.config.patch_size)
    return video


def build_denoiser(kind: str, config: DenoiserConfig, latents: int, text_dim: int, sample_size: int) -> Any:
    """The transformer, freshly initialised for training from scratch (the output layer starts at zero)."""
    if kind == "video":
        model = _diffusers.WanTransformer3DModel(
            patch_size=(1, config.patch, config.patch),
            num_attention_heads=config.heads,
            attention_head_dim=config.head_dim,
            in_channels=latents,
            out_channels=latents,
            text_dim=text_dim,
            freq_dim=64,
            ffn_dim=config.ffn,
            num_layers=config.layers,
            rope_max_seq_len=64,
        )
    elif config.joint is not None:
        from hasten.distill.pretrain import tiny_flux

        model = tiny_flux.build_transformer(config, latents, text_dim)
    else:
        width = config.heads * config.head_dim
        model = _diffusers.PixArtTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_dim,
            in_channels=latents,
            out_channels=latents,
            num_layers=config.layers,
            norm_num_groups=8,
            cross_attention_dim=width,
            sample_size=sample_size,
            patch_size=config.patch,
            interpolation_scale=1,
            use_additional_conditions=False,
            caption_channels=text_dim,
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "blocks" in name:
            nn.init.xavier_uniform_(module.weight)
            if "norm" in name:
                # Flux's modulations: blocks begin as the identity (https://arxiv.org/abs/2212.09748)
                nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


def build_scheduler(kind: str, shift: float) -> Any:
    """Video: flow matching with the given shift. Image: DDIM on PixArt's linear noise schedule."""
    if kind == "video":
        return _diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return _diffusers.DDIMScheduler(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="epsilon",
        timestep_spacing="trailing",
    )


def tokenize(tokenizer: Any, prompts: list[str], length: int) -> Any:
    """Token ids and mask (n, length), padded and truncated as the pipelines do it."""
    return tokenizer(
        prompts,
        padding="max_length",
        max_length=length,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )


@torch.no_grad()
def encode_ids(encoder: Any, ids: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Embeddings (n, length, dim) and mask (n, length) of token ids.

    For video the padding is zeroed, as WanPipeline does it (its cross-attention reads all of it, unmasked).
    """
    mask = (ids != 0).long()
    hidden: Tensor = encoder(ids, mask).last_hidden_state
    return (hidden * mask.unsqueeze(-1) if kind == "video" else hidden), mask


def assemble(config: PretrainConfig, *, vae: Any, denoiser: Any, text_encoder: Any) -> Any:
    """The pipeline made of the parts, ready to be called or saved."""
    if config.family == "flux":
        from hasten.distill.pretrain import tiny_flux

        return tiny_flux.assemble(config, vae=vae, denoiser=denoiser, text_encoder=text_encoder)
    parts = {
        "tokenizer": build_tokenizer(),
        "text_encoder": text_encoder,
        "vae": vae,
        "transformer": denoiser,
        "scheduler": build_scheduler(config.kind, config.denoiser.shift),
    }
    return (_diffusers.WanPipeline if config.kind == "video" else _diffusers.PixArtSigmaPipeline)(**parts)
