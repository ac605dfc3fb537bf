"""Gates on the deep part of a U-Net: on a skipped step they return shapes, and the last of them the deep feature."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hasten.caching.histories import Key, key_of
from hasten.pipelines.seams.module_gate import ModuleProxy
from hasten.pipelines.seams.stack_gate import Gate, GateList
from hasten.pipelines.seams.unet_layers import Cut, aligned
from hasten.session import Attachment

Where = tuple[Hashable, ...]
"""Which gate: part of the U-Net, block, name of the list inside it, layer."""


class DeepGates:
    """Gates on everything between the last shallow down layer and the first shallow up layer of one U-Net.

    What is shallow is not touched at all.
    """

    def __init__(self, model: nn.Module, cut: Cut) -> None:
        self.model, self.cut = model, cut
        self._attachment = Attachment()
        self._active = threading.local()

    def attach(self) -> None:
        """Put the gates where the network looks for its blocks and layers."""
        model: Any = self.model
        (last, end), (first, begin) = self.cut.down, self.cut.up
        self._gate(model, "down_blocks", ("down",), range(last + 1, len(model.down_blocks)))
        self._gate(model, "up_blocks", ("up",), range(first))
        proxy = ModuleProxy(model.mid_block, partial(self._call, ("mid",), model.mid_block))
        self._attachment.replace(model, "mid_block", proxy)
        down, up = model._modules["down_blocks"][last], model._modules["up_blocks"][first]
        num = len(down.resnets)
        for name in aligned(down):
            self._gate(down, name, ("down", last, name), range(end + 1, num))
        if end < num and getattr(down, "downsamplers", None) is not None:
            self._gate(down, "downsamplers", ("down", last, "downsamplers"), range(len(down.downsamplers)))
        for name in aligned(up):
            self._gate(up, name, ("up", first, name), range(begin))

    def detach(self) -> None:
        """Give the network its own blocks and layers back."""
        self._attachment.restore()
        self._attachment = Attachment()

    def run(self, forward: Callable[[], Any], walk: Walk) -> Any:
        """Run `forward` with the gates following `walk`."""
        self._active.walk = walk
        try:
            return forward()
        finally:
            self._active.walk = None

    def _gate(self, owner: Any, name: str, where: Where, numbers: range) -> None:
        """Shadow a list; only the modules at `numbers` are gated."""
        if not numbers:
            return
        modules = getattr(owner, name)

        def run(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index not in numbers:
                return module(*args, **kwargs)
            return self._call((*where, index), module, *args, **kwargs)

        gates = [Gate(module, i, run) for i, module in enumerate(modules)]
        self._attachment.replace(owner, name, GateList(modules, gates))

    def _call(self, where: Where, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        walk: Walk | None = getattr(self._active, "walk", None)
        return module(*args, **kwargs) if walk is None else walk.module(where, module, args, kwargs)


class Shapes:
    """What the deep part returned when it was computed, without the numbers. entry: the gate that returns the feature."""

    def __init__(self) -> None:
        self.entry: Where = ()
        self._seen: dict[Where, tuple[TreeSpec, list[Any]]] = {}
        self._inputs: dict[Where, Key] = {}

    def fits(self, where: Where, given: Key) -> bool:
        """Was this gate computed on an input of this kind? A session nested inside may run a part of the batch only."""
        return self._inputs.get(where) == given

    def note(self, where: Where, given: Key, value: Any) -> Tensor:
        """One gate was computed; the last one of the evaluation is the entry. Returns its stream, the first tensor."""
        self._inputs[where] = given
        leaves, spec = tree_flatten(value)
        self.entry = where
        # One zero, seen in the shape of the whole tensor: it costs no memory.
        blank = [x.new_zeros(()).expand(x.shape) if isinstance(x, Tensor) else x for x in leaves]
        self._seen[where] = (spec, blank)
        stream: Tensor = next(x for x in leaves if isinstance(x, Tensor))
        return stream

    def blank(self, where: Where, feature: Tensor | None) -> Any:
        """The gate's return value made of zeros, with `feature` in place of its stream where one is given."""
        spec, seen = self._seen[where]
        leaves = list(seen)
        first = next(i for i, x in enumerate(leaves) if isinstance(x, Tensor))
        # The stream is a tensor of its own, because networks add to it in place (T2I-Adapter).
        leaves[first] = leaves[first].clone() if feature is None else feature
        return tree_unflatten(leaves, spec)


class Walk:
    """One evaluation of a U-Net. feature: what comes up from below on a skipped step; None to compute it, also where the
    gates find that it does not fit.

    deep: the feature that was computed, once it is known.
    """

    def __init__(self, shapes: Shapes, feature: Tensor | None) -> None:
        self.shapes, self.feature = shapes, feature
        self.deep: Tensor | None = None

    def module(self, where: Where, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of a gate."""
        given = key_of(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
        if self.feature is not None and not self.shapes.fits(where, given):
            self.feature = None  # seen at the first gate, so that all of them are computed
        if self.feature is not None:
            return self.shapes.blank(where, self.feature if where == self.shapes.entry else None)
        value = module(*args, **kwargs)
        self.deep = self.shapes.note(where, given, value)
        return value
