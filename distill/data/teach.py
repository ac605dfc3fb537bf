"""Pairs from the teacher: noise, what the teacher's own pipeline makes of it, and points of the way between.

Shapes: N rows; z, x0 [N, ...] in the network's scale; way [N, P, ...] on the circle (see `network/paths.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hasten.distill.data.parts import Parts
from hasten.distill.data.store import Store
from hasten.distill.network.few_steps import FewSteps
from hasten.distill.network.host_call import HostCall, learn
from hasten.distill.network.paths import spread
from hasten.errors import ModelError, UsageError
from hasten.pipelines.host import Call
from hasten.session import Attachment


def make_pairs(
    pipe: Any, prompts: Sequence[str], count: int, *, seed: int = 0, batch: int = 16, points: int = 0,
    parts: Parts | None = None, told: Callable[[int], None] = lambda done: None, **call: Any,
) -> Store:  # fmt: skip
    """`count` samples of the teacher, the prompts in turn, with the noise each was made of.

    The teacher is the pipeline as it is called: its solver, steps and guidance are those of `call`. points: where the
    teacher was at the angles of so many even calls is kept, too, but for the first of them, which is the noise. parts:
    keeps each finished batch, and has those of a run that was stopped. told: is given the number of finished rows. Raises `ModelError` where noise that is handed over is not what the loop starts
    from; `UsageError` where the teacher has fewer steps than points.
    """
    host, conditions = learn(pipe, [*prompts, ""], **call)
    rows = torch.arange(count) % len(prompts)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, *host.shape, generator=generator)
    angles = FewSteps.even(points, host.path).angles[1:] if points > 1 else ()
    made = []
    for number, start in enumerate(range(0, count, batch)):
        found = None if parts is None else parts.load(number)
        if found is None:
            part = slice(start, start + batch)
            found = _taught(pipe, host, [prompts[row] for row in rows[part]], z[part], angles, call)
            if parts is not None:
                parts.save(number, found)
        made.append(found)
        told(min(count, start + batch))
    x0 = torch.cat([found["x0"] for found in made])
    if x0.shape != z.shape:
        raise ModelError(f"{type(pipe).__name__} gives latents of shape {tuple(x0.shape[1:])}, its network reads {host.shape}.")
    empty = conditions.rows(torch.tensor([len(prompts)]))
    kept = conditions.rows(torch.arange(len(prompts)))
    way = torch.cat([found["way"] for found in made]) if angles else None
    return Store(tuple(prompts), kept, empty, rows, x0.float(), z, host.shape, way=way)


def _taught(
    pipe: Any, host: HostCall, wanted: list[str], z: Tensor, angles: Sequence[float], call: dict[str, Any]
) -> dict[str, Tensor]:
    """x0 of one batch of noise, and where the teacher was at these angles."""
    with _watched(host, len(wanted)) as visited:
        x0 = _finished(pipe, wanted, z.to(host.dtype), call)
    return {"x0": x0} | ({"way": _between(visited | {0.0: x0.float()}, angles)} if angles else {})


@contextmanager
def _watched(host: HostCall, rows: int) -> Iterator[dict[float, Tensor]]:
    """Angle -> what the network read there [rows, ...], on the circle, float32 on the CPU."""
    seen: dict[float, Tensor] = {}
    hold, forward = Attachment(), host.network.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        call = Call(host.layout, args, kwargs)
        tau = host.path.angle(torch.as_tensor(call.timestep).flatten()[:1].cpu())
        x = call.sample[:rows].detach().float().cpu()
        seen[float(tau)] = x / spread(host.path.scale(tau), x)  # guided pipelines show the same latents twice
        return forward(*args, **kwargs)

    hold.replace(host.network, "forward", watched)
    try:
        yield seen
    finally:
        hold.restore()


def _between(seen: dict[float, Tensor], angles: Sequence[float]) -> Tensor:
    """Points at these angles [rows, P, ...], each between the two visited ones around it: on the arc on which x0 and z stay
    what they are, as in a DDIM step, and so exact where the teacher's steps are."""
    taus = sorted(seen)
    found = []
    for angle in angles:
        above = next((i for i, tau in enumerate(taus) if tau >= angle), 0)
        if len(taus) <= len(angles) or above == 0:
            raise UsageError(f"The teacher makes {len(taus) - 1} steps, too few for points at {len(angles) + 1} calls.")
        low, high = taus[above - 1], taus[above]
        parts = torch.tensor([angle - low, high - angle, high - low], dtype=torch.float64).sin()
        found.append(float(parts[0] / parts[2]) * seen[high] + float(parts[1] / parts[2]) * seen[low])
    return torch.stack(found, 1)


def _finished(pipe: Any, prompts: list[str], z: Tensor, call: dict[str, Any]) -> Tensor:
    """The latents at the end of the pipeline's loop, on the CPU."""
    given = dict(call)
    if given.get("negative_prompt") is not None:
        given["negative_prompt"] = [given["negative_prompt"]] * len(prompts)
    with torch.no_grad():
        made = pipe(**given, prompt=prompts, latents=z, output_type="latent")[0]
    return torch.as_tensor(made).cpu()
