"""Narrow twins: an attention or feed-forward module with some of its heads or channels, made of the module's own weights.

Adapters (LoRA) that are on its projections are cut with them: the rows of an up-projection, the columns of a down-projection.

A twin is a shallow copy of the modules on the way to the projections, which alone are cut; it is made for one
call and thrown away, so nothing is held, nothing in the model is touched and the weights are always the present ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hasten.pipelines.host import is_whole_compiled
from hasten.pipelines.seams.module_gate import KEYS, QUERIES

VALUES = frozenset({"to_v", "v_proj", "wv", "v", "value", "value_proj", "linear_v", "v_linear", "to_value"})
ADDED, ADDED_VALUES = frozenset({"add_q_proj", "add_k_proj"}), frozenset({"add_v_proj"})
OUTS = frozenset({"to_out", "to_add_out", "out_proj", "o_proj", "wo", "proj", "proj_out", "linear_out"})
HEADS = ("heads", "num_heads", "n_heads", "num_attention_heads")
"""What the projections of an attention module and the number of its heads are called."""


@dataclass(frozen=True, slots=True)
class Narrowing:
    """How a module is cut. Units are heads or channels.

    num: units it has. size: rows of each projection per unit. ins, outs: dotted names of the projections whose rows,
    and whose columns, belong to units. values: those of `ins` that carry what is passed on. heads: attribute with the number of
    heads, "" for channels. An input projection that is twice as wide as the others holds a value and its gate.
    """

    num: int
    size: int
    ins: tuple[str, ...]
    outs: tuple[str, ...]
    values: tuple[str, ...]
    heads: str = ""

    @property
    def unit(self) -> str:
        return "heads" if self.heads else "channels"

    def wrapped(self, module: nn.Module) -> str:
        """Why the module cannot be copied now (offloading and adapters come and go); "" when it can."""
        for name in (*self.ins, *self.outs):
            *path, last = name.split(".")
            inner = module
            for part in (None, *path):
                inner = inner if part is None else inner._modules[part]  # type: ignore[assignment]
                if "forward" in vars(inner) or is_whole_compiled(inner):
                    return "is wrapped or compiled"
            linear = inner._modules.get(last)
            if linear is None or not _is_plain(linear):
                return "has projections that are no plain linear layers"
        return ""

    def twin(self, module: nn.Module, index: Tensor, *, bias: bool = True) -> nn.Module:
        """The module with the units `index` [count] only. bias: whether it adds the bias of its outputs, too."""
        rows = self._rows(index)
        twin = self._copied(module, {name: self._cut_in(module, name, rows) for name in self.ins})
        twin = self._copied(twin, {name: self._cut_out(module, name, rows, bias) for name in self.outs})
        if self.heads:
            vars(twin)[self.heads] = index.numel()
        return twin

    def masked(self, module: nn.Module, index: Tensor) -> nn.Module:
        """The whole module, with nothing passed on from other units than `index`: what the twin has to equal."""
        linears = {}
        for name in self.outs:
            weight = _linear(module, name).weight
            keep = torch.zeros(weight.shape[1], device=weight.device, dtype=weight.dtype)
            keep[self._rows(index).to(weight.device)] = 1
            linears[name] = _changed(module.get_submodule(name), "columns", partial(torch.mul, keep))
        return self._copied(module, linears)

    def importance(self, module: nn.Module, seen: dict[str, Tensor] | None = None) -> Tensor:
        """How much each unit passes on, float32 [num]: |rows of the values| |columns of the outs|.

        seen: mean square of each input of an output projection, by its name; then |that| |columns|, what was really passed on.
        """
        total = torch.zeros(())
        for name in self.outs:
            square = _linear(module, name).weight.float().square().sum(dim=0)
            mean = None if seen is None else seen.get(name)
            total = total.to(square.device) + square * (1.0 if mean is None else mean.to(square.device))
        wide: Tensor = total.reshape(self.num, self.size).sum(dim=1)
        if seen is None:
            for name in self.values:
                square = _linear(module, name).weight.float().square().sum(dim=1)
                for part in square.reshape(-1, self.num, self.size):  # a value and its gate multiply
                    wide = wide * part.sum(dim=1).to(wide.device)
        return wide.sqrt()

    def _rows(self, index: Tensor) -> Tensor:
        offsets = torch.arange(self.size, device=index.device)
        return (index[:, None] * self.size + offsets).flatten()

    def _cut_in(self, module: nn.Module, name: str, rows: Tensor) -> nn.Module:
        linear = _linear(module, name)
        halves = linear.weight.shape[0] // (self.num * self.size)
        rows = rows.to(linear.weight.device)
        picked = torch.cat([rows + half * self.num * self.size for half in range(halves)])
        return _changed(module.get_submodule(name), "rows", lambda tensor: tensor.index_select(0, picked))

    def _cut_out(self, module: nn.Module, name: str, rows: Tensor, bias: bool) -> nn.Module:
        rows = rows.to(_linear(module, name).weight.device)
        return _changed(module.get_submodule(name), "columns", lambda tensor: tensor.index_select(1, rows), bias)

    def _copied(self, module: nn.Module, linears: dict[str, nn.Module]) -> nn.Module:
        """A shallow copy of `module` with the modules at these dotted names replaced."""
        twin = _shallow(module)
        for child in {name.split(".")[0] for name in linears}:
            inner = {name.partition(".")[2]: linear for name, linear in linears.items() if name.split(".")[0] == child}
            below = module._modules[child]
            assert below is not None
            twin._modules[child] = inner[""] if "" in inner else self._copied(below, inner)
        return twin


def narrowing_of(module: nn.Module, *, attention: bool) -> Narrowing | str:
    """How `module` can be cut, by the shapes of its projections; or why it cannot, as far as one sees without trying."""
    found = _attention(module) if attention else _feed_forward(module)
    if isinstance(found, str):
        return found
    return found.wrapped(module) or found


def _attention(module: nn.Module) -> Narrowing | str:
    linears = {name: linear for name, child in module.named_children() if (linear := linear_of(child)) is not None}
    values = tuple(name for name in linears if name in VALUES | ADDED_VALUES)
    ins = tuple(name for name in linears if name in QUERIES | KEYS | ADDED) + values
    outs = tuple(_outs(module))
    attribute = next((name for name in HEADS if isinstance(getattr(module, name, None), int)), "")
    if not values or not outs or len(ins) < 3 or not attribute:
        return "has no separate projections of queries, keys, values and outputs with a known number of heads"
    inner, num = linears[ins[0]].out_features, int(getattr(module, attribute))
    if num < 2:
        return "has one head only"
    wide = {linears[name].out_features for name in ins} | {_linear(module, name).in_features for name in outs}
    if wide != {inner} or inner % num:
        return "has heads that share keys or values"
    return Narrowing(num, inner // num, ins, outs, values, attribute)


def _outs(module: nn.Module) -> Iterator[str]:
    for name, child in module.named_children():
        if name in OUTS and linear_of(child) is not None:
            yield name
        elif name in OUTS and isinstance(child, nn.ModuleList | nn.Sequential) and len(child) and linear_of(child[0]) is not None:
            yield f"{name}.0"


def _feed_forward(module: nn.Module) -> Narrowing | str:
    linears = dict(_linears(module))
    for out in reversed(linears):
        num = linears[out].in_features
        ins = [name for name in linears if name != out]
        fits = all(
            linears[name].out_features in (num, 2 * num) and linears[name].in_features == linears[out].out_features
            for name in ins
        )
        if ins and fits and num >= 2:
            return Narrowing(num, 1, tuple(ins), (out,), tuple(ins))
    return "is no pair of projections with channels between them"


def linear_of(module: nn.Module) -> nn.Linear | None:
    """The linear layer that a module is, or is with adapters of peft on it; None for another."""
    module = module._modules.get("base_layer") or module if "lora_A" in module._modules else module
    return module if isinstance(module, nn.Linear) else None


def _linears(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Linear]]:
    """Dotted name -> linear layer, those inside adapters not counted."""
    for name, child in module.named_children():
        if (linear := linear_of(child)) is not None:
            yield path + name, linear
        else:
            yield from _linears(child, f"{path}{name}.")


def _is_plain(layer: nn.Module) -> bool:
    """Is it a linear layer as torch has it, with ordinary LoRA on it at most (no DoRA or other variant)?"""
    parts = [layer]
    if "lora_A" in layer._modules:
        if getattr(layer, "lora_variant", None):
            return False
        ups = [*layer.lora_A.children(), *layer.lora_B.children()]  # type: ignore[union-attr]
        parts = [layer, layer._modules["base_layer"] or layer, *ups]
        return all(type(part) is nn.Linear for part in parts[1:]) and not any("forward" in vars(part) for part in parts)
    return type(layer) is nn.Linear and "forward" not in vars(layer)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    found = linear_of(module.get_submodule(name))
    assert found is not None
    return found


def _changed(
    layer: nn.Module, side: Literal["rows", "columns"], change: Callable[[Tensor], Tensor], bias: bool = True
) -> nn.Module:
    """A copy of a linear layer, adapters included, whose rows or columns are changed. bias: whether it adds its bias."""
    if isinstance(layer, nn.Linear):
        own = layer.bias if bias else None
        return _with(layer, change(layer.weight), own if own is None or side == "columns" else change(own))
    twin = _shallow(layer)
    parts: dict[str, Any] = vars(twin)["_modules"]
    parts["base_layer"] = _changed(parts["base_layer"], side, change, bias)
    low = "lora_B" if side == "rows" else "lora_A"
    parts[low] = _each(parts[low], lambda part: _changed(part, side, change))
    if not bias:
        parts["lora_B"] = _each(parts["lora_B"], lambda part: _with(part, part.weight, None))
    return twin


def _each(adapters: nn.Module, change: Callable[[Any], nn.Module]) -> nn.Module:
    """A copy of a dictionary of adapters' layers, each of them changed."""
    twin = _shallow(adapters)
    vars(twin)["_modules"] = {name: change(part) for name, part in adapters._modules.items()}
    return twin


def _with(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of a linear layer with other weights, which need not be parameters."""
    twin = _shallow(linear)
    vars(twin)["_parameters"] = {"weight": weight, "bias": bias}
    vars(twin).update(in_features=weight.shape[1], out_features=weight.shape[0])
    return twin


def _shallow(module: nn.Module) -> nn.Module:
    """Another object with the same weights, hooks and children, whose children can be exchanged."""
    twin = copy.copy(module)
    state: dict[str, Any] = vars(twin)
    state["_modules"] = dict(module._modules)
    return twin
