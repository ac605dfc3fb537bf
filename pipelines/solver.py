"""Swapping the host's scheduler for another of diffusers' solvers, for as long as a session is open.

The solvers are diffusers'. Where hasten chooses the noise levels, `hasten.pipelines.solver_levels` writes them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from hasten.errors import RefusedError, UsageError
from hasten.pipelines.quiet import quiet
from hasten.pipelines.solver_levels import pinned, told
from hasten.pipelines.solver_mix import mixing
from hasten.pipelines.travel import travelling
from hasten.samplers.solver import Solver
from hasten.samplers.travel import TimeTravel
from hasten.scheduler import is_flow
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
    "pndm": "PNDMScheduler",
}
_DPM = "DPMSolverMultistepScheduler"
_ONE_ORDER = {"solver_order": 1, "algorithm_type": "dpmsolver++", "thresholding": False, "variance_type": None}
"""First-order DPM-Solver++ is DDIM (arXiv 2211.01095, section 4), and goes from any level to any other."""

_TRAINED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
            "rescale_betas_zero_snr")  # fmt: skip
"""What the network was trained with. Said even where the host left it at its default: the default of another class may be
another number (HeunDiscreteScheduler's betas)."""

_OWN_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def other_scheduler(scheduler: Any, name: str) -> Any:
    """diffusers' solver `name` with the noise schedule of `scheduler`. Raises `UsageError` where there is none."""
    return scheduler if name == "keep" else _made(scheduler, Solver(name=name))


def scheduler_for(scheduler: Any, solver: Solver) -> Any:
    """A new scheduler of diffusers that does what `solver` says on the noise schedule of `scheduler`.

    Raises `UsageError` where there is no such solver for the kind of model, `RefusedError` where it would be wrong.
    """
    if isinstance(solver, TimeTravel):
        return travelling(scheduler_for(scheduler, _walker(solver)), solver)
    made = _made(scheduler, solver)
    if solver.own_levels:
        made.set_timesteps = pinned(made, scheduler, solver)
        return made if solver.weights is None else mixing(made, solver.weights)
    known = inspect.signature(made.set_timesteps).parameters
    if "mu" in known and not made.config.get("use_dynamic_shifting"):
        made.set_timesteps = _without_mu(made)
    if is_flow(made) and "sigmas" not in known and "mu" not in known:
        made.set_timesteps = told(made, scheduler, solver)
    if solver.name == "pndm":
        made.set_timesteps = _even(made)
    if solver.steps < 1:
        made.set_timesteps = _fewer(made, solver.steps)
    return made


def _walker(travel: TimeTravel) -> Solver:
    """What walks between the travels. First-order DPM-Solver++ is both DDIM and Euler's method on a flow."""
    fields = {name: getattr(travel, name) for name in Solver.model_fields}
    return Solver(**fields | ({} if travel.name == "dpm++" else {"name": "dpm++", "order": 1}))


def segment(scheduler: Any, n: int, start: int, stop: int, *, straight: bool = False) -> Any:
    """A DPM-Solver scheduler that walks levels `start` to `stop` of n even ones, n being no noise, whatever it is asked for.

    straight: in one step. Its first and last steps are of the first order. Raises as `scheduler_for` does.
    """
    part = Solver(name="dpm++", order=2, spacing="trailing")
    with quiet("diffusers"):
        made = _made(scheduler, part)
    made.set_timesteps = pinned(made, scheduler, part, n=n, start=start, stop=stop, straight=straight)
    return made


def swap_scheduler(attachment: Attachment, host: Any, solver: Solver) -> None:
    """Give `host` the solver until `attachment` is restored. Raises as `scheduler_for` does."""
    if solver.name == "keep" and solver == Solver(name="keep", steps=solver.steps):
        if solver.steps < 1:
            attachment.replace(host.scheduler, "set_timesteps", _fewer(host.scheduler, solver.steps))
        return
    with quiet("diffusers"):  # it warns of every setting that the other solver does not have
        attachment.replace(host, "scheduler", scheduler_for(host.scheduler, solver))


def _made(scheduler: Any, solver: Solver) -> Any:
    """The solver's scheduler, with the noise schedule of `scheduler` and diffusers' own levels."""
    import diffusers

    config, flow = scheduler.config, is_flow(scheduler)
    kind, changes = _kind(scheduler, solver, flow), {}
    made: Any = getattr(diffusers, kind, None) or type(scheduler)
    known = inspect.signature(made.__init__).parameters
    if solver.own_levels and (config.get("invert_sigmas") or config.get("timestep_type") == "continuous"):
        raise RefusedError(
            f"The times of this {type(scheduler).__name__} are counted another way (invert_sigmas, or continuous timesteps), so"
            " levels of ours would mean something else. Leave out sampler.spacing and sampler.times."
        )
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        raise RefusedError(
            f"{kind} cannot do a noise schedule with no signal at its end (rescale_betas_zero_snr), as {type(scheduler).__name__}"
            " has. Take unipc, dpm++, euler or ddim."
        )
    if flow and kind in (FLOW["unipc"], FLOW["dpm++"]):
        shift = config.get("shift", config.get("flow_shift", 1.0))
        changes = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    changes |= _ordered(kind, solver, known) | _shifted(kind, solver, flow, known)
    if solver.name == "pndm":
        changes |= _for_pndm(config)
    if solver.own_levels:
        changes |= {name: False for name in (*_OWN_SPACINGS, "use_dynamic_shifting") if name in known}
        if solver.name == "ddim" and not flow:
            last = "zero" if config.get("set_alpha_to_one", True) else "sigma_min"
            changes |= _ONE_ORDER | {"final_sigmas_type": last}
    # "_" marks what diffusers remembers of the configuration itself, such as which settings were left at their defaults.
    kept = {name: value for name, value in config.items() if name in known or name.startswith("_")}
    return made.from_config(kept, **{name: config[name] for name in _TRAINED if name in kept} | changes)


def _kind(scheduler: Any, solver: Solver, flow: bool) -> str:
    """Name of the class of diffusers that walks so. Raises `UsageError` where there is none."""
    table, own = FLOW if flow else VARIANCE_PRESERVING, type(scheduler).__name__
    if solver.name == "keep":
        name = next((name for name, kind in table.items() if kind == own), None)
        if solver.own_levels and name in (None, "pndm"):
            raise UsageError(
                f"{own} takes no levels of ours; name the solver: {', '.join(n for n in table if n != 'pndm')}."
            )
        return _DPM if solver.own_levels and name == "ddim" else own
    if solver.name not in table:
        raise UsageError(f"Solver {solver.name!r} has no form for {own}; allowed: {', '.join(table)}.")
    return _DPM if solver.own_levels and solver.name == "ddim" else table[solver.name]


def _ordered(kind: str, solver: Solver, known: Any) -> dict[str, Any]:
    if solver.order is None:
        return {}
    if "solver_order" not in known:
        raise UsageError(f"sampler.order is {solver.order}, and {kind} has one order only. Name dpm++ or unipc, or leave it out.")
    return {"solver_order": solver.order}


def _shifted(kind: str, solver: Solver, flow: bool, known: Any) -> dict[str, Any]:
    if solver.shift is None:
        return {}
    if not flow:
        raise UsageError(
            f"sampler.shift moves the levels of flow-matching models, and {kind} is variance preserving. Set sampler.spacing or"
            " sampler.times."
        )
    fixed = {"use_dynamic_shifting": False} if "use_dynamic_shifting" in known else {}
    return fixed | {name: solver.shift for name in ("shift", "flow_shift") if name in known}


def _for_pndm(config: Any) -> dict[str, Any]:
    if config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise RefusedError(f"PNDMScheduler does not know predictions of kind {config['prediction_type']!r}. Take unipc or dpm++.")
    # Its step is T // n wherever its levels are: linspace's are elsewhere. Without the Runge-Kutta steps: one call more than n.
    spacing = config.get("timestep_spacing", "leading")
    kept = spacing if spacing in ("leading", "trailing") else "leading"
    return {"skip_prk_steps": True, "timestep_spacing": kept, "set_alpha_to_one": config.get("set_alpha_to_one", True)}


# --- what is asked of it in a run ------------------------------------------------------------------


def _fewer(scheduler: Any, share: float) -> Callable[..., Any]:
    """Its `set_timesteps` with a share of the steps."""
    original = scheduler.set_timesteps

    @functools.wraps(original)
    def fewer(num_inference_steps: int | None = None, *args: Any, **kwargs: Any) -> Any:
        if num_inference_steps is None:
            raise UsageError("sampler.steps needs a number of steps; this pipeline passes its own list of sigmas.")
        return original(max(1, round(num_inference_steps * share)), *args, **kwargs)

    return fewer


def _even(scheduler: Any) -> Callable[..., Any]:
    """PNDM's `set_timesteps`, which refuses steps that it would not take."""
    original, trained = scheduler.set_timesteps, scheduler.config.num_train_timesteps

    @functools.wraps(original)
    def even(num_inference_steps: int, *args: Any, **kwargs: Any) -> Any:
        if scheduler.config.timestep_spacing == "trailing" and trained % num_inference_steps:
            whole = [n for n in range(1, trained + 1) if trained % n == 0]
            below, above = max(n for n in whole if n <= num_inference_steps or n == 1), [n for n in whole if n > num_inference_steps]
            raise RefusedError(
                f"PNDM steps by whole times, and {num_inference_steps} even steps of {trained} are not; next to it are"
                f" {below} and {min(above, default=trained)}. Ask for one of them, or take dpm++ or unipc."
            )
        return original(num_inference_steps, *args, **kwargs)

    return even


def _without_mu(scheduler: Any) -> Callable[..., Any]:
    """Its shift does not depend on the size: what a pipeline works out for it (`mu`) is left unread, as flow-matching Euler does."""
    original = scheduler.set_timesteps

    @functools.wraps(original)
    def unshifted(*args: Any, mu: float | None = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return unshifted
