"""A pipeline of your own: here FLUX with random weights, its blocks cached, then restored bit for bit.

    python examples/own_pipeline.py

Random weights show how hasten attaches; they say nothing about quality.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

import hasten
from hasten.caching.stack import StackReuse
from hasten.drift import Drift
from hasten.forecast import Polynomial
from hasten.recipe import Recipe


def build() -> FluxPipeline:
    """A FLUX of a few thousand parameters; prompts come as embeddings."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, shift_factor=0.0)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(steps: int = 20) -> hasten.Report:
    pipe = build()
    prompt = {"prompt_embeds": torch.randn(1, 8, 32), "pooled_prompt_embeds": torch.randn(1, 32)}

    def generate() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        call = {"height": 32, "width": 32, "num_inference_steps": steps, "output_type": "pt"}
        return pipe(**prompt, **call, generator=generator).images[0]

    own = Recipe(
        name="own",
        reuse=StackReuse(lead=1, rule=Drift(limit=0.4, accumulate=False, max_skips=3), forecast=Polynomial(order=1)),
    )
    before = generate()
    with hasten.accelerate(pipe, own) as run:
        generate()
    assert torch.equal(generate(), before), "closing the session restores the pipeline exactly"
    report = run.report()
    print(report)
    return report


if __name__ == "__main__":
    main()
