"""A small restorer of handwritten digits: residual shifting (arXiv 2307.12348) on pictures that were blurred and shrunk.

The paper works on latents of an autoencoder at 64 x 64 and larger, on photographs, with a U-Net of 100 million weights; here
pixels of 32 x 32, a network of a quarter of a million weights, and a training of a minute or two on a processor. The loss is
the paper's (eq. 12): the squared error of the clean picture, unweighted, at a random state of the chain.

Shapes: B pictures; clean, y, x [B, 1, H, W] in [-1, 1], sides divisible by 4; t float32 [B] in (0, 1], share of the chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from hasten.distill.data.moving_digits import Digits, Split, load_digits, sample_images
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.pretrain.task import Stages, Task
from hasten.errors import LimitError, UsageError
from hasten.pipelines.residual_shift import ResidualShiftScheduler

FREQUENCIES = 8


@dataclass(frozen=True)
class Damage:
    """What is done to a clean picture: blurred (deviation in pixels), shrunk by `factor`, made noisy, and enlarged again."""

    blur: float = 1.0
    factor: int = 4
    noise: float = 0.1

    def __call__(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """y, at the size of `clean`: enlarged by cubic interpolation, which is what restoration has to beat."""
        reach = torch.arange(-3, 4, dtype=clean.dtype, device=clean.device)
        kernel = torch.exp(-reach.square() / (2 * self.blur**2))
        kernel = (kernel / kernel.sum()).reshape(1, 1, 1, -1)
        seen = F.pad(clean, (3, 3, 3, 3), value=-1.0)
        seen = F.conv2d(F.conv2d(seen, kernel), kernel.mT)
        small = F.avg_pool2d(seen, self.factor)
        small = small + self.noise * torch.randn(small.shape, generator=generator).to(small)
        return F.interpolate(small, size=clean.shape[2:], mode="bicubic", align_corners=False)


class RestorationNet(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' classes are Any to mypy
    """Says what the clean picture is, from the chain's scaled state x, the degraded y and t: y plus a correction.

    width: channels; dilations: of its residual blocks, which work at half the resolution. Saved and loaded as any model of
    diffusers.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, width: int = 48, dilations: tuple[int, ...] = (1, 2, 4, 2, 1)) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, 2 * width * len(dilations)))
        self.into = nn.Conv2d(8, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width, dilation) for dilation in dilations)
        self.out = nn.Conv2d(width, 4, 3, padding=1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """x0 [B, 1, H, W]. Raises `LimitError` for odd sides."""
        if x.shape[-1] % 2 or x.shape[-2] % 2:
            raise LimitError(f"RestorationNet folds 2 x 2 pixels; sides must be even, got {x.shape[-2]} x {x.shape[-1]}.")
        turns = t[:, None].to(x.dtype) * math.pi * 2.0 ** torch.arange(FREQUENCIES, device=x.device, dtype=x.dtype)
        scale, shift = self.time(torch.cat([turns.sin(), turns.cos()], 1)).unflatten(1, (len(self.blocks), 2, -1)).unbind(2)
        hidden = self.into(F.pixel_unshuffle(torch.cat([x, y], 1), 2))
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, scale[:, number], shift[:, number])
        corrected: Tensor = y + F.pixel_shuffle(self.out(F.silu(hidden)), 2)
        return corrected


class _Block(nn.Module):
    """A residual block of two convolutions whose middle is scaled and shifted by the time."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        middle = self.first(F.silu(self.norm(hidden)))
        middle = middle * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        found: Tensor = hidden + self.second(F.silu(middle))
        return found


def pictures(digits: Digits, count: int, seed: int, split: Split = "train") -> tuple[Tensor, list[str]]:
    """Clean pictures of digits on a canvas of 32 x 32 in [-1, 1], and their prompts."""
    found = sample_images(digits, count, seed, split=split, paraphrase=False)
    return found.frames * 2 - 1, found.prompts


@dataclass(frozen=True)
class Restoring:
    """A training: of how many steps and pictures at once, at which learning rate, on what damage, from which seed."""

    steps: int = 800
    batch: int = 32
    lr: float = 2e-3
    seed: int = 0
    damage: Damage = Damage()
    scheduler: tuple[float, float] = (0.3, 1.0)
    """power and kappa of the chain: the paper's power, and half its kappa, whose latents vary more than these pixels."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.lr > 0:
            raise UsageError(f"A training needs steps and batch of 1 or more and lr above 0, got {self}.")

    @property
    def loop(self) -> TrainSettings:
        """What the trainer is told: a short rise, then a rate that falls all the time; the weights as they are, without an average."""
        return TrainSettings(
            steps=self.steps, batch=self.batch, lr=self.lr, seed=self.seed, schedule="linear", warmup=min(20, self.steps), average=0.0
        )


def train(
    out: Path, data: str | Path = "sklearn", settings: Restoring | None = None, *, resume: bool = False,
    stop_after: int | None = None, progress: bool = False, told: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[RestorationNet, ResidualShiftScheduler]:  # fmt: skip
    """Train a restorer on `data` ("sklearn", or a folder of MNIST), each step a function of the seed and its number.

    A task of the one trainer: its log, its checkpoints and its end by SIGTERM are in `out`/checkpoints/restorer, from which `resume`
    goes on. stop_after: steps after which it ends early, with a checkpoint. told: the step's number and loss, after each.
    Returns the network in evaluation mode and its scheduler; both are written to `out`, too, in diffusers' formats.

    Raises `ResumeError` as `Trainer.fit`, `StoppedError` when it was told to end.
    """
    settings = settings or Restoring()
    digits = load_digits(data)
    power, kappa = settings.scheduler
    scheduler = ResidualShiftScheduler(power=power, kappa=kappa)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        network = RestorationNet()

    def loss(step: int) -> Tensor:
        found = _loss(network, scheduler, digits, settings, step)
        told(step, float(found.detach()))
        return found

    task = Task("restorer", network, [torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=0.01)], loss, settings.loop)
    network.load_state_dict(Stages(out, progress=progress, device=torch.device("cpu")).run(task, resume, stop_after))
    network.eval().save_pretrained(out / "network")
    scheduler.save_pretrained(out / "scheduler")
    return network, scheduler


def _loss(
    network: RestorationNet, scheduler: ResidualShiftScheduler, digits: Digits, settings: Restoring, step: int
) -> Tensor:
    seed = settings.seed * 1_000_003 + step
    generator = torch.Generator().manual_seed(seed)
    clean, _ = pictures(digits, settings.batch, seed)
    y = settings.damage(clean, generator)
    chain = scheduler.chain
    t = torch.randint(1, chain.steps + 1, (len(clean),), generator=generator)
    x = scheduler.add_noise(clean, y, torch.randn(clean.shape, generator=generator), t)
    spread = chain.kappa * torch.tensor(chain.eta, dtype=torch.float32)[t].sqrt()
    scaled = x / (1 + spread.square()).sqrt()[:, None, None, None]
    return F.mse_loss(network(scaled, y, t.float() / chain.steps), clean)
