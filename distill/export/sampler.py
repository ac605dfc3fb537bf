"""A student's sampling as a scheduler of diffusers, so that plain diffusers makes the same pictures.

In flow matching the angle tau is the share of noise sigma = sin / (sin + cos), and an Euler step in it keeps x0 and z, as
`ode` does. A variance-preserving network has whole times; `ode` is DDIM, which diffusers' DDIMScheduler does for evenly
spaced times alone, but its multistep solver at first order for any. `consistency` is what both LCM schedulers do.

Shapes: K calls; angles [K] radians.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from hasten.distill.network.chunks import ChunkSteps
from hasten.distill.network.few_steps import FewSteps
from hasten.distill.network.paths import Flow, NoisePath, VariancePreserving
from hasten.errors import RefusedError
from hasten.pipelines.host import Layout, denoisers
from hasten.pipelines.seams.few_calls import arguments, changes, kind_of, levels_of, scheduler_for
from hasten.samplers.chunk_calls import ChunkCalls
from hasten.samplers.few_calls import FewCalls

__all__ = ["describe", "few_calls", "scheduler_for", "told_guidance"]


def few_calls(steps: FewSteps, path: NoisePath, guidance: float | None = None) -> FewCalls:
    """The student's sampler as a recipe's part. guidance: what the network is told, where guidance is an input of it.

    Raises `RefusedError` for angles at which no scheduler of diffusers asks: flow matching that does not start at pure
    noise (a pipeline starts there), flow maps, times between those of a table, and LCM at the table's first time.
    """
    if steps.how == "map":
        raise RefusedError(
            "A flow map is told where each of its steps ends, and no scheduler of diffusers can tell its network that. Sample"
            " it with hasten.distill.network.few_steps, or train a method whose student is sampled by 'ode' or 'consistency'."
        )
    angles = torch.tensor(steps.angles, dtype=torch.float64)
    if isinstance(path, Flow):
        sigmas = (path.time(angles) / path.unit).tolist()
        if abs(sigmas[0] - 1) > 1e-6:
            raise RefusedError(
                f"The student's first call is at sigma = {sigmas[0]:.4f}, and pipelines of flow matching start at 1."
                " Train it with its first angle at pi / 2."
            )
        levels = (1.0, *sigmas[1:])
        if isinstance(steps, ChunkSteps):
            return ChunkCalls(how=steps.how, sigmas=levels, guidance=guidance, chunk=steps.chunk, first=steps.first)
        return FewCalls(how=steps.how, sigmas=levels, guidance=guidance)
    if isinstance(steps, ChunkSteps):
        raise RefusedError("Chunks of frames are sampled from flow-matching models alone; this one is variance preserving.")
    assert isinstance(path, VariancePreserving)
    times = path.time(angles)
    off = [float(t) for t in times if abs(float(t) - round(float(t))) > 1e-4]
    if off:
        raise RefusedError(
            f"The student is asked at time {off[0]:.2f}, and diffusers' schedulers know whole times only. Train it with"
            " FewSteps.even, or at whole times."
        )
    whole = tuple(int(t) for t in times.round().tolist())
    if steps.how == "consistency" and whole[-1] == 0:
        raise RefusedError("LCMScheduler takes time 0 for finished data. Train the student with its last call at 1 or later.")
    return FewCalls(how=steps.how, timesteps=whole, guidance=guidance)


def told_guidance(pipe: Any, call: Mapping[str, Any]) -> float | None:
    """The guidance that `pipe` tells its network as an input when called with `call`; None where it tells none."""
    known = inspect.signature(type(pipe).__call__).parameters
    if "true_cfg_scale" not in known or "guidance_scale" not in known:
        return None
    told = any("guidance" in Layout.of(network).names for network in denoisers(pipe).values())
    value = call.get("guidance_scale", known["guidance_scale"].default)
    return float(value) if told and value is not None else None


def describe(part: FewCalls, pipe: Any) -> dict[str, Any]:
    """The sampler in plain values for headers and other programs: class and configuration of the scheduler, its levels,
    and the arguments of the pipeline's call; without a scheduler for chunks of frames. Raises as `few_calls`, and for a model of the other kind."""
    if isinstance(part, ChunkCalls):  # no scheduler of diffusers goes chunk by chunk
        return {"how": part.how, **levels_of(part), "chunk": part.chunk, "first": part.first, "call": arguments(type(pipe), part)}
    return {
        "how": part.how, "scheduler": kind_of(part), "config": changes(part, pipe.scheduler), **levels_of(part),
        "call": arguments(type(pipe), part),
    }  # fmt: skip
