"""From latents to pixels by one matrix, fitted by least squares to latents that an autoencoder has decoded.

A latent pixel with all its channels becomes a patch of pixels: rgb = z W + b.

Shapes: z [C, h, w] one frame's latents; picture uint8 [H, W, 3]; W [C + 1, 3 p p] for patches of p x p pixels.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hasten.atomic import atomic_write
from hasten.ui.engine.place import Place

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

LARGEST = 512
"""Pixels of a picture's longer side, at most."""

RIDGE = 1e-3
"""Added to the normal equations, relative to their scale: channels that never vary stay without weight."""

FADE = 0.7
"""What earlier runs count when another is added: a better sort of data takes over."""


class LinearMap:
    """The map of one autoencoder, as the sums of its normal equations: more samples are added, nothing is kept of them."""

    def __init__(self, name: str, channels: int, patch: int) -> None:
        import torch

        self.name, self.channels, self.patch = name, channels, patch
        self.square = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
        self.cross = torch.zeros(channels + 1, 3 * patch * patch, dtype=torch.float64)
        self._weights: Tensor | None = None

    def learn(self, latents: Tensor, frames: NDArray[Any]) -> None:
        """latents [f, C, h, w] that became frames [F, H, W, 3] in [0, 1]."""
        import torch

        f, _, h, w = latents.shape
        chosen = [round(index * (len(frames) - 1) / max(1, f - 1)) for index in range(f)]
        pictures = torch.from_numpy(frames[chosen].copy()).float()
        pictures = pictures[..., :3] if pictures.shape[-1] >= 3 else pictures[..., :1].expand(*pictures.shape[:-1], 3)
        p = self.patch
        small = torch.nn.functional.interpolate(pictures.movedim(-1, 1), (h * p, w * p), mode="area")
        targets = torch.nn.functional.pixel_unshuffle(small, p).movedim(1, -1).reshape(-1, 3 * p * p).double()
        inputs = with_one(latents.cpu().double())
        # As much weight for each run, however large it is.
        share = 1.0 / len(inputs)
        self.square = FADE * self.square + share * inputs.T @ inputs
        self.cross = FADE * self.cross + share * inputs.T @ targets
        self._weights = None

    @property
    def weights(self) -> Tensor:
        """[C + 1, 3 p p]."""
        import torch

        if self._weights is None:
            ridge = RIDGE * float(self.square.diagonal().mean()) * torch.eye(self.channels + 1, dtype=torch.float64)
            self._weights = torch.linalg.solve(self.square + ridge, self.cross).float()
        return self._weights

    def picture(self, z: Tensor) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] of latents [C, h, w], at most `LARGEST` pixels wide and high."""
        import torch

        _, h, w = z.shape
        p, weights = self.patch, self.weights
        while max(h, w) * p > LARGEST and p % 2 == 0:  # the mean of pixels is a linear map, too: no more is computed than is shown
            p //= 2
            weights = torch.nn.functional.avg_pool2d(weights.view(-1, 3, 2 * p, 2 * p), 2).flatten(1)
        flat = with_one(z[None]) @ weights.to(z.device)
        made = torch.nn.functional.pixel_shuffle(flat.reshape(1, h, w, 3 * p * p).movedim(-1, 1), p)
        if max(h, w) * p > LARGEST:
            made = torch.nn.functional.interpolate(made, scale_factor=LARGEST / (max(h, w) * p), mode="area")
        pixels: NDArray[np.uint8] = (made[0].movedim(0, -1).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        return pixels

    # --- on the disk ------------------------------------------------------------------------------

    def save(self, place: Place) -> None:
        """Keep it for later runs of the same autoencoder."""
        values = {"channels": self.channels, "patch": self.patch, "square": self.square.tolist(), "cross": self.cross.tolist()}
        atomic_write(place.previews / f"map-{self.name}.json", json.dumps(values))

    @classmethod
    def load(cls, place: Place, name: str) -> LinearMap | None:
        """The kept one; None where there is none that can be read."""
        import torch

        try:
            values = json.loads((place.previews / f"map-{name}.json").read_text())
            made = cls(name, int(values["channels"]), int(values["patch"]))
            made.square, made.cross = (torch.tensor(values[key], dtype=torch.float64) for key in ("square", "cross"))
            return made
        except (OSError, ValueError, KeyError, TypeError):
            return None


def with_one(latents: Tensor) -> Tensor:
    """[n, C + 1] of latents [f, C, h, w], a row for each pixel of each frame."""
    import torch

    rows = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
