"""Own pictures and clips as latents, in the scale that a pipeline's network reads, and back.

Each family of autoencoders has a scale of its own between its latents and the network's; those known here are in
`KNOWN`, the rest is refused. Pipelines that fold patches into tokens do it by a static method of theirs, which is used.
A latent is the mean of what the encoder says, so that it can be stored; diffusers' scripts draw from around it.

Shapes: B rows, T frames of H x W pixels; pixels float32 [B, 3, T, H, W] in [-1, 1]; latents as the network reads them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hasten.distill.data.own_files import OwnFiles, Size, Unusable, pixels
from hasten.distill.data.store import Store
from hasten.distill.network.host_call import HostCall
from hasten.errors import ModelError, UsageError
from hasten.session import Attachment

KNOWN = ("AutoencoderKL", "AutoencoderKLWan", "AutoencoderKLQwenImage")
"""Autoencoders whose scale is known: SD, SDXL, SD3, FLUX.1, PixArt and their kin; Wan; Qwen-Image."""

PACKED = ["latents", "batch_size", "num_channels_latents", "height", "width"]
"""Arguments of `_pack_latents` in FLUX.1's and Qwen-Image's pipelines; others fold differently."""


def size_of(pipe: Any, call: Mapping[str, Any], resize: bool = True) -> Size:
    """What the pipeline is called to make. Raises `UsageError` where the call does not say."""
    moving = makes_clips(pipe)
    missing = [name for name in ("height", "width", *(["num_frames"] if moving else [])) if name not in call]
    if missing:
        raise UsageError(f"How large are the data to be? Say {', '.join(f'data.call.{name}' for name in missing)}.")
    return Size(int(call["num_frames"]) if moving else 1, int(call["height"]), int(call["width"]), resize)


def encode(
    pipe: Any, host: HostCall, found: OwnFiles, size: Size, prompts: Sequence[str], conditions: Any, *,
    batch: int = 8, told: Callable[[int], None] = lambda done: None,
) -> Store:  # fmt: skip
    """Every file that can be read as a row; the rest goes to `found.skipped`. conditions: of `prompts` and then ''.

    Raises `UsageError` when no file could be read; `ModelError` for an autoencoder that is not known, or where its
    latents are not what the network reads.
    """
    rows: list[Tensor] = []
    waiting: list[Tensor] = []
    number = {prompt: index for index, prompt in enumerate(prompts)}
    prompt: list[int] = []
    for file, caption in list(found.captions.items()):
        try:
            waiting.append(pixels(file, size))
        except Unusable as why:
            found.skipped[file.name] = str(why)
            del found.captions[file]
            continue
        prompt.append(number[caption])
        if len(waiting) == batch:
            rows.append(latents(pipe, host, torch.stack(waiting)))
            waiting.clear()
            told(len(prompt))
    if waiting:
        rows.append(latents(pipe, host, torch.stack(waiting)))
    if not rows:
        raise UsageError(f"No file can be trained on: {found.told()} Nothing was trained.")
    kept, empty = conditions.rows(torch.arange(len(prompts))), conditions.rows(torch.tensor([len(prompts)]))
    return Store(tuple(prompts), kept, empty, torch.tensor(prompt), torch.cat(rows), None, host.shape)


@torch.no_grad()
def latents(pipe: Any, host: HostCall, seen: Tensor) -> Tensor:
    """Latents of pixels as the network reads them, float32 on the CPU."""
    vae = autoencoder(pipe)
    still = type(vae).__name__ == "AutoencoderKL"
    if still and seen.shape[2] != 1:
        raise ModelError(f"{type(vae).__name__} reads pictures, and these are {seen.shape[2]} frames.")
    given = (seen[:, :, 0] if still else seen).to(vae.device, vae.dtype)
    made = _scaled(vae, vae.encode(given).latent_dist.mode().float())
    if len(host.shape) == 2:
        made = _packed(pipe, made)
    if tuple(made.shape[1:]) != host.shape:
        raise ModelError(
            f"{type(pipe).__name__}: {tuple(seen.shape[2:])} frames and pixels become latents {tuple(made.shape[1:])}, its"
            f" network reads {host.shape}. Check data.call: height, width, num_frames."
        )
    if not bool(torch.isfinite(made).all()):
        raise ModelError(f"{type(vae).__name__} in {vae.dtype} gives latents that are not finite. Use float32 or bfloat16.")
    return made.cpu()


def decode(pipe: Any, made: Tensor, call: Mapping[str, Any], output_type: str = "np") -> Any:
    """What the pipeline itself makes of these latents: it is run for two steps whose result is replaced by them."""

    def given(model_output: Any, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        ours = made.to(sample.device, sample.dtype)
        return SimpleNamespace(prev_sample=ours) if kwargs.get("return_dict", True) else (ours,)

    given.__signature__ = inspect.signature(pipe.scheduler.step)  # type: ignore[attr-defined]  # pipelines ask it for eta
    plain = {name: value for name, value in call.items() if name not in ("prompt", "negative_prompt", "latents")}
    off = {name: 1.0 for name in ("true_cfg_scale", "guidance_scale") if name in plain}
    hold = Attachment()
    hold.replace(pipe.scheduler, "step", given)
    try:
        with torch.no_grad():
            arguments = plain | off | {"num_inference_steps": 2, "output_type": output_type}
            return pipe(prompt=[""] * len(made), **arguments)[0]
    finally:
        hold.restore()


def autoencoder(pipe: Any) -> Any:
    """The pipeline's autoencoder. Raises `ModelError` for one whose scale is not known here."""
    vae = getattr(pipe, "vae", None)
    if type(vae).__name__ not in KNOWN:
        raise ModelError(
            f"{type(pipe).__name__} has the autoencoder {type(vae).__name__}; own files can be encoded by"
            f" {', '.join(KNOWN)}. Train by a method that lets the teacher make its data (hasten train pairs)."
        )
    return vae


def _scaled(vae: Any, made: Tensor) -> Tensor:
    """From the autoencoder's scale to the network's."""
    config = vae.config
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and deviation is not None:
        shape = (1, -1, *[1] * (made.ndim - 2))
        made = (made - made.new_tensor(mean).view(shape)) / made.new_tensor(deviation).view(shape)
    else:
        made = made - (config.get("shift_factor") or 0.0)
    # Wan's and Qwen's configurations have no factor.
    return made * (config.get("scaling_factor") or 1.0)


def _packed(pipe: Any, made: Tensor) -> Tensor:
    """Folded into tokens by the pipeline's own method."""
    fold = getattr(type(pipe), "_pack_latents", None)
    if fold is None or list(inspect.signature(fold).parameters) != PACKED:
        raise ModelError(f"How {type(pipe).__name__} folds latents into tokens is not known; known: FLUX.1's and Qwen-Image's way.")
    whole = made.contiguous()
    folded: Tensor = fold(whole, len(whole), whole.shape[1], whole.shape[-2], whole.shape[-1])
    return folded


def makes_clips(pipe: Any) -> bool:
    """Whether the pipeline makes clips."""
    return "num_frames" in inspect.signature(type(pipe).__call__).parameters
