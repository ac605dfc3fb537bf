"""Swapping the host's scheduler for another of diffusers' solvers, for as long as a session is open.

The solvers are diffusers'. Their ways of choosing noise levels disagree with each other (DDIM and PNDM step by T // n
wherever their levels are; DPM++ mixes a variance-preserving table into the karras levels of a flow), so that levels that
hasten chooses are written into the scheduler after its own `set_timesteps` has put everything else back to the start.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from hasten.errors import RefusedError, UsageError
from hasten.pipelines.quiet import quiet
from hasten.pipelines.travel import travelling
from hasten.samplers.levels import SHARES, between, shares, shifted
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
HIGHEST = 1 - 1e-6
"""A flow's solvers of several orders take log(1 - sigma), which all noise has none of; diffusers' UniPC starts here, too."""

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
        made.set_timesteps = _pinned(made, scheduler, solver)
        return made
    known = inspect.signature(made.set_timesteps).parameters
    if "mu" in known and not made.config.get("use_dynamic_shifting"):
        made.set_timesteps = _without_mu(made)
    if is_flow(made) and "sigmas" not in known and "mu" not in known:
        made.set_timesteps = _told(made, scheduler, solver)
    if solver.name == "pndm":
        made.set_timesteps = _even(made)
    if solver.steps < 1:
        made.set_timesteps = _fewer(made, solver.steps)
    return made


def _walker(travel: TimeTravel) -> Solver:
    """What walks between the travels. First-order DPM-Solver++ is both DDIM and Euler's method on a flow."""
    fields = {name: getattr(travel, name) for name in Solver.model_fields}
    return Solver(**fields | ({} if travel.name == "dpm++" else {"name": "dpm++", "order": 1}))


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


def _told(scheduler: Any, host: Any, solver: Solver) -> Callable[..., None]:
    """Its `set_timesteps` for pipelines that tell a list of sigmas, which it walks as the host would, shift and all."""
    original = scheduler.set_timesteps

    def told(
        num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None
    ) -> None:
        original(len(sigmas) if sigmas is not None else num_inference_steps, device=device)
        if sigmas is not None:
            shift = _shift(host.config, solver, mu if host.config.get("use_dynamic_shifting") else None)
            levels = [shifted(float(u), shift) for u in sigmas]
            _write(scheduler, [sigma * scheduler.config.num_train_timesteps for sigma in levels], levels)

    return told


def _pinned(scheduler: Any, host: Any, solver: Solver) -> Callable[..., None]:
    """Its `set_timesteps` with the solver's levels, whatever its caller asks for."""
    given = scheduler.set_timesteps

    def pinned(
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        asked = next((len(levels) for levels in (timesteps, sigmas) if levels is not None), num_inference_steps)
        if not asked or asked < 1:
            raise UsageError(f"A run needs at least one step, got {asked}.")
        n = len(solver.times) if solver.times else max(1, round(asked * solver.steps))
        levels = _flow_levels(scheduler, host, solver, n, mu) if is_flow(scheduler) else _levels(scheduler, solver, n)
        given(num_inference_steps=n, device=device)
        _write(scheduler, *levels)

    return pinned


def _flow_levels(scheduler: Any, host: Any, solver: Solver, n: int, mu: float | None) -> tuple[list[float], list[float]]:
    """(times, sigmas) of n evaluations."""
    trained = scheduler.config.num_train_timesteps
    shift = _shift(host.config, solver, mu if host.config.get("use_dynamic_shifting") else None)
    smallest = 1 / trained
    if solver.times is not None:
        sigmas = list(solver.times)
    elif solver.spacing in SHARES:
        sigmas = [shifted(u, shift) for u in shares(solver.spacing, n, smallest)]  # type: ignore[arg-type]
    else:
        sigmas = between(solver.spacing, n, 1.0, shifted(smallest, shift))  # type: ignore[arg-type]
    if "solver_order" in scheduler.config:
        sigmas[0] = min(sigmas[0], HIGHEST)
    return [sigma * trained for sigma in sigmas], sigmas


def _shift(config: Any, solver: Solver, mu: float | None) -> float:
    """The shift of a flow. mu: what a pipeline works out from the size, log(shift) or the shift itself; None for the host's."""
    if solver.shift is not None:
        return solver.shift
    if mu is not None:
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    return float(config.get("shift", config.get("flow_shift", 1.0)))


def _levels(scheduler: Any, solver: Solver, n: int) -> tuple[list[float], list[float]]:
    """(times, noise over signal) of n evaluations; times between the trained whole ones are read between their logarithms."""
    trained = scheduler.config.num_train_timesteps
    cumulative = scheduler.alphas_cumprod.double()
    table = (0.5 * ((1 - cumulative).log() - cumulative.log())).tolist()
    if solver.times is not None or solver.spacing in SHARES:
        u = list(solver.times or shares(solver.spacing, n, 1 / trained))  # type: ignore[arg-type]
        if u[-1] * trained < 1 - 1e-6:
            raise UsageError(f"sampler.times ends at {u[-1]:g}; the least noise of this model is at 1 / {trained}.")
        times = [max(0.0, share * trained - 1) for share in u]
    else:
        wanted = between(solver.spacing, n, math.exp(table[-1]), math.exp(table[0]))  # type: ignore[arg-type]
        times = [_between(table, range(trained), math.log(sigma)) for sigma in wanted]
    return times, [math.exp(_between(range(trained), table, time)) for time in times]


def _between(knots: Any, values: Any, at: float) -> float:
    """The value at `at` on straight lines through (knots, values); knots rise."""
    low, high = 0, len(knots) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if knots[middle] <= at else (low, middle)
    place = min(max((at - knots[low]) / (knots[high] - knots[low]), 0.0), 1.0)
    return float(values[low] + place * (values[high] - values[low]))


def _write(scheduler: Any, times: list[float], sigmas: list[float]) -> None:
    """Put the levels where diffusers' solvers read them; those that evaluate twice per step have the inner ones twice."""
    stops = scheduler.config.get("final_sigmas_type") == "sigma_min" and not is_flow(scheduler)
    levels = [*sigmas, float(_smallest(scheduler)) if stops else 0.0]
    if "Heun" in type(scheduler).__name__:
        levels = [levels[0], *(sigma for sigma in levels[1:-1] for _ in range(2)), levels[-1]]
        times = [times[0], *(time for time in times[1:] for _ in range(2))]
    device = scheduler.timesteps.device
    scheduler.sigmas = torch.tensor(levels, dtype=torch.float32, device=scheduler.sigmas.device)
    scheduler.timesteps = torch.tensor(times, dtype=torch.float32, device=device)


def _smallest(scheduler: Any) -> Any:
    """Noise over signal of the least noise that was trained on."""
    least = scheduler.alphas_cumprod[0]
    return ((1 - least) / least).sqrt()
