"""The layers of a language model, each of which may compute other tokens: the seam for `hasten.caching.depth`.

A plain list of gates shadows the list of decoder layers on the instance. A call without a `Depth` passes them unnoticed; with
one, a layer runs on the tokens that it asks for, and what goes into the next layer is what it makes of them.

Shapes: m texts, N tokens of a call, n of which a layer computes, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.caching.depth import Depth, Values, put
from hasten.caching.store import KVStore, Pass
from hasten.errors import RefusedError
from hasten.pipelines.seams.stack_gate import Gate, GateList
from hasten.session import Attachment

if TYPE_CHECKING:
    from hasten.pipelines.text_models.host import TextHost

TOLERANCE, TOLERANCE_HALF = 1e-3, 5e-2
"""Layers that get their tokens in another order may differ by this much (relative, max norm)."""


class TextLayers:
    """The layers of one host. Raises `RefusedError` where they cannot be found.

    ways: how a layer's values are computed from its input, and what part of the layer's weights that takes.
    """

    def __init__(self, host: TextHost) -> None:
        self.host = host
        self.owner, self.name = _layers(host.model, host.facts.layers)
        self.ways: dict[int, tuple[Values, float]] = {}
        self._proved = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Gates stand before the layers within; `host.attached()` has to be entered first.

        The first time, the model is asked whether its layers can be run on tokens apart: `RefusedError` if not.
        """
        attachment = Attachment()
        blocks = getattr(self.owner, self.name)
        gates = [Gate(block, number, self._run) for number, block in enumerate(blocks)]
        attachment.replace(self.owner, self.name, GateList(blocks, gates))
        try:
            if not self._proved:
                self._prove()
            yield
        finally:
            attachment.restore()
            for gate in gates:
                gate.rest()

    def _run(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What stands for a call of one layer."""
        now, store = self.host.tap.now, self.host.tap.store
        if now is None or now.depth is None:
            return layer(*args, **kwargs)
        assert store is not None and now.work is not None
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        index = now.depth.enter(number, x, now, self._values(number, now))
        if index is None:
            out = self._watched(number, layer, args, kwargs, x) if self._new(number, now.depth) else layer(*args, **kwargs)
            part = now
        else:
            part = now.part(index, store.slots)
            texts, count = now.slots.shape
            self.host.tap.now = part
            try:
                out = layer(*_cut(args, index, texts, count), **{k: _cut(v, index, texts, count) for k, v in kwargs.items()})
            finally:
                self.host.tap.now = now
        now.work.add_((part.slots < store.slots).sum(1))
        y = out if isinstance(out, Tensor) else out[0]
        goes_on = now.depth.leave(number, x, y, index, now)
        return goes_on if isinstance(out, Tensor) else type(out)((goes_on, *out[1:]))

    # --- values -------------------------------------------------------------------------------------

    def _new(self, number: int, depth: Depth) -> bool:
        return depth.valued and number not in self.ways

    def _values(self, number: int, now: Pass) -> Values | None:
        """The way to a layer's values, which counts what it costs."""
        if number not in self.ways:
            return None
        way, share = self.ways[number]

        def counted(x: Tensor) -> Tensor:
            assert now.work is not None and self.host.tap.store is not None
            now.work.add_(share * (now.slots < self.host.tap.store.slots).sum(1))
            return way(x)

        return counted

    def _watched(self, number: int, layer: nn.Module, args: Any, kwargs: dict[str, Any], x: Tensor) -> Any:
        """Run the layer, and find out which of its modules make its values. Waits for the device, once per model."""
        seen: list[tuple[nn.Module, Tensor, Tensor]] = []

        def record(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
            if given and isinstance(given[0], Tensor) and isinstance(made, Tensor):
                seen.append((module, given[0], made))

        handles = [module.register_forward_hook(record) for module in layer.modules() if module is not layer]
        try:
            out = layer(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        now, store = self.host.tap.now, self.host.tap.store
        assert now is not None and store is not None
        held = store.values[number][now.members[:, None], now.slots].flatten(2)
        found = _way(seen, x, held, now.slots < store.slots)
        if found is None:
            raise RefusedError(
                f"The values of layer {number} of {type(self.host.model).__name__} are not one projection of its normalised"
                " input, so they cannot be computed without the layer. Take another cache, such as 'attention-drift' or"
                " 'dual'."
            )
        weights = sum(parameter.numel() for parameter in layer.parameters())
        self.ways[number] = found[0], found[1] / max(1, weights)
        return out

    # --- proof --------------------------------------------------------------------------------------

    def _prove(self) -> None:
        """A call in which each layer gets its tokens in reverse must give what a plain one gives."""
        name = type(self.host.model).__name__
        try:
            plain = self.host.run(*_trial(self.host, None))
            now, store = _trial(self.host, _Reversed())
            apart = self.host.run(now, store)
        except Exception as error:  # any failure is a reason not to run layers on tokens apart
            raise RefusedError(
                f"The layers of {name} cannot be run on some of the tokens ({type(error).__name__}: {error}). Take a cache"
                " that computes the same tokens in all layers, such as 'dual'."
            ) from error
        assert now.work is not None
        if int(now.work[0]) != self.host.facts.layers * now.slots.shape[1]:
            raise RefusedError(
                f"{name} runs its layers past the list {self.name!r}, so they cannot be run one by one. Take a cache that"
                " computes the same tokens in all layers, such as 'dual'."
            )
        loss = float((plain - apart).abs().max() / plain.abs().max().clamp_min(1e-12))
        if not loss <= (TOLERANCE if plain.dtype == torch.float32 else TOLERANCE_HALF):
            raise RefusedError(
                f"The layers of {name} give other results ({loss:.1e}) when their tokens come in another order, so tokens are"
                " not all that they go by. Take a cache that computes the same tokens in all layers, such as 'dual'."
            )
        self._proved = True


class _Reversed(Depth):
    def enter(self, layer: int, x: Tensor, now: Pass, values: Values | None) -> Tensor | None:
        return torch.arange(x.shape[1], device=x.device).flip(0).expand(x.shape[0], -1)

    def leave(self, layer: int, x: Tensor, y: Tensor, index: Tensor | None, now: Pass) -> Tensor:
        return y if index is None else put(x, y, index)


def _trial(host: TextHost, depth: Depth | None) -> tuple[Pass, KVStore]:
    """A call on a few arbitrary tokens, all of whose logits are wanted."""
    facts, device = host.facts, host.device
    count = min(7, facts.context)
    slots = torch.arange(count, device=device)[None]
    visible = torch.ones(1, count, count + 1, dtype=torch.bool, device=device)
    if facts.block is not None:
        visible[0, :, :count] = (slots[0] // facts.block)[:, None] >= (slots[0] // facts.block)[None]
    visible[0, :, count] = False
    ids = (slots * 31 + 3) % facts.vocab
    now = Pass(slots[0, :1], slots, ids, "store", visible, slots, slots)
    work = torch.zeros(1, dtype=torch.float64, device=device)
    return replace(now, depth=depth, work=work), KVStore(1, count, device)


def _layers(model: nn.Module, count: int) -> tuple[nn.Module, str]:
    """The module that holds the list of `count` layers, and the name of the list."""
    found = [
        (owner, name)
        for owner in model.modules() for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]  # fmt: skip
    if not found:
        raise RefusedError(
            f"{type(model).__name__} has no list of {count} layers, so they cannot be run one by one. Take a cache that"
            " computes the same tokens in all layers, such as 'dual'."
        )
    return max(found, key=lambda place: sum(p.numel() for p in getattr(place[0], place[1]).parameters()))


def _way(
    seen: list[tuple[nn.Module, Tensor, Tensor]], x: Tensor, held: Tensor, real: Tensor
) -> tuple[Values, int] | None:
    """How `held` [m, N, Hk * Dv] came from x: a projection, or the last columns of one, of x behind one module.

    Also the number of weights that this takes.
    """
    width = held.shape[-1]
    for module, given, made in seen:
        if given.shape[:2] != real.shape or made.shape[:2] != real.shape or made.shape[-1] < width or made.dim() != 3:
            continue
        if not torch.equal(made[..., -width:][real], held[real].to(made.dtype)):
            continue
        norm = next((before for before, entered, left in seen if left is given and entered is x), None)
        if norm is None and given is not x:
            continue
        return _projected(norm, module, width)
    return None


def _projected(norm: nn.Module | None, module: nn.Module, width: int) -> tuple[Values, int]:
    """`module` behind `norm`, of a packed linear layer only the rows that make the values."""
    if type(module) is nn.Linear:
        weight, bias = module.weight[-width:], None if module.bias is None else module.bias[-width:]
        return lambda x: F.linear(x if norm is None else norm(x), weight, bias), weight.numel()
    numel = sum(parameter.numel() for parameter in module.parameters())
    return lambda x: module(x if norm is None else norm(x))[..., -width:], numel


def _cut(value: Any, index: Tensor, texts: int, count: int) -> Any:
    """What belongs to the tokens `index` (int64 [m, n]): rows of tensors [m or 1, N, ...], and of what holds such.

    Of two dimensions, only integers are about tokens (positions): real numbers are a text's own (a noise level's embedding).
    """
    if isinstance(value, tuple | list):
        return type(value)(_cut(inner, index, texts, count) for inner in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] not in (1, texts) or value.shape[1] != count:
        return value
    if value.dim() == 2 and value.is_floating_point():
        return value
    rows = value.expand(texts, *value.shape[1:])
    near = index.clamp(max=count - 1).view(*index.shape, *[1] * (value.dim() - 2))
    return rows.gather(1, near.expand(-1, -1, *value.shape[2:]))
