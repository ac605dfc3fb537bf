"""Swapping the host's scheduler for another of diffusers' solvers, for as long as a session is open."""

from __future__ import annotations

import functools
from typing import Any

from hasten.errors import UsageError
from hasten.samplers.solver import Solver
from hasten.session import Attachment

FLOW = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}
VARIANCE_PRESERVING = {
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "unipc": "UniPCMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}


def other_scheduler(scheduler: Any, name: str) -> Any:
    """diffusers' solver `name` with the noise schedule of `scheduler`. Raises `UsageError` where there is none."""
    import diffusers

    if name == "keep":
        return scheduler
    flow = "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas", False)
    table = FLOW if flow else VARIANCE_PRESERVING
    if name not in table:
        raise UsageError(f"Solver {name!r} has no form for {type(scheduler).__name__}; allowed: {', '.join(table)}.")
    changes: dict[str, Any] = {}
    if flow and name in ("unipc", "dpm++"):
        shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))
        changes = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    return getattr(diffusers, table[name]).from_config(scheduler.config, **changes)


def swap_scheduler(attachment: Attachment, host: Any, solver: Solver) -> None:
    """Give `host` the solver until `attachment` is restored, asking it for a share of the steps."""
    new = other_scheduler(host.scheduler, solver.name)
    attachment.replace(host, "scheduler", new)
    if solver.steps == 1.0:
        return
    original = new.set_timesteps

    @functools.wraps(original)
    def fewer(num_inference_steps: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if num_inference_steps is None:
            raise UsageError("sampler.steps needs a number of steps; this pipeline passes its own list of sigmas.")
        return original(max(1, round(num_inference_steps * solver.steps)), *args, **kwargs)

    attachment.replace(new, "set_timesteps", fewer)
