"""The denoisers' losses: flow matching for video and joint attention, weighted noise prediction for other images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hasten.distill.pretrain import tiny, tiny_flux
from hasten.distill.pretrain.config import PretrainConfig
from hasten.distill.pretrain.task import step_seed

MAX_WEIGHT = 10.0
"""Noise prediction is weighted by 1 / alpha_bar up to this, as if the velocity were predicted: plain noise
prediction spends itself on the nearly clean images and learns the shapes late."""


class Objective:
    """The denoiser's loss at a step: flow matching for video and joint attention, noise prediction for other images."""

    def __init__(
        self, config: PretrainConfig, stored: dict[str, Tensor], text_encoder: Any, device: Any
    ) -> None:
        self.config, self.device = config, device
        self.latents = stored["latents"]
        unique, self.prompt_row = torch.unique(stored["ids"], dim=0, return_inverse=True)
        empty = tiny.tokenize(tiny.build_tokenizer(), [""], config.text.length).input_ids
        prompts = torch.cat([unique, empty])
        self.mask = self.pooled = None
        if config.family == "flux":
            self.text, self.pooled = tiny_flux.encode_ids(text_encoder, prompts)
        else:
            self.text, self.mask = tiny.encode_ids(text_encoder, prompts, config.kind)
        self.alphas = None
        if config.family == "pixart":
            self.alphas = tiny.build_scheduler("image", config.denoiser.shift).alphas_cumprod

    def __call__(self, forward: Any, step: int) -> Tensor:
        """Mean squared error of one batch; its rows share out the noise levels evenly."""
        c = self.config.denoiser
        g = torch.Generator().manual_seed(step_seed(self.config.seed, "denoiser", step))
        pick = torch.randint(len(self.latents), (c.batch,), generator=g)
        x0 = self.latents[pick].float()
        drop = torch.rand(c.batch, generator=g) < c.drop_prompt
        row = torch.where(drop, len(self.text) - 1, self.prompt_row[pick])
        noise = torch.randn(x0.shape, generator=g)
        level = (torch.arange(c.batch) + torch.rand(c.batch, generator=g)) / c.batch
        if self.alphas is None:
            noisy, target, t = (x.to(self.device) for x in flow(x0, noise, level, c.shift))
            weight = torch.ones((), device=self.device)
        else:
            t = (level * 1000).long().clamp(0, 999)
            a = self.alphas[t].view(-1, 1, 1, 1)
            weight = (1 / a).clamp(max=MAX_WEIGHT).to(self.device)
            noisy, target = (a.sqrt() * x0 + (1 - a).sqrt() * noise).to(self.device), noise.to(self.device)
            t = t.to(self.device)
        error = self._predicted(forward, noisy, t, row).float() - target
        return (weight * error.square()).mean()

    def _predicted(self, forward: Any, noisy: Tensor, t: Tensor, row: Tensor) -> Tensor:
        """The network's output for the prompts of these rows, called as its pipeline calls it; t in 0..1000."""
        text = self.text[row].to(self.device)
        if self.pooled is not None:
            return tiny_flux.velocity(forward, noisy, t / 1000, text, self.pooled[row].to(self.device))
        if self.alphas is None:
            output: Tensor = forward(noisy, t, text, return_dict=False)[0]
            return output
        assert self.mask is not None
        output = forward(
            noisy,
            text,
            timestep=t,
            encoder_attention_mask=self.mask[row].to(self.device),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output


def flow(x0: Tensor, noise: Tensor, level: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, the velocity noise - x0 and the time 1000 sigma, sigma shifted as at sampling; level in (0, 1)."""
    u = level.clamp(1e-4, 1 - 1e-4)
    sigma = shift * u / (1 + (shift - 1) * u)
    s = sigma.view(-1, *([1] * (x0.ndim - 1)))
    return (1 - s) * x0 + s * noise, noise - x0, 1000 * sigma
