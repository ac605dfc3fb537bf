"""Train a tiny video or image model from scratch: autoencoder, then cached latents, then the denoiser.

Batches are pure functions of (seed, phase, step), so an interrupted run continues bit-exactly on the CPU from its
last checkpoint. The matrices inside the blocks are trained with Muon (https://kellerjordan.github.io/posts/muon/),
the rest with AdamW. Video and joint attention: flow matching (https://arxiv.org/abs/2210.02747), other images: noise
prediction.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from hasten.distill.data import moving_digits
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.state import claimed, replace_folder
from hasten.distill.pretrain import tiny, tiny_flux
from hasten.distill.pretrain.config import DenoiserConfig, PretrainConfig
from hasten.distill.pretrain.objective import Objective
from hasten.distill.pretrain.task import Stages, Task, Weights, step_seed
from hasten.distill.pretrain.tiny_growth import grown_weights
from hasten.pipelines import tiny_models


def pretrain(
    config: PretrainConfig,
    *,
    out: Path,
    data: str,
    resume: bool = False,
    threads: int | None = None,
    checkpoint_seconds: float = 240.0,
    progress: bool = True,
    stop_after: int | None = None,
) -> Path:
    """Train `config` on `data` (an MNIST folder or `sklearn`) and return the finished pipeline's folder.

    `out` receives `vae/`, `latents.safetensors`, `checkpoints/` (of each network, with its log), `latest/` (a complete pipeline of
    the averaged weights, renewed at every checkpoint) and finally `pipeline/`. `resume` goes on from there; the
    configuration may then differ in `denoiser.steps` and `call` only. `stop_after` ends the denoiser early, as a
    kill right after a checkpoint would. `threads` sets PyTorch's CPU threads.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    out = Path(out)
    digits = moving_digits.load_digits(data)
    stages = Stages(out, checkpoint_seconds, progress)
    wanted = {"source": "sklearn" if data == "sklearn" else "mnist", **config.model_dump(mode="json")}
    with claimed(out, wanted, resume, ("denoiser.steps", "call.")):
        run = _Run(config, out, digits, stages)
        torch.manual_seed(config.seed)
        if config.family == "flux":
            text_encoder: Any = tiny_flux.build_text_encoders(config.text)
        else:
            text_encoder = tiny.build_text_encoder(config.kind, config.text)
        vae = run.autoencoder(resume)
        return run.denoiser(vae, text_encoder, run.latents(vae), resume, stop_after)


class _Run:
    """The three phases of one `pretrain` call."""

    def __init__(self, config: PretrainConfig, out: Path, digits: moving_digits.Digits, stages: Stages) -> None:
        self.config, self.out, self.digits, self.stages = config, out, digits, stages
        self.device = stages.device
        self.video = config.kind == "video"

    def sample(self, n: int, phase: str, step: int, frames: int | None = None) -> tuple[Tensor, list[str]]:
        """n training pictures (n, 3, F, H, W) or (n, 3, H, W) in [-1, 1] with their prompts."""
        d, seed = self.config.data, step_seed(self.config.seed, phase, step)
        if self.video:
            clips = moving_digits.sample_clips(
                self.digits, n, seed, frames=frames or d.frames, canvas=d.canvas, size=d.digit
            )
            return clips.rgb(), clips.prompts
        images = moving_digits.sample_images(self.digits, n, seed, canvas=d.canvas, size=d.digit)
        return images.rgb().squeeze(2), images.prompts

    # -- phase 1 ----------------------------------------------------------------------------------------------
    def autoencoder(self, resume: bool) -> Any:
        """The autoencoder whose latents have unit variance, trained or bundled; from disk where already done."""
        folder, c = self.out / "vae", self.config.vae
        vae = tiny.build_vae(self.config.kind, c)
        if not folder.exists():
            if c.weights is not None:
                vae = type(vae).from_pretrained(tiny_models.path(c.weights) / "vae")
            else:
                vae.to(self.device)
                adam = torch.optim.AdamW(vae.parameters(), lr=c.lr, betas=(0.9, 0.99), weight_decay=0.0)
                settings = TrainSettings(steps=c.steps, batch=1, lr=c.lr, warmup=c.warmup, cooldown=0.6, average=0)
                self.stages.run(Task("vae", vae, [adam], lambda step: self._vae_loss(vae, step), settings), resume)
                vae.eval().cpu()
                self._normalise(vae)
            if self.config.family == "flux":
                vae.register_to_config(shift_factor=0.0)  # FluxPipeline adds it to what it decodes
            replace_folder(folder, lambda part: vae.save_pretrained(part))
        return type(vae).from_pretrained(folder).eval().requires_grad_(False)

    def _vae_loss(self, vae: Any, step: int) -> Tensor:
        c = self.config.vae
        x = self.sample(c.batch, "vae", step, c.frames)[0].to(self.device)
        posterior = vae.encode(x).latent_dist
        noise = torch.Generator().manual_seed(step_seed(self.config.seed, "vae", step))
        error = tiny.decode_unclamped(vae, posterior.sample(noise)) - x
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss: Tensor = error.abs().mean() + error.square().mean() + c.kl * kl
        return loss

    @torch.no_grad()
    def _normalise(self, vae: Any) -> None:
        """Measure the latents' mean and deviation and store them where the pipeline reads them."""
        x = self.sample(256, "normalise", 0)[0]
        z = torch.cat([vae.encode(x[i : i + 32]).latent_dist.mode() for i in range(0, len(x), 32)])
        if self.video:
            mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
            vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
            return
        shift = z.mean(
            (0, 2, 3)
        )  # PixArt knows a scale but no shift: fold the mean into the 1x1 convolutions
        vae.quant_conv.bias[: len(shift)] -= shift
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ shift
        vae.register_to_config(scaling_factor=1.0 / float((z - shift.view(1, -1, 1, 1)).std()))

    # -- phase 2 ----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def latents(self, vae: Any) -> dict[str, Tensor]:
        """`latents` (N, ...) fp16 of unit variance and `ids` (N, length) of their prompts, encoded once."""
        file, c = self.out / "latents.safetensors", self.config.latents
        if not file.is_file():
            rows: list[Tensor] = []
            prompts: list[str] = []
            for start in tqdm(
                range(0, c.count, c.batch), desc="latents", disable=not self.stages.progress, mininterval=2
            ):
                x, told = self.sample(min(c.batch, c.count - start), "latents", start)
                rows.append(self._encode(vae, x).half())
                prompts += told
            ids = tiny.tokenize(tiny.build_tokenizer(), prompts, self.config.text.length).input_ids
            aside = file.with_suffix(".part")
            save_file({"latents": torch.cat(rows), "ids": ids}, aside)
            aside.rename(file)
        return load_file(file)

    def _encode(self, vae: Any, x: Tensor) -> Tensor:
        z: Tensor = vae.encode(x).latent_dist.mode()
        if not self.video:
            return z * float(vae.config.scaling_factor)
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (z - mean) / std

    # -- phase 3 ----------------------------------------------------------------------------------------------
    def denoiser(
        self, vae: Any, text_encoder: Any, stored: dict[str, Tensor], resume: bool, stop_after: int | None
    ) -> Path:
        """Train the transformer (a shallow one first, where asked for), export the averaged weights; the folder."""
        c = self.config.denoiser
        objective = Objective(self.config, stored, text_encoder, self.device)
        parts = (vae, text_encoder, stored["latents"].shape)
        first, begin = None, 0
        if c.shallow is not None:
            flat = c.model_copy(
                update={"layers": c.shallow.layers, "steps": c.shallow.steps, "shallow": None}
            )
            stop = None if stop_after is None else min(stop_after, flat.steps)
            weights = self._train(flat, "shallow", objective, parts, None, 0, resume, stop)
            if stop is not None and stop < flat.steps:
                return self.out / "latest"
            first, begin = grown_weights(weights, flat.layers, c.layers), flat.steps
            stop_after = None if stop_after is None else stop_after - begin
        if stop_after is None or stop_after > 0:
            self._train(c, "denoiser", objective, parts, first, begin, resume, stop_after)
        return self.out / ("pipeline" if stop_after is None or stop_after >= c.steps else "latest")

    def _train(
        self,
        c: DenoiserConfig,
        name: str,
        objective: Objective,
        parts: tuple[Any, Any, tuple[int, ...]],
        first: Weights | None,
        begin: int,
        resume: bool,
        stop_after: int | None,
    ) -> Weights:
        """One training, from the weights `first` or fresh; `begin` batches were seen before it."""
        vae, text_encoder, shape = parts
        config = self.config

        def build() -> Any:
            return tiny.build_denoiser(config.kind, c, shape[1], config.text.dim, shape[-1])

        torch.manual_seed(step_seed(config.seed, "denoiser", -1))
        model = build().to(self.device)
        if first is not None:
            model.load_state_dict(first)

        def export(weights: Weights, step: int, folder: Path = self.out / "latest") -> None:
            twin = build().eval()
            twin.load_state_dict(weights)
            pipe = tiny.assemble(config, vae=vae, denoiser=twin, text_encoder=text_encoder)
            replace_folder(folder, lambda part: _save(pipe, part, config, begin + step))

        def loss(step: int) -> Tensor:
            return objective(model, begin + step)

        settings = TrainSettings(
            steps=c.steps, batch=1, lr=c.lr, warmup=c.warmup, cooldown=c.cooldown, clip=c.clip, average=c.ema, precision=c.precision,
        )  # fmt: skip
        weights = self.stages.run(Task(name, model, optimizers(model, c), loss, settings, export), resume, stop_after)
        if name == "denoiser" and (stop_after is None or stop_after >= c.steps):
            export(weights, c.steps, self.out / "pipeline")
        return weights


def _save(pipe: Any, folder: Path, config: PretrainConfig, step: int) -> None:
    pipe.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"step": step, "call": dict(config.call)}))


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices inside the transformer blocks (for Muon), everything else (for AdamW)."""
    inner: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and min(parameter.shape) > 8
        (inner if matrix and "blocks." in name else rest).append(parameter)
    return inner, rest


def optimizers(model: nn.Module, c: DenoiserConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, norms, biases and the output."""
    inner, rest = split_parameters(model)
    return [
        torch.optim.Muon(inner, lr=c.muon_lr, weight_decay=c.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=c.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
