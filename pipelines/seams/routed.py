"""A student's own width on one network: at each time only the heads, channels and tokens run that its routers open.

Shapes: B rows; N tokens of width D, of which k run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.caching.routed import RoutedReuse
from hasten.caching.routers import Opening, RoutedModule, Routers
from hasten.errors import ModelError
from hasten.pipelines.host import Call, is_whole_compiled
from hasten.pipelines.seams.reuse import ReuseSeam
from hasten.pipelines.seams.width_gate import WidthGates, WidthSite
from hasten.pipelines.seams.writes import twin
from hasten.step import Step
from hasten.trace import Event

if TYPE_CHECKING:
    from hasten.pipelines.seams.denoiser_gate import DenoiserGate


class RoutedSeam(ReuseSeam):
    """Puts `RoutedReuse` onto one network. Where a module cannot be run so, the student runs in full, which it was
    trained for, too, and the report says why.

    Raises `ModelError` for routers of another network.
    """

    def __init__(self, gate: DenoiserGate, policy: RoutedReuse) -> None:
        super().__init__(gate)
        self.routers = Routers.load(policy.place)
        self.openings: dict[float, dict[str, Opening]] = {}
        self.nodes: list[float] = []
        self.gates: WidthGates | None = None
        self.learned = False
        if is_whole_compiled(gate.model):
            self._run_in_full("the whole network is one compiled function")
            return
        self.gates = WidthGates(gate.model)
        self._check(self.gates)

    def begin_run(self, times: Sequence[float]) -> None:
        scheduler = self.gate.session.clock.scheduler
        unit = float(scheduler.config.get("num_train_timesteps", 1000))
        nodes = [float(node) / unit for node in torch.as_tensor(scheduler.timesteps).tolist()]
        self.nodes = nodes[len(nodes) - len(times) :]
        device = next(self.gate.model.parameters()).device
        for u in self.nodes:
            if u not in self.openings:
                self.openings[u] = {name: _on(device, one) for name, one in self.routers.openings(u).items()}

    def compute(self, step: Step, call: Call, share: float) -> Any:
        """Run the network at its width at this time."""
        if self.gates is None or step.index >= len(self.nodes):
            return super().compute(step, call, share)
        if not self.learned and not self._learn(call):
            return super().compute(step, call, share)
        if not self.gate.repeatable(call):
            return super().compute(step, call, share)
        gates, events = self.gates, list[Event]()

        def work() -> Any:
            walk = RoutedWalk(self.routers, self.openings[self.nodes[step.index]])
            result = gates.run(lambda: self.gate.evaluate(call), walk)
            events.append(self.gate.event(step, "compute", share=1.0 - walk.saved / max(1, gates.flops)))
            return result

        return self.gate.timed(step, work, share=share, events=events)

    def release(self) -> None:
        if self.gates is not None:
            self.gates.detach()

    # --- inside -----------------------------------------------------------------------------------

    def _check(self, gates: WidthGates) -> None:
        """Are these routers of this network?"""
        units = {site.name: site.cut.num for site in gates.sites}
        kind = type(self.gate.model).__name__
        for one in self.routers.routed:
            if one.name in gates.refused:
                self._run_in_full(f"{one.name} {gates.refused[one.name]}")
                return
            if units.get(one.name) != one.units:
                raise ModelError(
                    f"The routers are of another network: {one.name!r} has {one.units} heads or channels there, and"
                    f" {units.get(one.name, 'no such module is')} in this {kind}. Load the model that the student is of."
                )

    def _learn(self, call: Call) -> bool:
        """The first call of all: evaluate once more, in full, to prove that what is cut is right."""
        gates, gate, spare = self.gates, self.gate, twin(call)
        assert gates is not None
        self.learned = gates.learn(lambda: gate.rehearse(spare), "stored", gate.agree, tokens=True)
        if not self.learned:  # a NaN: in full now, and looked at again next time
            return False
        widths = {site.name: site.width for site in gates.sites}
        bad = [one for one in self.routers.routed if not _fits(one, widths)]
        if bad:
            reason = gates.refused.get(bad[0].name, "does not treat its tokens one by one")
            self._run_in_full(f"{bad[0].name} {reason}")
            return False
        gate.session.note(f"{gate.site}: one extra evaluation was spent on proving that the student may be cut.", warn=False)
        return True

    def _run_in_full(self, reason: str) -> None:
        self.gate.session.note(f"{self.gate.site}: the student runs in full, as running what its routers open is refused ({reason}).")
        if self.gates is not None:
            self.gates.detach()
        self.gates = None


class RoutedWalk:
    """One evaluation of a network with only what is open. saved: floating point operations not spent."""

    def __init__(self, routers: Routers, openings: dict[str, Opening]) -> None:
        self.routers, self.openings, self.saved = routers, openings, 0.0
        self._names: set[str] = set()

    def module(self, site: WidthSite, full: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        opening = self.openings.get(site.name)
        again = site.name in self._names
        self._names.add(site.name)
        if opening is None or opening.all or again or site.cut.wrapped(site.module):
            return full(*args, **kwargs)
        run = full if opening.units is None else site.cut.twin(site.module, opening.units)
        if opening.tokens >= 1:
            self.saved += site.flops * (1 - opening.width)
            return run(*args, **kwargs)
        x: Tensor = next(iter((*args, *kwargs.values())))
        rows = self.routers.chosen(site.name, x, opening.tokens)
        self.saved += site.flops * (1 - opening.width * rows.shape[1] / x.shape[1])
        index = rows[:, :, None].expand(-1, -1, x.shape[2])
        made = run(x.gather(1, index))
        return torch.zeros_like(x, dtype=made.dtype).scatter(1, index, made)


def _on(device: torch.device, opening: Opening) -> Opening:
    """The same with its numbers on `device`, so that no step has to send them there."""
    units = None if opening.units is None else opening.units.to(device)
    return Opening(units, opening.tokens, opening.width)


def _fits(one: RoutedModule, widths: dict[str, int]) -> bool:
    return one.name in widths and (not one.width or widths[one.name] == one.width)
