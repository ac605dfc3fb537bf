"""Residual shifting as a scheduler of diffusers' kind (diffusers has none), and the loop that restores with it.

Shapes: y [B, C, H, W] the degraded picture, brought to the size of the result; x the state, of the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hasten.errors import UsageError
from hasten.samplers.residual_shift import ResidualShift

Generators = torch.Generator | Sequence[torch.Generator] | None


class ResidualShiftScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' classes are Any to mypy
    """ResShift (arXiv 2307.12348) with the methods that diffusers' loops call; its network predicts the clean picture.

    Unlike other schedulers' its runs start from the degraded picture: `begin(y)` makes the first latents. Timesteps are
    T, ..., 1; a run may leave out some of them. Saved and loaded as any scheduler of diffusers.
    """

    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_train_timesteps: int = 15, power: float = 0.3, kappa: float = 2.0, last: float = 0.999) -> None:
        self.chain = ResidualShift(num_train_timesteps, power, kappa, last)
        self.init_noise_sigma = self.chain.spread(num_train_timesteps)
        self.num_inference_steps: int | None = None
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Raises `UsageError` for more steps than the chain was trained with."""
        self.times = self.chain.times(num_inference_steps)
        self.timesteps = torch.tensor(self.times[:-1], device=device)
        self.num_inference_steps, self._index = num_inference_steps, 0

    def begin(self, y: Tensor, generator: Generators = None) -> Tensor:
        """x_T: the degraded picture and its noise."""
        noise = randn_tensor(y.shape, generator=generator, device=y.device, dtype=y.dtype)
        begun: Tensor = y + self.init_noise_sigma * noise
        return begun

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The state at about unit variance, as the network is to see it: x / sqrt(1 + kappa^2 eta_t)."""
        t = self.times[self._index]
        return sample / float((1 + self.chain.spread(t) ** 2) ** 0.5)

    def add_noise(self, original_samples: Tensor, degraded: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of each row, for training. timesteps: int64 [B], 1 to T."""
        eta = torch.tensor(self.chain.eta, device=timesteps.device)[timesteps]
        eta = eta.reshape(-1, *(1,) * (original_samples.ndim - 1)).to(original_samples)
        spread = self.chain.kappa * eta.sqrt()
        return original_samples + eta * (degraded - original_samples) + spread * noise

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> Any:
        """The next state from what the network says of the clean picture. Raises `UsageError` after the last step."""
        if self._index >= len(self.times) - 1:
            raise UsageError(f"This run of {self.num_inference_steps} steps is over; call set_timesteps for another one.")
        t, s = self.times[self._index], self.times[self._index + 1]
        kept, data, spread = self.chain.back(t, s)
        made = kept * sample + data * model_output
        if s > 0:
            made = made + spread * randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        self._index += 1
        return SchedulerOutput(prev_sample=made) if return_dict else (made,)


class Restorer(Protocol):
    """A network that says what the clean picture is: x scaled by the scheduler, y, and t float32 [B] in (0, 1]."""

    def __call__(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor: ...


@torch.no_grad()
def restored(network: Restorer, scheduler: ResidualShiftScheduler, y: Tensor, steps: int, generator: Generators = None) -> Tensor:
    """The clean picture of y, in `steps` evaluations of the network."""
    scheduler.set_timesteps(steps, device=y.device)
    x = scheduler.begin(y, generator)
    for t in scheduler.timesteps:
        share = (t / scheduler.chain.steps).float().expand(len(y))
        x = scheduler.step(network(scheduler.scale_model_input(x, t), y, share), t, x, generator, return_dict=False)[0]
    return x
