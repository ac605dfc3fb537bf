"""A student's sampling on an unmodified pipeline: another scheduler with its levels pinned, and calls without guidance.

Levels cannot be told to most pipelines, and guidance cannot be told to a scheduler, so both are arranged here: the
scheduler answers every `set_timesteps` with the student's own levels, and the pipeline is, for as long as the session is
open, of a class of its own whose call overrules steps and guidance. No class that others use is touched.

Shapes: x [B, ...] the latents.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from typing import Any

import torch
from torch import Tensor

from hasten.errors import RefusedError, UsageError
from hasten.samplers.few_calls import FewCalls
from hasten.session import Attachment

SCHEDULERS = {
    ("ode", "sigmas"): "FlowMatchEulerDiscreteScheduler",
    ("consistency", "sigmas"): "FlowMatchLCMScheduler",
    ("ode", "timesteps"): "DPMSolverMultistepScheduler",
    ("consistency", "timesteps"): "LCMScheduler",
}
"""(how, which levels) -> the scheduler of diffusers that does it."""

_FLOW: dict[str, Any] = {"shift": 1.0}
_VARIANCE_PRESERVING: dict[str, dict[str, Any]] = {
    # First order and down to no noise at all: DDIM.
    "DPMSolverMultistepScheduler": {
        "solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero", "thresholding": False,
        "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False,
        "use_flow_sigmas": False, "variance_type": None,
    },
    # A large scaling turns LCM's boundary condition into "what the network says": c_skip = 0, c_out = 1 in float32.
    "LCMScheduler": {
        "clip_sample": False, "thresholding": False, "timestep_scaling": 1e6, "rescale_betas_zero_snr": False,
    },
}  # fmt: skip


def kind_of(part: FewCalls) -> str:
    """Name of the scheduler class of diffusers that samples so."""
    return SCHEDULERS[part.how, "sigmas" if part.sigmas else "timesteps"]


def levels_of(part: FewCalls) -> dict[str, list[Any]]:
    """The levels as an argument of `set_timesteps`, and of the call of pipelines that have it."""
    return {"sigmas": list(part.sigmas)} if part.sigmas else {"timesteps": list(part.timesteps or ())}


def changes(part: FewCalls, host: Any) -> dict[str, Any]:
    """What that scheduler's configuration has to say; `host` is the pipeline's own scheduler.

    Raises `UsageError` where the model is of the other kind, `RefusedError` for a path that no scheduler here walks.
    """
    kind, config = kind_of(part), host.config
    flow = "FlowMatch" in type(host).__name__ or config.get("use_flow_sigmas", False)
    if flow != bool(part.sigmas):
        told, wanted = ("sigmas", "timesteps") if part.sigmas else ("timesteps", "sigmas")
        raise UsageError(
            f"sampler.{told} are for the other kind of model: {type(host).__name__} is"
            f" {'flow matching' if flow else 'variance preserving'} and takes {wanted}. Load the model that the student is of."
        )
    if config.get("invert_sigmas"):
        raise RefusedError(f"{type(host).__name__} counts its noise backwards (invert_sigmas); no few-call scheduler does.")
    times = int(config.get("num_train_timesteps", 1000))
    if flow:
        return _FLOW | {"num_train_timesteps": times}
    if config.get("rescale_betas_zero_snr") and part.how == "consistency":
        raise RefusedError("LCMScheduler and a table with zero signal at its end (rescale_betas_zero_snr) do not go together.")
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    same = {key: config[key] for key in kept if key in config}
    if kind == "LCMScheduler":
        same["original_inference_steps"] = times
    elif "rescale_betas_zero_snr" in config:
        same["rescale_betas_zero_snr"] = config["rescale_betas_zero_snr"]
    return same | _VARIANCE_PRESERVING[kind]


def scheduler_for(part: FewCalls, host: Any) -> Any:
    """A scheduler of diffusers that evaluates at the part's levels and no others, whatever it is asked for.

    `part.how` is "consistency": noise that its caller gives no generator for is, row by row, a function of the latents it
    started from, so that a seed still decides the picture; most pipelines give their scheduler none.
    Raises as `changes` does.
    """
    import diffusers

    made = getattr(diffusers, kind_of(part))(**changes(part, host))
    given = made.set_timesteps
    levels = levels_of(part)

    @functools.wraps(given)
    def pinned(num_inference_steps: int | None = None, device: Any = None, *args: Any, **kwargs: Any) -> None:
        given(device=device, **levels)

    made.set_timesteps = pinned
    if part.how == "consistency":
        made.step = _seeded(made)
    return made


def _seeded(scheduler: Any) -> Any:
    """The scheduler's `step` with a generator where the caller gives none."""
    step = scheduler.step
    drawn: list[torch.Generator] = []

    @functools.wraps(step)
    def seeded(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs.get("generator") is not None:
            return step(model_output, timestep, sample, *args, **kwargs)
        if scheduler.step_index in (None, 0) or not drawn:
            drawn[:] = generators(sample)
        return step(model_output, timestep, sample, **{**kwargs, "generator": list(drawn)})

    return seeded


def generators(x: Tensor) -> list[torch.Generator]:
    """A generator for each row, a function of the noise that the row starts from: one look at the device per run."""
    starts = x.detach().flatten(1)[:, :256].float().cpu().numpy()
    digests = [hashlib.blake2b(start.tobytes(), digest_size=8).digest() for start in starts]
    return [torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1) for digest in digests]


def sample_in_few_calls(attachment: Attachment, pipe: Any, part: FewCalls) -> str:
    """Give `pipe` the student's scheduler and its way of being called until `attachment` is restored.

    Returns what was done, in words. Raises as `changes` does, and `RefusedError` while another session has done so.
    """
    plain = type(pipe)
    if hasattr(plain, "_hasten_plain"):
        raise RefusedError(f"A student is sampled from this {plain.__name__} already. Close that session first.")
    attachment.replace(pipe, "scheduler", scheduler_for(part, pipe.scheduler))
    become(attachment, pipe, _call(plain, part), arguments(plain, part))
    calls = f"{part.calls} call{'s' if part.calls > 1 else ''}"
    return f"{calls} by {kind_of(part)}, no guidance"


def _call(plain: Any, part: FewCalls) -> Any:
    """The call of the pipeline's class while a student is sampled."""
    original = plain.__call__
    overruled = arguments(plain, part)

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(self, *args, **kwargs)
        for name in ("sigmas", "timesteps"):
            bound.arguments.pop(name, None)
        bound.arguments.update(overruled)
        return original(*bound.args, **bound.kwargs)

    return call


def become(attachment: Attachment, pipe: Any, call: Any, overruled: dict[str, Any]) -> None:
    """Give `pipe` a class of its own whose `__call__` is `call`, until `attachment` is restored.

    overruled: the arguments that `call` sets, for `overruled_by`.
    """
    plain = type(pipe)

    def reduce(self: Any, protocol: Any) -> Any:
        """A copy or a pickle of such a pipeline is a plain one."""
        state: Any = object.__reduce_ex__(self, protocol)
        made, (kind, *rest), *more = state
        return (made, (plain if kind is type(self) else kind, *rest), *more)

    members = {"__call__": call, "__reduce_ex__": reduce, "_hasten_plain": plain, "_hasten_call": overruled}
    made = type(plain.__name__, (plain,), members)
    made.__module__, made.__qualname__, made.__doc__ = plain.__module__, plain.__qualname__, plain.__doc__
    object.__setattr__(pipe, "__class__", made)
    attachment.on_restore(lambda: object.__setattr__(pipe, "__class__", plain))


def overruled_by(pipe: Any) -> dict[str, Any]:
    """The arguments that a student's session sets in every call of `pipe`; {} where there is none."""
    return dict(getattr(type(pipe), "_hasten_call", {}))


def arguments(plain: Any, part: FewCalls) -> dict[str, Any]:
    """Arguments of a call of this class of pipeline that a student needs: steps, and guidance off."""
    known = inspect.signature(plain.__call__).parameters
    second = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
    wanted: dict[str, Any] = {"num_inference_steps": part.calls, second: 1.0}
    if part.guidance is not None and second != "guidance_scale":
        wanted["guidance_scale"] = part.guidance
    return {name: value for name, value in wanted.items() if name in known}
