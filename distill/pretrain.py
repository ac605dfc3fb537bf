"""Train a tiny video or image model from scratch: autoencoder, then cached latents, then the denoiser.

One loop on `accelerate` serves both trainings. Batches are pure functions of (seed, phase, step), so an interrupted
run continues bit-exactly on the CPU from its last checkpoint. The matrices inside the blocks are trained with Muon
(https://kellerjordan.github.io/posts/muon/), the rest with AdamW; the learning rate warms up, stays, and falls
linearly to zero over the last part, and an exponential average of the weights is what gets exported.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import moving_digits, tiny
from .pretrain_config import PretrainConfig
from .pretrain_state import load_checkpoint, replace_folder, save_checkpoint, truncate_log
from .tiny_attention import BmmAttention

_MAY_CHANGE = ("denoiser.steps", "call.")


@dataclass
class Task:
    """One training: a module, its optimisers and its loss as a function of the step."""

    name: str
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    loss: Callable[[int], Tensor]
    steps: int
    warmup: int
    cooldown: float
    clip: float
    ema_decay: float
    export: Callable[[dict[str, Tensor], int], None] | None = None
    peaks: list[float] = field(default_factory=list)


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

    `out` receives `vae/`, `latents.safetensors`, `checkpoints/`, `log-*.jsonl`, `latest/` (a complete pipeline of
    the averaged weights, renewed at every checkpoint) and finally `pipeline/`. `resume` goes on from there; the
    configuration may then differ in `denoiser.steps` and `call` only. `stop_after` ends the denoiser early (for tests).
    """
    if threads is not None:
        torch.set_num_threads(threads)
    out = Path(out)
    _claim(config, out, data, resume)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=_precision(config))
    digits = moving_digits.load_digits(data)
    run = _Run(config, out, digits, accelerator, checkpoint_seconds, progress)
    torch.manual_seed(config.seed)
    text_encoder = tiny.build_text_encoder(config.kind, config.text)
    vae = run.train_vae(resume)
    latents, embeddings, masks = run.encode(vae, text_encoder)
    return run.train_denoiser(vae, text_encoder, latents, embeddings, masks, resume, stop_after)


def _precision(config: PretrainConfig) -> str:
    return config.denoiser.precision


def _claim(config: PretrainConfig, out: Path, data: str, resume: bool) -> None:
    """Write the configuration into `out`, or check that a resumed run has the same one."""
    file = out / "config.json"
    wanted = {"data": str(data), **config.model_dump(mode="json")}
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(wanted, indent=1))
        return
    if not resume:
        raise FileExistsError(f"'{out}' already holds a training: resume it, or give an empty folder.")
    found = json.loads(file.read_text())
    a, b = _flat(found), _flat(wanted)
    differing = sorted(
        k for k in a.keys() | b.keys() if a.get(k) != b.get(k) and not k.startswith(_MAY_CHANGE)
    )
    if differing:
        detail = "; ".join(f"{k}: was {a.get(k)!r}, now {b.get(k)!r}" for k in differing[:4])
        raise ValueError(f"cannot resume '{out}': only denoiser.steps and call may change. {detail}.")
    file.write_text(json.dumps(wanted, indent=1))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows


def step_seed(seed: int, phase: str, step: int) -> int:
    """The seed of one batch, the same whenever and wherever it is drawn."""
    return zlib.crc32(f"{seed}/{phase}/{step}".encode())


def learning_rate(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Factor in (0, 1]: linear warm-up, plateau, linear fall to zero over the last `cooldown` of the steps."""
    rise = (step + 1) / warmup if step < warmup else 1.0
    tail = max(1.0, steps * cooldown)
    return min(rise, 1.0, (steps - step) / tail)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices inside the transformer blocks (for Muon), everything else (for AdamW)."""
    inner: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (inner if "blocks." in name and parameter.ndim == 2 and min(parameter.shape) > 8 else rest).append(
            parameter
        )
    return inner, rest


class _Run:
    """The state shared by the phases of one `pretrain` call."""

    def __init__(
        self,
        config: PretrainConfig,
        out: Path,
        digits: moving_digits.Digits,
        accelerator: Accelerator,
        checkpoint_seconds: float,
        progress: bool,
    ) -> None:
        self.config, self.out, self.digits, self.accelerator = config, out, digits, accelerator
        self.checkpoint_seconds, self.progress = checkpoint_seconds, progress

    # -- data -----------------------------------------------------------------------------------------------
    def sample(self, n: int, seed: int, frames: int | None = None) -> moving_digits.Clips:
        """n training clips or images."""
        d = self.config.data
        if self.config.kind == "video":
            return moving_digits.sample_clips(
                self.digits, n, seed, frames=frames or d.frames, canvas=d.canvas, size=d.digit
            )
        return moving_digits.sample_images(self.digits, n, seed, canvas=d.canvas, size=d.digit)

    def pixels(self, clips: moving_digits.Clips) -> Tensor:
        """(n, 3, F, H, W) for video, (n, 3, H, W) for images, in [-1, 1]."""
        rgb = clips.rgb()
        return rgb if self.config.kind == "video" else rgb.squeeze(2)

    # -- phase 1: autoencoder -------------------------------------------------------------------------------
    def train_vae(self, resume: bool) -> Any:
        """The trained autoencoder with latents scaled to unit variance, from disk where already done."""
        folder, c = self.out / "vae", self.config.vae
        vae = tiny.build_vae(self.config.kind, c)
        if folder.exists():
            return type(vae).from_pretrained(folder).eval().requires_grad_(False)

        def loss(step: int) -> Tensor:
            seed = step_seed(self.config.seed, "vae", step)
            x = self.pixels(self.sample(c.batch, seed, c.frames)).to(self.accelerator.device)
            posterior = vae.encode(x).latent_dist
            y = tiny.decode_unclamped(vae, posterior.sample(torch.Generator().manual_seed(seed)))
            kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
            error = y - x
            return error.abs().mean() + error.square().mean() + c.kl * kl

        task = Task(
            "vae",
            vae,
            [torch.optim.AdamW(vae.parameters(), lr=c.lr, betas=(0.9, 0.99), weight_decay=0.0)],
            loss,
            c.steps,
            c.warmup,
            0.6,
            1.0,
            0.0,
        )
        self.loop(task, resume, autocast=False)
        vae.eval().requires_grad_(False)
        self._normalise(vae)
        replace_folder(folder, lambda part: vae.save_pretrained(part))
        return vae

    @torch.no_grad()
    def _normalise(self, vae: Any) -> None:
        """Measure the latents' mean and deviation and store them where the pipeline reads them."""
        x = self.pixels(self.sample(256, step_seed(self.config.seed, "normalise", 0)))
        z = torch.cat([vae.encode(part).latent_dist.mode() for part in x.split(32)])
        if self.config.kind == "video":
            mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
            vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
            return
        shift = z.mean(
            (0, 2, 3)
        )  # PixArt knows a scale but no shift: fold the mean into the 1x1 convolutions
        vae.quant_conv.bias[: len(shift)] -= shift
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ shift
        vae.register_to_config(scaling_factor=1.0 / float((z - shift.view(1, -1, 1, 1)).std()))

    # -- phase 2: latents -----------------------------------------------------------------------------------
    @torch.no_grad()
    def encode(self, vae: Any, text_encoder: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised latents (N, ...) fp16, prompt embeddings (N + 1, length, dim) and masks; the last row is "" ."""
        file, c = self.out / "latents.safetensors", self.config.latents
        if not file.is_file():
            rows, prompts = [], []
            starts = range(0, c.count, c.batch)
            for start in tqdm(starts, desc="latents", disable=not self.progress, mininterval=5):
                clips = self.sample(
                    min(c.batch, c.count - start), step_seed(self.config.seed, "latents", start)
                )
                rows.append(self.normalised(vae, self.pixels(clips)).half())
                prompts += clips.prompts
            aside = file.with_suffix(".part")
            ids = tiny.build_tokenizer()(
                prompts, padding="max_length", max_length=self.config.text.length, return_tensors="pt"
            ).input_ids
            save_file({"latents": torch.cat(rows), "ids": ids}, aside)
            aside.rename(file)
        stored = load_file(file)
        unique, inverse = torch.unique(stored["ids"], dim=0, return_inverse=True)
        tokenizer = tiny.build_tokenizer()
        empty = tokenizer([""], padding="max_length", max_length=self.config.text.length, return_tensors="pt")
        ids = torch.cat([unique, empty.input_ids])
        mask = (ids != 0).long()
        hidden = text_encoder(ids, mask).last_hidden_state
        if self.config.kind == "video":
            hidden = hidden * mask.unsqueeze(-1)
        self.prompt_row = inverse
        return stored["latents"], hidden, mask

    def normalised(self, vae: Any, x: Tensor) -> Tensor:
        """Encode pixels to unit-variance latents."""
        z: Tensor = vae.encode(x).latent_dist.mode()
        if self.config.kind == "image":
            return z * float(vae.config.scaling_factor)
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        return (z - mean) / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)

    # -- phase 3: denoiser ----------------------------------------------------------------------------------
    def train_denoiser(
        self,
        vae: Any,
        text_encoder: Any,
        latents: Tensor,
        embeddings: Tensor,
        masks: Tensor,
        resume: bool,
        stop_after: int | None,
    ) -> Path:
        """Train the transformer, export the averaged weights; return the pipeline folder."""
        config, c = self.config, self.config.denoiser
        torch.manual_seed(step_seed(config.seed, "denoiser", -1))
        model = tiny.build_denoiser(config.kind, c, latents.shape[1], config.text.dim, latents.shape[-1])
        alphas = None if config.kind == "video" else tiny.build_scheduler("image", c.shift).alphas_cumprod
        forward: Any = self.accelerator.prepare(model)

        def loss(step: int) -> Tensor:
            g = torch.Generator().manual_seed(step_seed(config.seed, "denoiser", step))
            pick = torch.randint(len(latents), (c.batch,), generator=g)
            x0 = latents[pick].float()
            drop = torch.rand(c.batch, generator=g) < c.drop_prompt
            text = torch.where(drop, len(embeddings) - 1, self.prompt_row[pick])
            noise = torch.randn(x0.shape, generator=g)
            strata = (torch.arange(c.batch) + torch.rand(c.batch, generator=g)) / c.batch
            if alphas is None:
                noisy, target, t = _flow(x0, noise, strata, c.shift)
                predicted = forward(noisy, t, embeddings[text], return_dict=False)[0]
            else:
                t = (strata * 1000).long().clamp(0, 999)
                a = alphas[t].view(-1, 1, 1, 1)
                noisy, target = a.sqrt() * x0 + (1 - a).sqrt() * noise, noise
                predicted = forward(
                    noisy,
                    embeddings[text],
                    timestep=t,
                    encoder_attention_mask=masks[text],
                    added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                    return_dict=False,
                )[0]
            return (predicted.float() - target).square().mean()

        def export(weights: dict[str, Tensor], step: int) -> None:
            self.export(self.out / "latest", model, weights, vae, text_encoder, step)

        task = Task(
            "denoiser",
            model,
            _optimizers(model, c),
            loss,
            c.steps,
            c.warmup,
            c.cooldown,
            c.clip,
            c.ema,
            export,
        )
        weights = self.loop(task, resume, autocast=True, stop_after=stop_after)
        target = self.out / "pipeline"
        if stop_after is None:
            self.export(target, model, weights, vae, text_encoder, c.steps)
        return target

    def export(
        self, folder: Path, model: Any, weights: dict[str, Tensor], vae: Any, text_encoder: Any, step: int
    ) -> None:
        """Write a complete diffusers pipeline with the averaged weights."""
        c = self.config
        copy = tiny.build_denoiser(
            c.kind, c.denoiser, model.config.in_channels, c.text.dim, model.config.get("sample_size") or 0
        )
        copy.load_state_dict(weights)
        pipe = tiny.assemble(c, vae=vae, denoiser=copy.eval(), text_encoder=text_encoder)

        def write(part: Path) -> None:
            pipe.save_pretrained(part)
            (part / "training.json").write_text(json.dumps({"step": step, "call": dict(c.call)}))

        replace_folder(folder, write)

    # -- the loop -------------------------------------------------------------------------------------------
    def loop(
        self, task: Task, resume: bool, *, autocast: bool, stop_after: int | None = None
    ) -> dict[str, Tensor]:
        """Run a task to its end; returns the averaged weights (a copy of the weights where decay is 0)."""
        folder, log = self.out / "checkpoints" / task.name, self.out / f"log-{task.name}.jsonl"
        ema = {k: v.detach().clone() for k, v in task.model.state_dict().items()}
        start = 0
        if resume and (folder.exists() or folder.with_name(folder.name + ".old").exists()):
            start = load_checkpoint(folder, model=task.model, ema=ema, optimizers=task.optimizers)["step"]
        truncate_log(log, start)
        peaks = [group["lr"] for o in task.optimizers for group in o.param_groups]
        saved, last = time.monotonic(), min(task.steps, stop_after or task.steps)
        bar = tqdm(total=task.steps, initial=start, desc=task.name, disable=not self.progress, mininterval=5)
        attention = BmmAttention(self.config.denoiser.precision) if autocast else nullcontext()
        with log.open("a") as lines, attention:
            for step in range(start, last):
                value = self._step(task, step, peaks, ema, autocast)
                lines.write(
                    json.dumps({"step": step, "loss": round(value, 6), "time": round(time.time(), 1)}) + "\n"
                )
                bar.update()
                bar.set_postfix(loss=f"{value:.4f}", refresh=False)
                if time.monotonic() - saved > self.checkpoint_seconds or step + 1 == last:
                    lines.flush()
                    save_checkpoint(
                        folder,
                        model=task.model,
                        ema=ema,
                        optimizers=task.optimizers,
                        state={"step": step + 1},
                    )
                    if task.export is not None:
                        task.export(ema, step + 1)
                    saved = time.monotonic()
        bar.close()
        return ema

    def _step(
        self, task: Task, step: int, peaks: list[float], ema: dict[str, Tensor], autocast: bool
    ) -> float:
        factor = learning_rate(step, task.steps, task.warmup, task.cooldown)
        groups = [group for o in task.optimizers for group in o.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * factor
        with self.accelerator.autocast() if autocast else nullcontext():
            loss = task.loss(step)
        self.accelerator.backward(loss)
        nn.utils.clip_grad_norm_(task.model.parameters(), task.clip)
        for optimizer in task.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(task.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in task.model.state_dict().items():
                if value.is_floating_point():
                    ema[name].lerp_(value, 1 - decay)
        value = float(loss.detach())
        if value != value:
            raise FloatingPointError(
                f"the {task.name} loss is not a number at step {step}: lower the learning rate."
            )
        return value


def _flow(x0: Tensor, noise: Tensor, strata: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """Flow matching: sigma from stratified uniforms, shifted as at sampling; returns x_sigma, noise - x0, 1000 sigma."""
    u = strata.clamp(1e-4, 1 - 1e-4)
    sigma = shift * u / (1 + (shift - 1) * u)
    s = sigma.view(-1, *([1] * (x0.ndim - 1)))
    return (1 - s) * x0 + s * noise, noise - x0, 1000 * sigma


def _optimizers(model: nn.Module, c: Any) -> list[torch.optim.Optimizer]:
    inner, rest = split_parameters(model)
    return [
        torch.optim.Muon(inner, lr=c.muon_lr, weight_decay=c.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=c.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
