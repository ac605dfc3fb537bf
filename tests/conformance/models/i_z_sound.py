"""Transformers that denoise sound or molecules, classes L to T, and those that are left out."""

from __future__ import annotations

import torch
from diffusers import (
    LongCatAudioDiTTransformer,
    MiniMaxMusic3Transformer1DModel,
    RFD4ProteinaTransformer,
    StableAudio3DiTModel,
    StableAudioDiTModel,
    T5FilmDecoder,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from tests.conformance.models import arguments
from tests.conformance.small import Inputs, Small, exclude, normal, register

LENGTHS = (16, 24)
"""Frames of a sound, or residues of a protein, by size."""

exclude(
    "MiniMaxMusic3RVQDepthDecoder", "it predicts the next token: its forward has no noisy sample and no time"
)
exclude("TransformerTemporalModel", "a layer of video U-Nets; its forward does not use the time it is given")

register(
    Small(
        "LongCatAudioDiTTransformer",
        build=lambda: LongCatAudioDiTTransformer(
            dit_dim=24, dit_depth=3, dit_heads=2, dit_text_dim=16, latent_dim=4, ff_mult=2.0
        ),
        inputs=lambda seed, size: {
            **arguments.prompt(seed),
            "encoder_attention_mask": arguments.everything(torch.bool),
        },
        sample=lambda seed, size: normal(seed, 1, LENGTHS[size], 4),
        timestep=arguments.unit,
        injections={"latent_cond": lambda seed, size: {"latent_cond": normal(seed, 1, LENGTHS[size], 4)}},
    )
)

register(
    Small(
        "MiniMaxMusic3Transformer1DModel",
        build=lambda: MiniMaxMusic3Transformer1DModel(
            in_channels=4,
            condition_dim=16,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=12,
            ff_inner_dim=32,
            rotary_dim=8,
            fourier_embedding_dim=16,
        ),
        inputs=lambda seed, size: {"encoder_hidden_states": normal(seed, 1, LENGTHS[size], 16)},
        sample=lambda seed, size: normal(seed, 1, 4, LENGTHS[size]),
        timestep=arguments.unit,
    )
)

register(
    Small(
        "StableAudioDiTModel",
        build=lambda: StableAudioDiTModel(
            sample_size=16,
            in_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=3,
            num_key_value_attention_heads=3,
            out_channels=4,
            cross_attention_dim=24,
            time_proj_dim=16,
            global_states_input_dim=16,
            cross_attention_input_dim=16,
        ),
        inputs=lambda seed, size: {
            **arguments.prompt(seed),
            "global_hidden_states": normal(seed + 100, 1, 1, 16),
            "rotary_embedding": get_1d_rotary_pos_embed(
                4, LENGTHS[size] + 1, use_real=True, repeat_interleave_real=False
            ),
        },
        sample=lambda seed, size: normal(seed, 1, 4, LENGTHS[size]),
        timestep=arguments.unit,
        flow=False,
    )
)

register(
    Small(
        "StableAudio3DiTModel",
        build=lambda: StableAudio3DiTModel(
            io_channels=4,
            embed_dim=24,
            depth=3,
            num_heads=2,
            cond_token_dim=16,
            global_cond_dim=16,
            local_add_cond_dim=3,
            timestep_features_dim=16,
            ff_mult=2.0,
            num_memory_tokens=2,
        ),
        inputs=lambda seed, size: {
            **arguments.prompt(seed),
            "global_hidden_states": normal(seed + 100, 1, 16),
        },
        sample=lambda seed, size: normal(seed, 1, 4, LENGTHS[size]),
        timestep=arguments.unit,
        injections={
            "local_add_cond": lambda seed, size: {"local_add_cond": normal(seed, 1, 3, LENGTHS[size])}
        },
    )
)

register(
    Small(
        "T5FilmDecoder",
        build=lambda: T5FilmDecoder(
            input_dims=8, targets_length=24, d_model=24, num_layers=3, num_heads=2, d_kv=12, d_ff=32
        ),
        inputs=lambda seed, size: {
            "encodings_and_masks": [(arguments.text(seed, 24), arguments.everything(torch.float32))]
        },
        sample=lambda seed, size: normal(seed, 1, LENGTHS[size], 8),
        timestep=arguments.unit,
        sample_name="decoder_input_tokens",
        timestep_name="decoder_noise_time",
        flow=False,
    )
)


def protein(seed: int, size: int) -> Inputs:
    """The kind of every residue is the conditioning; the latents beside the backbone stand still here."""
    num = LENGTHS[size]
    return {
        "local_latents": normal(seed + 100, 1, num, 4),
        "local_latents_time": torch.tensor([0.5]),
        "padding_mask": torch.ones(1, num, dtype=torch.bool),
        "token_type": torch.randint(0, 7, (1, num), generator=torch.Generator().manual_seed(seed)),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(1, num, dtype=torch.bool),
            "supports_local_latent": torch.ones(1, num, dtype=torch.bool),
        },
    }


register(
    Small(
        "RFD4ProteinaTransformer",
        build=lambda: RFD4ProteinaTransformer(
            nlayers=3,
            token_dim=24,
            nheads=2,
            dim_cond=16,
            pair_repr_dim=8,
            latent_dim=4,
            token_type_emb_dim=8,
            t_emb_dim=16,
            xt_pair_dist_dim=8,
            feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
            feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
            feats_pair_repr=("xt_bb_ca_pair_dists",),
            feats_pair_cond=("time_emb_bb_ca", "time_emb_local_latents"),
            tri_mult_c=8,
            num_sequence_classes=10,
        ),
        inputs=protein,
        sample=lambda seed, size: normal(seed, 1, LENGTHS[size], 3),
        timestep=arguments.unit,
        sample_name="bb_ca",
        timestep_name="bb_ca_time",
    )
)
