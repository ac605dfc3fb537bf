"""The model's network in a loop that stands still, where a skipped step has to give what a computed one gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hasten.errors import RefusedError
from hasten.pipelines.doctor.backends import Check, Inapplicable
from hasten.pipelines.doctor.model import ALTERNATE, Model, own, same, stood_in, without_hasten
from hasten.pipelines.host import Call, Output
from hasten.pipelines.seams.stack import SKIP_TOLERANCE, SKIP_TOLERANCE_HALF
from hasten.pipelines.session import Session
from hasten.recipe import Recipe

INJECTIONS = (
    "controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states", "controlnet_residual",
    "controlnet_states", "control_hidden_states", "down_block_additional_residuals", "mid_block_additional_residual",
    "down_intrablock_additional_residuals", "ip_adapter_image_embeds", "ip_hidden_states", "image_embeds",
)  # fmt: skip
"""What networks call the tensors of a ControlNet, of VACE and of an IP-Adapter, as arguments or inside a dict of them."""

ALONE = "its network cannot be called on its own"

TOGGLED = ((0, 1), (1, 0), (0,), (0,), (0, 1), (1,))
"""The branches of each step when they come in the other order, when guidance is off, and when only it is asked for."""


class Ticks:
    """The scheduler of a loop that stands still. Its nodes are no network's times, so the clock takes none for one."""

    def __init__(self) -> None:
        self.timesteps = torch.empty(0)

    def set_timesteps(self, num: int) -> None:
        """A run of `num` steps starts."""
        self.timesteps = -2500.5 - 100 * torch.arange(float(num))

    def step(self, model_output: Tensor) -> None:
        """A step ends."""


@dataclass
class Loop:
    """The recorded call again and again. outputs: (step, branch) -> the network's first output."""

    model: Model
    outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def given(self, branch: int, share: float = 1.0) -> Call:
        """The recorded call with the conditioning of `branch` (0: as recorded) and `share` of the latents."""
        call = self.model.recorded

        def conditioned(tensor: Tensor) -> Tensor:
            # Turned as well as scaled, because a norm behind it would take the scale away.
            return tensor.roll(branch, -1) * (1 + 0.1 * branch) if tensor.is_floating_point() and tensor.ndim else tensor

        def change(name: str, value: Any) -> Any:
            if name == call.layout.sample:
                return own(value, lambda x: x * share if x.is_floating_point() else x)
            return own(value, conditioned) if branch and name in call.layout.conditioning else value

        return _changed(call, change)

    def evaluate(self, branch: int, share: float = 1.0) -> Tensor:
        """One evaluation of whatever stands on the network now."""
        return evaluated(self.model, self.given(branch, share))

    def run(self, branches: Sequence[Sequence[int]], ticks: Ticks, *, moving: bool = False) -> None:
        """One pass of `len(branches)` steps. moving: other latents at each step, the same for all branches."""
        ticks.set_timesteps(len(branches))
        for step, chosen in enumerate(branches):
            for branch in chosen:
                self.outputs[step, branch] = self.evaluate(branch, 1 - 0.1 * step * moving)
            ticks.step(self.outputs[step, chosen[0]])


def evaluated(model: Model, call: Call) -> Tensor:
    """The first output of the network for `call`, on its device."""
    twin = call.copy()
    with torch.no_grad():
        return Output(model.network(*twin.args, **twin.kwargs)).tensors[0].clone()


def looped(
    model: Model, recipe: Recipe, branches: Sequence[Sequence[int]], *, moving: bool = False
) -> tuple[dict[tuple[int, int], Tensor], Session]:
    """The outputs of an accelerated loop, and its session."""
    loop, ticks = Loop(model), Ticks()
    with model.session(recipe, model.network, scheduler=ticks) as session:
        loop.run(branches, ticks, moving=moving)
    assert stood_in(session), f"nothing was skipped: {'; '.join(session.trace.notes) or 'no reason is told'}"
    return loop.outputs, session


def checks(model: Model) -> Iterator[Check]:
    """Branches and injections, on the network alone."""
    yield model.attempt("branch isolation", lambda: isolated(model))
    yield model.attempt("1, 2, 3 and 4 branches", lambda: counted(model))
    yield model.attempt("branches come and go", lambda: toggled(model))
    yield model.attempt("injected tensors", lambda: injected(model))


# --- branches -------------------------------------------------------------------------------------


def isolated(model: Model) -> str:
    """Two branches in turns: a skipped evaluation gives what that very branch computes."""
    plain = _distinct(model, 2)
    for which, recipe in ALTERNATE.items():
        outputs, session = looped(model, recipe, [(0, 1)] * 4)
        for (step, branch), value in outputs.items():
            near(value, plain[branch], f"{which}, step {step}, branch {branch}", exact=_whole(session))
    return f"two branches in turns, each with its own output{_told(session)}"


def counted(model: Model) -> str:
    """Every branch of a loop with up to four of them computes and skips as in a loop of its own."""
    _distinct(model, 4)
    for which, recipe in ALTERNATE.items():
        alone = [looped(model, recipe, [(branch,)] * 4, moving=True)[0] for branch in range(4)]
        for num in (2, 3, 4):
            outputs, session = looped(model, recipe, [tuple(range(num))] * 4, moving=True)
            for (step, branch), value in outputs.items():
                where = f"{which}, {num} branches, step {step}, branch {branch}"
                near(value, alone[branch][step, branch], where, exact=_whole(session))
    return f"each branch as in a loop of its own{_told(session)}"


def toggled(model: Model) -> str:
    """The second branch is left out, comes back, and comes first: everybody still gets their own output."""
    plain = _distinct(model, 2)
    for which, recipe in ALTERNATE.items():
        outputs, session = looped(model, recipe, TOGGLED)
        for (step, branch), value in outputs.items():
            near(value, plain[branch], f"{which}, step {step}, branch {branch}", exact=_whole(session))
    return f"off, on and in another order{_told(session)}"


def near(value: Tensor, expected: Tensor, what: str, *, exact: bool) -> None:
    """Raise `AssertionError` unless both are the same: to the bit, or to what adding a residual again may lose."""
    if exact:
        same(value, expected, what)
        return
    assert value.shape == expected.shape, f"{what}: shape {tuple(value.shape)}, not {tuple(expected.shape)}"
    off = float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    allowed = SKIP_TOLERANCE if expected.dtype == torch.float32 else SKIP_TOLERANCE_HALF
    assert off <= allowed, f"{what}: off by {off:.1e}, at most {allowed:.0e} can be rounding"


def _distinct(model: Model, num: int) -> list[Tensor]:
    """The plain output of each branch; `Inapplicable` where they are all alike, for then nothing could be told."""
    loop = Loop(model)
    with without_hasten(ALONE):
        plain = [loop.evaluate(branch) for branch in range(num)]
    if not model.recorded.conditioning:
        raise Inapplicable(f"{model.site} is given no conditioning by which branches could differ")
    if any(torch.equal(a, b) for i, a in enumerate(plain) for b in plain[:i]):
        raise Inapplicable(f"another conditioning does not change what {model.site} returns")
    return plain


# --- injections -----------------------------------------------------------------------------------


def injected(model: Model) -> str:
    """What is added between blocks still acts when the blocks are skipped: change it there, and the output changes."""
    names = [name for name in model.recorded.layout.names if _carries(name, model.recorded.get(name))]
    if not names:
        raise Inapplicable("the pipeline hands its network nothing of a ControlNet, of VACE or of an IP-Adapter")
    stronger = _changed(model.recorded, _stronger)
    with without_hasten(ALONE):
        kept, changed = evaluated(model, model.recorded), evaluated(model, stronger)
    if torch.equal(kept, changed):
        raise Inapplicable(f"a change of {', '.join(names)} does not change what {model.site} returns")
    ticks = Ticks()
    skipped = []
    with model.session(ALTERNATE["blocks"], model.network, scheduler=ticks) as session:
        for second in (model.recorded, stronger):
            ticks.set_timesteps(2)
            for call in (model.recorded, second):
                skipped.append(evaluated(model, call))
                ticks.step(skipped[-1])
    if _whole(session):
        note = next((note for note in session.trace.notes if "instead" in note), "")
        assert note, "blocks were to be skipped, the whole network was held, and nobody was told"
        raise RefusedError(note)
    near(skipped[1], kept, f"{', '.join(names)} unchanged, blocks skipped", exact=False)
    moved, whole = (float((a - b).norm()) for a, b in ((skipped[3], skipped[1]), (changed, kept)))
    assert moved > 0, f"a change of {', '.join(names)} on a skipped step has no effect"
    return f"{', '.join(names)}: {moved / whole:.0%} of the effect of a change is there on a skipped step"


def _carries(name: str, value: object) -> bool:
    """Is an argument, or something inside a dict of arguments, what somebody injects?"""
    if isinstance(value, dict):
        return any(_carries(key, inner) for key, inner in value.items())
    return name in INJECTIONS and value is not None


def _stronger(name: str, value: Any) -> Any:
    """`value` with everything injected in it scaled."""
    if name in INJECTIONS:
        return own(value, lambda tensor: tensor * 1.5 if tensor.is_floating_point() else tensor)
    return {key: _stronger(key, inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _changed(call: Call, change: Callable[[str, Any], Any]) -> Call:
    """A copy of `call` with `change` applied to every argument by name."""
    names, positional = call.layout.names, call.args
    args = tuple(change(name, value) for name, value in zip(names, positional, strict=False))
    return Call(call.layout, args, {name: change(name, value) for name, value in call.kwargs.items()})


def _whole(session: Session) -> bool:
    """Was the whole network held, by wish or because its blocks cannot be skipped?"""
    return all(event.blocks is None for event in session.trace.events if event.action in ("reuse", "forecast"))


def _told(session: Session) -> str:
    return "; its blocks cannot be skipped, so only the whole network was" if _whole(session) else ""
