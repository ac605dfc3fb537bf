"""Quantised weights on a network for as long as a session is open; and how its layers learn which time it is.

The network's own modules, weights and state dict stay: its layers are given another `forward` on the instance, and a hook
reads the time from the network's own arguments. Training uses the same.

Shapes: B rows of a call of the network; x [n, ...] what a layer reads, with n = B, or k rows of x for each of B; T bins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import ModelError, RefusedError
from hasten.pipelines.host import Call, Layout, is_whole_compiled
from hasten.pipelines.quantised import Layer, Quantised, applied, rounded
from hasten.session import Attachment


class Moment:
    """Which row of the tables belongs to each row of the network's present call: that of its time, and of nothing else."""

    def __init__(self, network: nn.Module, bins: int, end: float) -> None:
        self.layout, self.bins, self.end = Layout.of(network), bins, end
        self.now: Tensor | None = None
        """int64 [B], or [1] for all rows; None outside of a call."""

    def watch(self, attachment: Attachment, network: nn.Module) -> None:
        """Look at every call of `network` until `attachment` is restored."""
        begins = network.register_forward_pre_hook(self._begins, with_kwargs=True)
        ends = network.register_forward_hook(self._ends, always_call=True)
        attachment.on_restore(begins.remove)
        attachment.on_restore(ends.remove)

    def of(self, time: Tensor) -> Tensor:
        """Rows of the tables, int64 [B], at these times of the network [B]."""
        return (time.float() * (self.bins / self.end)).long().clamp(0, self.bins - 1)

    def spread(self, table: Tensor, x: Tensor) -> Tensor:
        """The entry of `table` [T] for each row of x, [n or 1, 1, ...]. Raises `ModelError` where x has no rows of its own for
        each row of the call, or is read outside of one."""
        if self.now is None:
            raise ModelError("A quantised layer was called outside of its network, so that the time is not known. Call the network.")
        values, rows = table[self.now.to(table.device)], x.shape[0]
        if len(values) > 1:
            if rows % len(values):
                raise ModelError(
                    f"A layer reads {rows} rows where its network was called with {len(values)}, so that the time of each is not"
                    " known. This network cannot be quantised by time."
                )
            values = values.repeat_interleave(rows // len(values))
        return values.reshape(-1, *[1] * (x.ndim - 1))

    def _begins(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(self.layout, args, kwargs)
        time, sample = torch.as_tensor(call.timestep), call.get(self.layout.sample)
        if time.ndim > 1:
            raise ModelError(
                f"{type(network).__name__} is told a time for each token {tuple(time.shape)}, and quantised layers have ranges for"
                " one time a row. Use it where all tokens of a row have the same time."
            )
        now = self.of(time.reshape(-1))
        self.now = now.to(sample.device) if isinstance(sample, Tensor) else now  # once, and not in every layer

    def _ends(self, *_: Any) -> None:
        self.now = None


class Forward:
    """The forward of one layer while its weights are quantised."""

    def __init__(self, module: nn.Module, layer: Layer, moment: Moment) -> None:
        like: Tensor = module.weight  # type: ignore[assignment]
        self.module, self.moment, self.bits = module, moment, layer.inputs
        self.weight = layer.weight().to(like.device, like.dtype)
        self.low, self.step = layer.low.to(like.device), layer.step.to(like.device)

    def __call__(self, x: Tensor) -> Tensor:
        """As the layer's own, on rounded inputs and weights."""
        if self.weight.device != x.device:  # the network was moved after the session was opened
            self.weight, self.low, self.step = (t.to(x.device) for t in (self.weight, self.low, self.step))
        low, step = (self.moment.spread(table, x) for table in (self.low, self.step))
        return applied(self.module, rounded(x, low, step, self.bits), self.weight)


def put_on(attachment: Attachment, network: nn.Module, quantised: Quantised) -> None:
    """Let `network` run with these weights until `attachment` is restored.

    Raises `ModelError` for weights of another model, `RefusedError` where they could not be put on and taken off exactly.
    """
    _refuse(network)
    quantised.check(network)
    moment = Moment(network, quantised.bins, quantised.end)
    if moment.layout.timestep is None:
        raise RefusedError(f"{type(network).__name__} takes no time that hasten knows, and quantised layers have ranges by time.")
    moment.watch(attachment, network)
    modules = dict(network.named_modules())
    for name, layer in quantised.layers.items():
        attachment.replace(modules[name], "forward", Forward(modules[name], layer, moment))


def _refuse(network: nn.Module) -> None:
    kind = type(network).__name__
    if is_whole_compiled(network):
        raise RefusedError(f"This {kind} is compiled as a whole, so that its weights stay. Open the session first.")
    if any(hasattr(module, "base_layer") for module in network.modules()):
        raise RefusedError(
            f"This {kind} has an adapter on it, which its quantised weights would not have. Unload it, or train with --base_lora."
        )
    hooks = [getattr(module, "_diffusers_hook", None) for module in network.modules()]
    if any("group_offloading" in hook.hooks for hook in hooks if hook is not None):
        raise RefusedError(f"This {kind} is offloaded in groups, which would not move its weights. Use offload 'model' or none.")
