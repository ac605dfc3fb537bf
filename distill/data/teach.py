"""Pairs from the teacher: noise, and what the teacher's own pipeline makes of it.

Shapes: N rows; z, x0 [N, ...] in the network's scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.distill.data.store import Store
from hasten.distill.network.host_call import learn
from hasten.errors import ModelError


def make_pairs(
    pipe: Any, prompts: Sequence[str], count: int, *, seed: int = 0, batch: int = 16,
    told: Callable[[int], None] = lambda done: None, **call: Any,
) -> Store:  # fmt: skip
    """`count` samples of the teacher, the prompts in turn, with the noise each was made of.

    The teacher is the pipeline as it is called: its solver, steps and guidance are those of `call`. told: is given the
    number of finished rows. Raises `ModelError` where noise that is handed over is not what the loop starts from.
    """
    host, conditions = learn(pipe, [*prompts, ""], **call)
    rows = torch.arange(count) % len(prompts)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, *host.shape, generator=generator)
    made = []
    for start in range(0, count, batch):
        part = slice(start, start + batch)
        wanted = [prompts[row] for row in rows[part]]
        made.append(_finished(pipe, wanted, z[part].to(host.dtype), call))
        told(min(count, start + batch))
    x0 = torch.cat(made)
    if x0.shape != z.shape:
        raise ModelError(f"{type(pipe).__name__} gives latents of shape {tuple(x0.shape[1:])}, its network reads {host.shape}.")
    empty = conditions.rows(torch.tensor([len(prompts)]))
    kept = conditions.rows(torch.arange(len(prompts)))
    return Store(tuple(prompts), kept, empty, rows, x0.float(), z, host.shape)


def _finished(pipe: Any, prompts: list[str], z: Tensor, call: dict[str, Any]) -> Tensor:
    """The latents at the end of the pipeline's loop, on the CPU."""
    given = dict(call)
    if given.get("negative_prompt") is not None:
        given["negative_prompt"] = [given["negative_prompt"]] * len(prompts)
    with torch.no_grad():
        made = pipe(**given, prompt=prompts, latents=z, output_type="latent")[0]
    return torch.as_tensor(made).cpu()
