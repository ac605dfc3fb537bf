"""What hasten must know of a host: where its denoisers are, and how their calls are laid out."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import ModelError

DENOISERS = ("transformer", "transformer_2", "unet", "prior")
"""Pipeline attributes under which diffusers keeps the networks its loop calls."""

CONDITIONING = (
    "encoder_hidden_states", "encoder_hidden_states_t5", "encodings_and_masks", "text_bth", "cap_feats", "context", "input_ids",
    "class_labels", "y", "pooled_projections", "prior_token_drop", "token_type",
)  # fmt: skip
"""Arguments by which branches differ: two calls are one branch when they agree in all of them."""

SAMPLES = ("hidden_states", "sample", "x", "latents", "decoder_input_tokens")
"""What forward calls the noisy latents; its first argument where it uses none of these names."""

TIMESTEPS = ("timestep", "timesteps", "t", "decoder_noise_time", "bb_ca_time")
"""What forward calls the time."""


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


def is_running(host: Any, scheduler: Any) -> bool:
    """False when the call that is now in progress comes from another diffusers pipeline on the same scheduler.

    `from_pipe` makes pipelines that share all they have, so that only the call stack tells whose run it is. A loop
    outside of any pipeline belongs to `host`, and so does the run of a pipeline that is a part of it.
    """
    from diffusers import DiffusionPipeline, ModularPipeline

    if isinstance(host, nn.Module):
        return True
    frame: FrameType | None = sys._getframe(1)  # this function's own frame holds the host
    while frame is not None:
        found = [
            value
            for value in frame.f_locals.values()
            if isinstance(value, DiffusionPipeline | ModularPipeline) and vars(value).get("scheduler") is scheduler
        ]
        if found:
            parts = [host, *vars(host).values()]
            return any(value is part for value in found for part in parts)
        frame = frame.f_back
    return True


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
        sample = next((name for name in SAMPLES if name in names), names[0])
        timestep = next((name for name in TIMESTEPS if name in names), None)
        return cls(
            names, sample, tuple(name for name in CONDITIONING if name in names and name != sample), timestep
        )


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

    def arguments(self) -> dict[str, Any]:
        """Every argument that is given, by name."""
        named = dict(zip(self.layout.names, self.args, strict=False)) | self.kwargs
        return {name: value for name, value in named.items() if value is not None}

    @property
    def sample(self) -> Any:
        """The noisy latents; a list of latents that look alike (an entry per image) as one tensor."""
        value = self.get(self.layout.sample)
        return torch.stack(list(value)) if _alike(value) else value

    @property
    def timestep(self) -> Any:
        return self.get(self.layout.timestep)

    @property
    def conditioning(self) -> tuple[Tensor, ...]:
        """All tensors by which a branch can be known, those inside lists too."""
        return tuple(tensor for name in self.layout.conditioning for tensor in _tensors(self.get(name)))

    def copy(self) -> Call:
        """The same call with lists and dicts of its own, because some networks take theirs apart (HunyuanDiT's
        pops its ControlNet's residuals off the list); the tensors are the same."""
        return Call(
            self.layout,
            tuple(map(_own, self.args)),
            {name: _own(value) for name, value in self.kwargs.items()},
        )

    def blinded(self) -> Call:
        """A copy with NaN in place of the latents, to find out what depends on them."""
        return self.changed(_blind)

    def changed(self, change: Callable[[Any], Any]) -> Call:
        """A copy with `change(latents)` in place of the latents, which may be a list."""
        name, twin = self.layout.sample, self.copy()
        value = change(twin.get(name))
        if name in twin.kwargs:
            twin.kwargs[name] = value
        else:
            position = self.layout.names.index(name)
            twin.args = (*twin.args[:position], value, *twin.args[position + 1 :])
        return twin

    def part(self, batch: int, rows: slice) -> Call:
        """The same call on some rows: every tensor whose first dimension is `batch` is sliced.

        Where the latents are a list with an entry per row, so is every other list of that length.
        """
        listed = isinstance(self.get(self.layout.sample), list)
        args = tuple(_rows(value, batch, rows, listed) for value in self.args)
        kwargs = {name: _rows(value, batch, rows, listed) for name, value in self.kwargs.items()}
        return Call(self.layout, args, kwargs)


def _rows(value: Any, batch: int, rows: slice, listed: bool) -> Any:
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: _rows(inner, batch, rows, listed) for key, inner in value.items()}
    if listed and isinstance(value, list) and len(value) == batch:
        return value[rows]
    if isinstance(value, list | tuple) and value and all(isinstance(inner, Tensor) for inner in value):
        return type(value)(_rows(inner, batch, rows, listed) for inner in value)
    return value


def _alike(value: Any) -> bool:
    """True for a list of tensors that can be one tensor with a row for each."""
    listed = isinstance(value, list | tuple) and value and all(isinstance(inner, Tensor) for inner in value)
    return bool(listed) and len({(inner.shape, inner.dtype, inner.device) for inner in value}) == 1


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in `value`, depth first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def _own(value: Any) -> Any:
    """Lists and dicts copied, to any depth; everything else as it is."""
    if type(value) is list:
        return [_own(inner) for inner in value]
    if type(value) is dict:
        return {key: _own(inner) for key, inner in value.items()}
    return value


def _blind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.full_like(value, float("nan")) if value.is_floating_point() else value
    return [_blind(inner) for inner in value] if isinstance(value, list | tuple) else value


class Output:
    """A denoiser's return value taken apart into tensors, and the way to put other tensors in their place.

    A list inside it with an entry per image (Z-Image) is one tensor with a row for each, as the latents are.
    """

    __slots__ = ("_template", "tensors")

    def __init__(self, value: Any) -> None:
        self._template = value
        self.tensors = list(_parts(value))

    @property
    def plain(self) -> bool:
        """True when it consists of tensors and Nones only, so that all of it can be stood in for."""
        if isinstance(self._template, Tensor):
            return True
        rest = self._template.values() if isinstance(self._template, dict) else self._template
        return bool(self.tensors) and all(value is None or isinstance(value, Tensor) for value in rest)

    def emptied(self) -> Output:
        """The same without its tensors, so that keeping it holds no memory."""
        return Output(self.rebuild([tensor.new_empty(0) for tensor in self.tensors]))

    def rebuild(self, tensors: Iterable[Tensor]) -> Any:
        """The same kind of return value with `tensors` in place of its own."""
        return _filled(self._template, iter(tensors))


def _parts(value: Any, *, inside: bool = False) -> Iterator[Tensor]:
    """The tensors of a return value, depth first, each list of images as one."""
    if isinstance(value, Tensor):
        yield value
    elif inside and type(value) is list and _alike(value):
        yield torch.stack(value)
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _parts(inner, inside=True)


def _filled(template: Any, tensors: Iterator[Tensor], *, inside: bool = False) -> Any:
    if isinstance(template, Tensor):
        return next(tensors)
    if inside and type(template) is list and _alike(template):
        return list(next(tensors).unbind(0))
    if type(template) is dict:
        return {key: _filled(inner, tensors, inside=True) for key, inner in template.items()}
    if isinstance(template, dict):  # diffusers' BaseOutput is an ordered dict
        return type(template)(
            **{key: _filled(inner, tensors, inside=True) for key, inner in template.items()}
        )
    if isinstance(template, tuple | list):
        values = [_filled(inner, tensors, inside=True) for inner in template]
        kind = type(template)
        return kind(*values) if hasattr(kind, "_fields") else kind(values)
    return template


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
