"""What hasten must know of a host: where its denoisers are, and how their calls are laid out."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import ModelError

DENOISERS = ("transformer", "transformer_2", "unet", "prior")
"""Pipeline attributes under which diffusers keeps the networks its loop calls."""

CONDITIONING = ("encoder_hidden_states", "class_labels", "y", "context", "encoder_hidden_states_t5", "pooled_projections")
"""Arguments by which branches differ, most telling first."""


def denoisers(host: Any) -> dict[str, nn.Module]:
    """Site name -> network, for a diffusers pipeline or a bare denoiser. Raises `ModelError` if there is none."""
    if isinstance(host, nn.Module):
        return {type(host).__name__: host}
    found = {name: getattr(host, name, None) for name in DENOISERS}
    modules = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if not modules:
        raise ModelError(
            f"{type(host).__name__} has no denoiser that hasten knows: looked for {', '.join(DENOISERS)}."
            " Pass a diffusers pipeline, or the denoiser itself together with scheduler=."
        )
    return modules


@dataclass(frozen=True, slots=True)
class Layout:
    """Parameter names of a denoiser's forward, in order, and the names of its special arguments."""

    names: tuple[str, ...]
    sample: str
    conditioning: tuple[str, ...]
    timestep: str | None

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        original = getattr(module, "_orig_mod", module)  # torch.compile's wrapper hides the signature
        names = tuple(inspect.signature(type(original).forward).parameters)[1:]
        timestep = next((name for name in ("timestep", "timesteps", "t") if name in names), None)
        return cls(names, names[0], tuple(name for name in CONDITIONING if name in names), timestep)


class Call:
    """One call of a denoiser: its arguments by name, and a way to run it on part of the batch."""

    __slots__ = ("args", "kwargs", "layout")

    def __init__(self, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layout, self.args, self.kwargs = layout, args, kwargs

    def get(self, name: str | None) -> Any:
        """The argument called `name`, however it was passed; None when absent."""
        if name is None:
            return None
        if name in self.kwargs:
            return self.kwargs[name]
        position = self.layout.names.index(name)
        return self.args[position] if position < len(self.args) else None

    @property
    def sample(self) -> Any:
        return self.get(self.layout.sample)

    @property
    def timestep(self) -> Any:
        return self.get(self.layout.timestep)

    @property
    def conditioning(self) -> Tensor | None:
        for name in self.layout.conditioning:
            value = self.get(name)
            if isinstance(value, Tensor):
                return value
        return None

    def part(self, batch: int, rows: slice) -> Call:
        """The same call on some rows: every tensor whose first dimension is `batch` is sliced."""
        args = tuple(_rows(value, batch, rows) for value in self.args)
        return Call(self.layout, args, {name: _rows(value, batch, rows) for name, value in self.kwargs.items()})


def _rows(value: Any, batch: int, rows: slice) -> Any:
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: _rows(inner, batch, rows) for key, inner in value.items()}
    if isinstance(value, list | tuple) and value and all(isinstance(inner, Tensor) for inner in value):
        return type(value)(_rows(inner, batch, rows) for inner in value)
    return value


class Output:
    """A denoiser's return value taken apart into tensors, and the way to put other tensors in their place."""

    __slots__ = ("_keys", "_template", "tensors")

    def __init__(self, value: Any) -> None:
        self._template = value
        self._keys: list[Any] = []
        if isinstance(value, Tensor):
            self.tensors = [value]
        elif isinstance(value, dict):  # diffusers' BaseOutput is an ordered dict
            self._keys = [key for key, inner in value.items() if isinstance(inner, Tensor)]
            self.tensors = [value[key] for key in self._keys]
        elif isinstance(value, tuple | list):
            self._keys = [i for i, inner in enumerate(value) if isinstance(inner, Tensor)]
            self.tensors = [value[i] for i in self._keys]
        else:
            self.tensors = []

    def rebuild(self, tensors: Iterable[Tensor]) -> Any:
        """The same kind of return value with `tensors` in place of its own."""
        new = list(tensors)
        if not self._keys and not isinstance(self._template, Tensor):
            return self._template
        if isinstance(self._template, Tensor):
            return new[0]
        if isinstance(self._template, dict):
            return type(self._template)(**{**self._template, **dict(zip(self._keys, new, strict=True))})
        values = list(self._template)
        for key, tensor in zip(self._keys, new, strict=True):
            values[key] = tensor
        kind = type(self._template)
        return kind(*values) if hasattr(kind, "_fields") else kind(values)


def is_whole_compiled(module: nn.Module) -> bool:
    """True when the whole network is one compiled function, so that nothing inside it can be gated."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def hardware(device: torch.device | str) -> dict[str, Any]:
    """What the report says about the machine: device name, threads; never a host name or a path."""
    device = torch.device(device)
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "type": "cuda"}
    import platform

    return {"device": platform.machine(), "type": device.type, "threads": torch.get_num_threads()}
