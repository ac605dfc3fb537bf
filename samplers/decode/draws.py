"""How the nodes of a proposal were chosen, and draws from a law."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Law = Literal["point", "iid", "without_replacement"]
"""point: any way of choosing. iid: each child of a node is an independent draw. without_replacement: each is drawn from
what is left when its elder siblings are taken out."""


def sample(probabilities: Tensor, count: int, law: Law, generator: torch.Generator | None = None) -> Tensor:
    """Tokens int64 [..., count] drawn from `probabilities` [..., V], which need not sum to 1. Never waits for the device.

    The largest of p / Exp(1) is a draw from p, and the order of the `count` largest that of draws without replacement.
    """
    if law == "iid" and count > 1:
        probabilities = probabilities[..., None, :].expand(*probabilities.shape[:-1], count, probabilities.shape[-1])
    noise = torch.empty_like(probabilities, memory_format=torch.contiguous_format).exponential_(1.0, generator=generator)
    keys = probabilities / noise.clamp(min=torch.finfo(noise.dtype).tiny)
    if law == "iid" and count > 1:
        return keys.argmax(-1)
    return keys.argmax(-1, keepdim=True) if count == 1 else keys.topk(count, -1).indices
