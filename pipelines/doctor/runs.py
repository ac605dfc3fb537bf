"""Runs that go differently: broken off, at another size, with another solver, guidance or pipeline in between."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hasten.errors import UsageError
from hasten.pipelines import sizes
from hasten.pipelines.doctor.backends import Check, Inapplicable
from hasten.pipelines.doctor.model import REMEMBERING, STEPS, Model, same, short, stood_in, without_hasten
from hasten.pipelines.doctor.network import ALONE, evaluated
from hasten.pipelines.doctor.promises import never_skipping
from hasten.pipelines.host import denoisers
from hasten.pipelines.solver import other_scheduler
from hasten.recipe import Recipe
from hasten.session import Attachment


def checks(model: Model) -> Iterator[Check]:
    """All of them, each with whole-network reuse and with block reuse where steps are skipped."""
    yield model.attempt("interrupt, then restart", lambda: interrupted(model))
    yield model.attempt("another size", lambda: resized(model))
    yield model.attempt("Heun", lambda: heun(model))
    yield model.attempt("guidance off in mid-run", lambda: unguided(model))
    yield model.attempt("second thread", lambda: second_thread(model))
    yield model.attempt("shared network", lambda: shared(model))


@contextmanager
def each_call(model: Model, action: Callable[[int], None]) -> Iterator[None]:
    """Call `action` with the number of the call (from 0) whenever this thread calls a network of the pipeline."""
    mine, calls = threading.get_ident(), [0]

    def hook(module: Any, args: Any) -> None:
        if threading.get_ident() == mine:
            number, calls[0] = calls[0], calls[0] + 1
            action(number)

    handles = [network.register_forward_pre_hook(hook) for network in denoisers(model.pipe).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- broken off -----------------------------------------------------------------------------------


def interrupted(model: Model) -> str:
    """The pipeline's own interruption in the middle of a run; the next run in the session is as if it were the first."""
    if not isinstance(getattr(type(model.pipe), "interrupt", None), property):
        raise Inapplicable(f"{type(model.pipe).__name__} cannot be interrupted; see exception in mid-run")
    cut: list[Tensor] = []

    def interrupt(number: int) -> None:
        if number == STEPS // 2:
            model.pipe._interrupt = True

    for which, recipe in REMEMBERING.items():
        clean = model.run(recipe)
        with model.session(recipe) as session:
            with each_call(model, interrupt):
                cut.append(model.once())
            again = model.once()
        assert not torch.equal(cut[-1], clean), f"{which}: the interruption changed nothing"
        assert not session.trace.runs[0].finished, f"{which}: the interrupted run counts as finished"
        same(again, clean, which)
    return "the next run in the same session is clean"


# --- another size ---------------------------------------------------------------------------------


def resized(model: Model) -> str:
    """A second run at another size, in the same session, is what a session at that size gives."""
    size, told = _other_size(model)
    for which, recipe in REMEMBERING.items():
        fresh, session = model.watched(recipe, **size)
        assert stood_in(session), f"{which}: nothing was skipped at {told}"
        with model.session(recipe):
            model.once()
            second = model.once(**size)
            back = model.once()
        same(second, fresh, f"{which} at {told}")
        same(back, model.run(recipe), f"{which}, back at the usual size")
    return f"{told} after the usual size, and back, each as in a session of its own"


def _other_size(model: Model) -> tuple[dict[str, int], str]:
    """Arguments of another size that the pipeline takes; `Inapplicable` with its reason where it takes none."""
    known = inspect.signature(model.pipe.__call__).parameters
    if not {"height", "width"} <= known.keys():
        raise Inapplicable(f"{type(model.pipe).__name__} has no height and width to choose")
    multiple = sizes.side_multiple(model.pipe)
    usual, width = _usual(model, "height"), _usual(model, "width")
    reason = "its latents stay as they are"
    for height in (usual - multiple, usual + multiple, usual // 2 // multiple * multiple, usual * 2):
        try:
            if height > 0 and model.run(height=height, width=width).shape != model.reference.shape:
                return {"height": height, "width": width}, f"{height} x {width}"
        except Exception as error:  # noqa: BLE001 - whatever the pipeline says is the reason
            reason = short(error)
    raise Inapplicable(f"the pipeline refuses other sizes than its own ({reason})")


def _usual(model: Model, side: str) -> int:
    """The height or width of the reference: as called, the pipeline's default, or what its network was made for."""
    default = inspect.signature(model.pipe.__call__).parameters[side].default
    named = model.call.get(side) or (default if isinstance(default, int) else None)
    if named:
        return int(named)
    size = getattr(model.pipe, "default_sample_size", None) or getattr(model.network.config, "sample_size", None)
    sample = (size[0] if side == "height" else size[-1]) if isinstance(size, list | tuple) else size
    return int(sample or 64) * int(getattr(model.pipe, "vae_scale_factor", None) or 8)


# --- another solver -------------------------------------------------------------------------------


def heun(model: Model) -> str:
    """Two evaluations in each step but one: nothing skipped is nothing changed, and skipping is followed."""
    try:
        new = other_scheduler(model.pipe.scheduler, "heun")
    except (UsageError, TypeError, ValueError) as error:
        raise Inapplicable(f"{type(model.pipe.scheduler).__name__} has no Heun mate ({error})") from None
    attachment = Attachment()
    attachment.replace(model.pipe, "scheduler", new)
    try:
        with without_hasten(f"the pipeline cannot drive {type(new).__name__}"):
            plain = model.run()
        for which, recipe in never_skipping().items():
            calls: list[int] = []
            with each_call(model, calls.append):
                result, session = model.watched(recipe)
            same(result, plain, f"never-skip, {which}")
            seen, steps = session.report().evaluations, session.trace.runs[0].steps
            assert seen == len(calls), f"never-skip, {which}: {seen} of {len(calls)} evaluations were followed"
        for which, recipe in REMEMBERING.items():
            first, session = model.watched(recipe)
            assert stood_in(session) and session.trace.runs[0].finished, f"{which}: the run was not followed"
            assert torch.isfinite(first).all(), f"{which}: the result holds NaN or infinity"
            same(model.watched(recipe, times=2)[0], first, f"{which}, second run")
    finally:
        attachment.restore()
    return f"{type(new).__name__}, {steps} evaluations in {(steps + 1) // 2} steps, all followed"


# --- guidance -------------------------------------------------------------------------------------


def unguided(model: Model) -> str:
    """Guidance switched off after half of the steps, by the pipeline's callback."""
    changes: dict[str, Any] = {"callback_on_step_end": _no_guidance_after_half(model)}
    names = getattr(model.pipe, "_callback_tensor_inputs", ["latents"])
    if not model.step_callback or not hasattr(model.pipe, "_guidance_scale"):
        raise Inapplicable(f"guidance of {type(model.pipe).__name__} cannot be changed in mid-run; see branches come and go")
    changes["callback_on_step_end_tensor_inputs"] = list(names)
    with without_hasten("the pipeline cannot do without guidance in mid-run"):
        plain = model.run(**changes)
    if torch.equal(plain, model.reference):
        raise Inapplicable(f"{type(model.pipe).__name__} does not look at its guidance after the first step")
    for which, recipe in never_skipping().items():
        same(model.run(recipe, **changes), plain, f"never-skip, {which}")
    for which, recipe in REMEMBERING.items():
        clean, once = model.run(recipe), model.run(recipe, **changes)
        assert torch.isfinite(once).all(), f"{which}: the result holds NaN or infinity"
        with model.session(recipe):
            model.once()
            same(model.once(**changes), once, f"{which}, second run")
            same(model.once(), clean, f"{which}, guided again")
    return f"off after step {STEPS // 2}, and on again in the next run"


def _no_guidance_after_half(model: Model) -> Callable[..., dict[str, Any]]:
    """A callback; where both branches are one batch, their embeddings are cut to the conditional half."""

    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index != STEPS // 2 - 1:
            return {}
        pipe._guidance_scale = 1.0
        batch = tensors["latents"].shape[0]
        both = {k: v for k, v in tensors.items() if isinstance(v, Tensor) and v.ndim and v.shape[0] == 2 * batch}
        return {name: value[batch:] for name, value in both.items()}

    return callback


# --- others on the same network -------------------------------------------------------------------


def second_thread(model: Model) -> str:
    """Before each call of the run somebody else calls the network from another thread: neither notices the other."""
    with without_hasten(ALONE):
        expected = evaluated(model, model.recorded)
    for which, recipe in REMEMBERING.items():
        clean = model.run(recipe)
        seen: list[Tensor] = []

        def intrude(number: int, seen: list[Tensor] = seen) -> None:
            thread = threading.Thread(target=lambda: seen.append(evaluated(model, model.recorded)))
            thread.start()
            thread.join()

        calls: list[int] = []
        with model.session(recipe), each_call(model, intrude), each_call(model, calls.append):
            disturbed = model.once()
        assert len(seen) == len(calls), f"{which}: {len(calls) - len(seen)} of the other thread's calls failed"
        for value in seen:
            same(value, expected, f"{which}, the other thread's output")
        same(disturbed, clean, f"{which}, the run itself")
    return f"{len(seen)} calls from another thread in one run, none answered or remembered"


def shared(model: Model) -> str:
    """A second pipeline over the same networks: untouched by the session, in mid-run too; then with its own."""
    mate = copy.copy(model.pipe)
    vars(mate)["scheduler"] = copy.deepcopy(model.pipe.scheduler)
    for which, recipe in REMEMBERING.items():
        clean = model.run(recipe)
        _beside(model, mate, recipe, clean, which)
        with model.session(recipe) as one, model.session(recipe, mate) as two:
            same(model.once(), clean, f"{which}, two sessions, the first")
            same(model.once(mate), clean, f"{which}, two sessions, the second")
        assert len(one.trace.runs) == len(two.trace.runs) == 1, f"{which}: a session followed the other's run"
    return "a second pipeline over the network gets plain results, in mid-run too, and its own from a session of its own"


def _beside(model: Model, mate: Any, recipe: Recipe, clean: Tensor, which: str) -> None:
    """`mate` without a session, before, during and after runs of the session's own pipeline."""
    seen: list[Tensor] = []

    def intrude(number: int) -> None:
        if number == STEPS // 2:
            seen.append(torch.empty(0))  # the mate's own calls come here, too
            seen[0] = model.once(mate)

    with model.session(recipe):
        same(model.once(mate), model.reference, f"{which}, the other pipeline before a run")
        same(model.once(), clean, f"{which}, the run itself")
        with each_call(model, intrude):
            assert torch.isfinite(model.once()).all(), f"{which}: the disturbed run holds NaN or infinity"
        same(model.once(), clean, f"{which}, the run after a disturbed one")
    same(seen[0], model.reference, f"{which}, the other pipeline in mid-run")
