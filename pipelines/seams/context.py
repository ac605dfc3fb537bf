"""Context reuse on a masked image model: gates on its transformer layers and on their keys and values."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hasten.caching.context import OUTPUT, ContextReuse, ContextState, every_second, gathered, scattered
from hasten.caching.histories import Key, key_of
from hasten.caching.network import NetworkReuse
from hasten.forecast import Hold
from hasten.pipelines.host import Call, is_whole_compiled
from hasten.pipelines.seams.module_gate import ModuleProxy
from hasten.pipelines.seams.proof import loss_of_repeat
from hasten.pipelines.seams.reuse import HistorySeam
from hasten.pipelines.seams.stack_gate import Gate, GateList
from hasten.session import Attachment
from hasten.step import Step

if TYPE_CHECKING:
    from hasten.pipelines.seams.denoiser_gate import DenoiserGate

LAYERS = "transformer_layers"
"""Attribute under which diffusers' masked image models keep the layers that work on tokens."""


class ContextSeam(HistorySeam):
    """Puts `ContextReuse` onto one masked image model. The trace counts its tokens, not its blocks; the convolutions
    around the layers run at every step and are not counted."""

    def __init__(self, gate: DenoiserGate, policy: ContextReuse) -> None:
        super().__init__(gate)
        self.policy = policy
        self.state: ContextState | None = None
        self._attachment = Attachment()
        self._active = threading.local()
        self._proved = False
        self._refused = False
        reason = unsuitable(gate.model)
        if reason:
            self._refuse(reason)
        else:
            self._attach()

    def begin_run(self, times: Sequence[float]) -> None:
        self.state = None if self._refused else self.policy.start(times)
        if self.state is not None:
            self.state.histories.agree = self.gate.agree

    def compute(self, step: Step, call: Call, share: float) -> Any:
        """Run the network on all tokens, or on those that are not mere context."""
        state, ids = self.state, call.sample
        mask: Any = getattr(self.gate.session.clock.scheduler, "config", {}).get("mask_token_id")
        if state is not None and (mask is None or ids.is_floating_point() or ids.ndim != 3):
            self._refuse("its input is no grid of token ids with a mask token that the scheduler knows")
            return self.gate.seam.compute(step, call, share)
        if state is None:
            return super().compute(step, call, share)
        key, spare = key_of(ids), call.copy()
        walk = Walk(state, step, key, state.active(step, key, ids, int(mask)))
        events = [self.gate.event(step, "compute")]
        if walk.positions is not None:
            held = state.held(step, OUTPUT, key)
            assert held is not None
            span = (walk.positions.shape[1], held.shape[1])
            if span[0] < span[1]:
                events.append(self.gate.event(step, "reuse", f"{self.gate.site}.tokens", span))
        result = self.gate.timed(step, lambda: self._run(call, walk), share=share, events=events)
        if not self._proved and self.gate.repeatable(spare):
            self._prove(step, key, spare, result)
        return result

    def release(self) -> None:
        self._attachment.restore()

    # --- inside -----------------------------------------------------------------------------------

    def _attach(self) -> None:
        layers = getattr(self.gate.model, LAYERS)
        for number, layer in enumerate(layers):
            for name in ("to_k", "to_v"):
                module = getattr(layer.attn1, name)
                proxy = ModuleProxy(module, partial(self._project, f"{number}.{name}", module))
                self._attachment.replace(layer.attn1, name, proxy)
        last = len(layers) - 1

        def run(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            walk: Walk | None = getattr(self._active, "walk", None)
            if walk is None:
                return layer(*args, **kwargs)
            x = args[0] if index else walk.enter(args[0])
            y = layer(x, *args[1:], **kwargs)
            return y if index < last else walk.leave(OUTPUT, y)

        self._attachment.replace(self.gate.model, LAYERS, GateList(layers, [Gate(m, i, run) for i, m in enumerate(layers)]))

    def _project(self, site: str, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        y = module(*args, **kwargs)
        walk: Walk | None = getattr(self._active, "walk", None)
        return y if walk is None else walk.leave(site, y)

    def _run(self, call: Call, walk: Walk, *, ours: bool = False) -> Any:
        self._active.walk = walk
        try:
            return self.gate.rehearse(call) if ours else self.gate.evaluate(call)
        finally:
            self._active.walk = None

    def _prove(self, step: Step, key: Key, call: Call, computed: Any) -> None:
        """Once per session: every second token alone, on the very input that was just computed, gives the same."""
        self._proved = True
        assert self.state is not None
        held = self.state.held(step, OUTPUT, key)
        if held is None:
            self._refuse("its layers did not run")
            return
        walk = Walk(self.state, step, key, every_second(held), keeps=False)
        loss = loss_of_repeat(computed, lambda: self._run(call, walk, ours=True))
        if loss:
            self._refuse(loss)
            return
        self.gate.session.trace.structure.pop(self.gate.site, None)
        self.gate.session.trace.structure[f"{self.gate.site}.tokens"] = held.shape[1]

    def _refuse(self, reason: str) -> None:
        """Tokens cannot be left out on this network: cache the whole network instead."""
        self._refused, self.state = True, None
        policy = NetworkReuse(rule=self.policy.rule, forecast=Hold())
        self.gate.fall_back(policy, f"context caching is refused ({reason})")


class Walk:
    """One evaluation. positions: (batch, n) of the tokens that are computed, None for all. keeps: whether it is kept."""

    def __init__(
        self, state: ContextState, step: Step, key: Key, positions: Tensor | None, *, keeps: bool = True
    ) -> None:
        self.state, self.step, self.key, self.positions, self.keeps = state, step, key, positions, keeps

    def enter(self, x: Tensor) -> Tensor:
        """What the first layer is given."""
        return x if self.positions is None else gathered(x, self.positions)

    def leave(self, site: str, y: Tensor) -> Tensor:
        """`y` of the computed tokens, completed by what is kept of the others."""
        if self.positions is not None:
            held = self.state.held(self.step, site, self.key)
            assert held is not None, "a local evaluation follows a full one"
            y = scattered(held, self.positions, y)
        if self.keeps:
            self.state.keep(self.step, site, self.key, y)
        return y


def unsuitable(model: nn.Module) -> str:
    """Why context reuse cannot work on `model`; "" when it may."""
    layers = model._modules.get(LAYERS)
    if is_whole_compiled(model):
        return "the whole network is one compiled function"
    if LAYERS in vars(model):
        return "another open session gates its layers; put both into one recipe, or close that session first"
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return f"it has no {LAYERS}, as masked image models do"
    for layer in layers:
        attention = layer._modules.get("attn1")
        if attention is None or not {"to_q", "to_k", "to_v"} <= set(attention._modules):
            return "a layer has no self-attention with key and value projections"
        if is_whole_compiled(layer):
            return "its layers are compiled"
    return ""
