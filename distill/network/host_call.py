"""How an unmodified pipeline calls its network, seen in one step of its own loop.

A trainer must call the denoiser as the pipeline does: with embedded prompts, masks, position ids, flags and a time in
the right unit, and it must know what the solver makes of the answer. None of that is asked of the model's author:
the pipeline is run for one step without guidance, and stopped when it hands the answer to its solver. What is the same
for every prompt is kept once; what belongs to a row becomes a `Condition`, which can be stored and batched.

Shapes: B rows; x the network's own input [B, ...]; every tensor of a condition [B, ...].
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.distill.network.paths import NoisePath, path_of
from hasten.errors import ModelError, UsageError, nearest
from hasten.pipelines.host import Call, Layout, Output, denoisers
from hasten.session import Attachment

TIMES = (1.0, 1000.0)
"""What networks are told where a scheduler says 1000."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What the network is told about each row beside latents and time: argument name -> tensor [B, ...].

    The tensors inside a list or dict argument have dotted names (`added_cond_kwargs.text_embeds`).
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values()))) if self.tensors else 0

    def rows(self, index: Tensor) -> Condition:
        """These rows, in this order; index int64 [b]."""
        return Condition({name: tensor[index.to(tensor.device)] for name, tensor in self.tensors.items()})

    def where(self, drop: Tensor, other: Condition) -> Condition:
        """Rows of `other` where `drop` (bool [B]) holds: how a prompt is left out in training."""
        pick = {name: drop.to(t.device).reshape(-1, *[1] * (t.ndim - 1)) for name, t in self.tensors.items()}
        return Condition({name: torch.where(pick[name], other.tensors[name], t) for name, t in self.tensors.items()})

    def to(self, device: torch.device | str) -> Condition:
        """The same on another device."""
        return Condition({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def join(parts: Sequence[Condition]) -> Condition:
        """All rows of `parts`, in order. Raises `UsageError` where their lengths differ (ragged prompts)."""
        names = parts[0].tensors.keys()
        for name in names:
            shapes = {tuple(part.tensors[name].shape[1:]) for part in parts}
            if len(shapes) > 1:
                raise UsageError(
                    f"Prompts give {name} of different shapes {sorted(shapes)}. Pad them to one length: most pipelines"
                    " do so with max_sequence_length= in `call`."
                )
        return Condition({name: torch.cat([part.tensors[name] for part in parts]) for name in names})


@dataclass(frozen=True)
class HostCall:
    """One network of one pipeline: how it is called, what its answer means, and what its input looks like.

    fixed: arguments that do not depend on the prompt. shape: of one row of its input. sign, channels: the solver gets
    `sign * answer[:, :channels]` (some models answer with a variance beside it, some with the velocity reversed).
    """

    network: nn.Module
    site: str
    layout: Layout
    fixed: dict[str, Any]
    path: NoisePath
    shape: tuple[int, ...]
    dtype: torch.dtype
    sign: float
    channels: int | None

    def __call__(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The network's answer as the solver would get it [B, ...], float32 (float64 of a float64 network). x in the
        network's own scale; time [B]."""
        wide = torch.promote_types(self.dtype, torch.float32)
        answer = Output(self.network(**self.arguments(x, time, condition))).tensors[0]
        if self.channels is not None:
            answer = answer[:, : self.channels]
        return self.sign * answer.to(wide)

    def arguments(self, x: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
        """What the network is called with."""
        arguments = dict(self.fixed)
        arguments[self.layout.sample] = x.to(self.dtype)
        assert self.layout.timestep is not None
        arguments[self.layout.timestep] = time.to(x.device, torch.promote_types(self.dtype, torch.float32))
        _place(arguments, condition.tensors)
        return arguments


class _Caught(Exception):
    """Ends a pipeline's loop at its first step."""


@dataclass
class _Seen:
    calls: list[Call]
    answers: list[Tensor]
    given: Tensor | None = None
    time: float = 0.0


def learn(pipe: Any, prompts: Sequence[str], **call: Any) -> tuple[HostCall, Condition]:
    """How `pipe` calls its network, and the conditions of `prompts`, a row each.

    call: further arguments of the pipeline (height, width, num_frames, max_sequence_length, ...). Guidance is switched
    off for this; teachers are guided by calling the network twice. Nothing on the pipeline is changed.

    Raises `ModelError` for a pipeline with several networks, one that calls its network more than once per step without
    guidance, or one whose solver gets something that is not the network's answer; `UsageError` without prompts.
    """
    if not prompts:
        raise UsageError("There are no prompts. Give at least one; the empty prompt '' is one, too.")
    _check_known(pipe, call)
    networks = denoisers(pipe)
    if len(networks) > 1:
        raise ModelError(f"{type(pipe).__name__} has several networks ({', '.join(networks)}); training takes one.")
    (site, network), layout = next(iter(networks.items())), Layout.of(next(iter(networks.values())))
    if layout.timestep is None:
        raise ModelError(f"{type(network).__name__} takes no time that hasten knows (looked at {', '.join(layout.names)}).")
    one = _look(pipe, network, layout, [prompts[0]], call)
    two = _look(pipe, network, layout, [prompts[0]] * 2, call)
    fixed, names = _parted(one.calls[0], two.calls[0], layout)
    sign, channels = _meaning(pipe, one)
    told = float(torch.as_tensor(one.calls[0].timestep).flatten()[0])
    unit = min(TIMES, key=lambda unit: abs(told - one.time * unit / 1000))
    if abs(told - one.time * unit / 1000) > 1e-3 * max(told, 1e-6):
        raise ModelError(f"{type(pipe).__name__} tells its network {told:g} where its scheduler says {one.time:g}.")
    sample = one.calls[0].sample
    host = HostCall(
        network, site, layout, fixed, path_of(pipe.scheduler, unit), tuple(sample.shape[1:]), sample.dtype, sign, channels
    )
    seen = [one] + [_look(pipe, network, layout, [prompt], call) for prompt in prompts[1:]]
    return host, Condition.join([_condition(each.calls[0], names) for each in seen])


def _check_known(pipe: Any, call: Mapping[str, Any]) -> None:
    """Raises `UsageError` for an argument that the pipeline does not take. Diffusers' own pipelines take any further one
    (for names they have given up) and pass over it; others may mean it."""
    known = inspect.signature(type(pipe).__call__).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()) and not type(pipe).__module__.startswith("diffusers."):
        return
    names = [name for name, p in known.items() if name != "self" and p.kind is not p.VAR_KEYWORD]
    for name in call:
        if name not in names:
            raise UsageError(
                f"data.call.{name}: {type(pipe).__name__} takes no {name!r}.{nearest(name, names)} Allowed: {', '.join(names)}."
            )


def _look(pipe: Any, network: nn.Module, layout: Layout, prompts: list[str], call: Mapping[str, Any]) -> _Seen:
    """One step of the pipeline without guidance, stopped at its solver."""
    seen, hold = _Seen([], []), Attachment()
    forward, step = network.forward, pipe.scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        answer = forward(*args, **kwargs)
        seen.calls.append(Call(layout, args, kwargs).copy())
        seen.answers.append(Output(answer).tensors[0])
        return answer

    def stopped(model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        seen.given, seen.time = model_output, float(torch.as_tensor(timestep).flatten()[0])
        raise _Caught

    stopped.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]  # pipelines ask it for eta
    hold.replace(network, "forward", watched)
    hold.replace(pipe.scheduler, "step", stopped)
    try:
        with torch.no_grad():
            pipe(**_unguided(pipe, call), prompt=prompts if len(prompts) > 1 else prompts[0])
    except _Caught:
        pass
    finally:
        hold.restore()
    if len(seen.calls) != 1:
        raise ModelError(
            f"{type(pipe).__name__} called its network {len(seen.calls)} times in a step without guidance; one is needed."
        )
    return seen


def _unguided(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments with guidance off, for two steps: some schedulers cannot make a single one."""
    known = inspect.signature(type(pipe).__call__).parameters
    off = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
    given = {name: value for name, value in call.items() if name not in ("negative_prompt", "prompt")}
    return given | ({off: 1.0} if off in known else {}) | {"num_inference_steps": 2, "output_type": "latent"}


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted name -> what stands there; lists and dicts are walked through."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list | tuple) and any(isinstance(inner, Tensor) for inner in value):
        items = enumerate(value)
    else:
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in items:
        found |= _leaves(inner, f"{name}.{key}" if name else str(key))
    return found


def _parted(one: Call, two: Call, layout: Layout) -> tuple[dict[str, Any], list[str]]:
    """(arguments that are the same for one row and for two, names of the tensors that grow with the rows)."""
    given = {k: v for k, v in one.arguments().items() if k not in (layout.sample, layout.timestep)}
    first, second = _leaves(given), _leaves(two.arguments())
    rows = []
    for name, value in first.items():
        other = second.get(name)
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.ndim:
            if value.shape[0] == 1 and other.shape[0] == 2 and value.shape[1:] == other.shape[1:]:
                rows.append(name)
            elif value.shape != other.shape:
                raise ModelError(f"{name} is {tuple(value.shape)} for one prompt and {tuple(other.shape)} for two.")
    return given, rows


def _condition(call: Call, names: Sequence[str]) -> Condition:
    leaves = _leaves(call.arguments())
    return Condition({name: leaves[name].detach().clone() for name in names})


def _place(arguments: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put row tensors where their dotted names say, into containers of this call's own."""
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        place: Any = arguments
        for key in path:
            inner = place[key if isinstance(place, dict) else int(key)]
            inner = dict(inner) if isinstance(inner, dict) else list(inner)
            place[key if isinstance(place, dict) else int(key)] = inner
            place = inner
        place[last if isinstance(place, dict) else int(last)] = tensor


def _meaning(pipe: Any, seen: _Seen) -> tuple[float, int | None]:
    """(sign, channels) with which the network's answer is what the solver got."""
    answer, given = seen.answers[0].float(), seen.given
    assert given is not None
    given = given.float()
    channels = None
    if answer.ndim == given.ndim and answer.shape[1] == 2 * given.shape[1]:
        channels = given.shape[1]
        answer = answer[:, :channels]
    if answer.shape == given.shape:
        for sign in (1.0, -1.0):
            if torch.allclose(sign * answer, given, rtol=1e-3, atol=1e-3 * float(given.abs().max())):
                return sign, channels
    raise ModelError(
        f"{type(pipe).__name__} gives its solver something else than its network's answer, even without guidance"
        f" (answer {tuple(seen.answers[0].shape)}, solver {tuple(given.shape)}); this pipeline cannot be distilled."
    )
