"""Everything of one trained role that a training changes: its weights, its heads, its optimiser, its average.

Shapes: none of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hasten.distill.loop import processes, sharding
from hasten.distill.loop.sharding import Share
from hasten.errors import ResumeError

Weights = dict[str, Tensor]


@dataclass
class Player:
    """One role's share of a training.

    parameters: name -> weight, the network's (or adapter's) own and those of heads, the latter below `heads.`. buffers:
    what heads keep without gradient. optimizer: None for roles that follow as an average. average: an exponential
    average of `parameters`, which is what is exported; {} without one. shares: name -> this process's part of the weight,
    which optimiser and average then see instead; {} where every process holds all.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer | None
    buffers: Weights = field(default_factory=dict)
    average: Weights = field(default_factory=dict)
    shares: dict[str, Share] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            group["peak"] = group["lr"]

    def current(self) -> Weights:
        """Name -> what this process changes of the weight, laid flat where it is a part."""
        return {n: (self.shares[n].own if n in self.shares else p).detach() for n, p in self.parameters.items()}

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Let the average follow by one step."""
        if self.average:
            now = self.current()
            torch._foreach_lerp_(list(self.average.values()), [now[name] for name in self.average], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While open, the weights are their average, which is what is exported; then they are bit for bit what they were."""
        if not self.average:
            yield
            return
        now = list(self.current().values())
        kept = [value.clone() for value in now]
        try:
            self._become(list(self.average.values()))
            yield
        finally:
            self._become(kept)

    @torch.no_grad()
    def _become(self, values: Sequence[Tensor]) -> None:
        for own, value in zip(self.current().values(), values, strict=True):
            own.copy_(value)
        if self.shares:
            sharding.spread(self.shares.values())

    def change(self, factor: float, clip: float) -> Tensor:
        """One step of the optimiser, at `factor` of its rates, with the gradients that the weights have; their norm, before it
        was clipped."""
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        if self.shares:
            shares = list(self.shares.values())
            sharding.take_gradients(shares)
            norm = sharding.clip(shares, clip)
        else:
            _average_gradients(self.parameters)
            norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.shares:
            sharding.spread(shares)
        return norm.detach()

    def still(self, first: Mapping[str, Tensor]) -> list[str]:
        """Names of weights that are bit for bit as they were (`current`): nothing trained them."""
        moved = torch.tensor([not torch.equal(value.cpu(), first[name].cpu()) for name, value in self.current().items()])
        moved = processes.total(moved.int().to(self._device)).bool().cpu()
        return [name for name, yes in zip(self.parameters, moved.tolist(), strict=True) if not yes]

    def held(self) -> dict[str, int]:
        """Bytes that this process holds: of weights, of their average, of the optimiser."""
        states = [] if self.optimizer is None else [t for s in self.optimizer.state.values() for t in s.values()]
        kinds = {"weights": self.parameters.values(), "average": self.average.values(), "optimizer": states}
        return {kind: sharding.held(t for t in found if isinstance(t, Tensor)) for kind, found in kinds.items()}

    def save(self, folder: Path | None) -> None:
        """`weights.safetensors`, `average.safetensors`, `optimizer.safetensors` in a folder that is there. Weights in parts are
        gathered, for which every process must call this; one that has no folder writes nothing."""
        _write(folder, "weights", self._whole(self.current() | self.buffers))
        if self.average:
            _write(folder, "average", self._whole(self.average))
        if self.optimizer is not None:
            names = list(self.parameters)
            flat = {f"{index}.{key}": value for index, key, value in _slots(self.optimizer)}
            of = {name: self.shares.get(names[int(name.split(".")[0])]) for name in flat}
            _write(folder, "optimizer", {n: _gathered(of[n], t) for n, t in flat.items()})

    @torch.no_grad()
    def load(self, folder: Path, to_train: bool = True) -> None:
        """Restore in place; without `to_train` weights and average alone. Raises `ResumeError` naming what is missing or does not fit."""
        self._restore(folder / "weights.safetensors", self.current() | self.buffers)
        if self.shares:
            sharding.spread(self.shares.values())
        if self.average:
            self._restore(folder / "average.safetensors", self.average)
        if self.optimizer is not None and to_train:
            self._restore_optimizer(folder / "optimizer.safetensors", self.optimizer)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def _whole(self, parts: Mapping[str, Tensor]) -> Weights:
        return {name: _gathered(self.shares.get(name), part) for name, part in parts.items()}

    def _restore(self, file: Path, into: Mapping[str, Tensor]) -> None:
        with _opened(file) as found:
            odd = sorted(set(found.keys()) ^ into.keys())
            if odd:
                raise ResumeError(
                    f"{file.name} of role {self.name!r} and this training differ in {len(odd)} weights ({', '.join(odd[:3])})."
                    " Resume with the configuration it was started with, or start in an empty folder."
                )
            for name, value in into.items():
                share, read = self.shares.get(name), found.get_tensor(name)
                value.copy_(read if share is None else share.part(read))

    def _restore_optimizer(self, file: Path, optimizer: torch.optim.Optimizer) -> None:
        names, slots = list(self.parameters), dict[int, dict[str, Tensor]]()
        with _opened(file) as found:
            indices = {int(name.split(".")[0]) for name in found.keys()}  # noqa: SIM118  # not a dict
            if not indices <= set(range(len(names))):  # a weight that no loss has reached has none
                raise ResumeError(
                    f"The optimiser of role {self.name!r} was saved for {len(indices)} weights, this training has {len(names)}."
                )
            for name in found.keys():  # noqa: SIM118
                index, key = name.split(".", 1)
                share, value = self.shares.get(names[int(index)]), found.get_tensor(name)
                slots.setdefault(int(index), {})[key] = value if share is None or not value.ndim else share.part(value).clone()
        numbers = {i: {k: int(v) if _is_count(v) else v for k, v in each.items()} for i, each in slots.items()}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": numbers})


def _gathered(share: Share | None, part: Tensor) -> Tensor:
    """The whole tensor of which `part` is this process's; itself where there are no parts."""
    if share is None or not part.ndim:
        return part.detach().clone().contiguous()
    return sharding.gather([share], [part.detach()])[0].cpu()


def _write(folder: Path | None, name: str, tensors: Weights) -> None:
    if folder is not None:
        save_file(tensors, folder / f"{name}.safetensors")


def _opened(file: Path) -> Any:
    if not file.is_file():
        raise ResumeError(f"{file.parent.name}/{file.name} is missing, so that this training cannot go on. Restore it.")
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors raises its own kind
        raise ResumeError(f"{file.parent.name}/{file.name} is broken ({error}), so that this training cannot go on.") from error


def _slots(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, str, Tensor]]:
    """(number of the weight, name, value); a count that an optimiser keeps as a plain number becomes an int64 tensor."""
    for index, slots in optimizer.state_dict()["state"].items():
        for key, value in slots.items():
            if isinstance(value, int):
                value = torch.tensor(value)
            if not isinstance(value, Tensor):
                raise TypeError(f"{type(optimizer).__name__} keeps {key} as {type(value).__name__}, not as a tensor.")
            yield index, key, value


def _is_count(value: Tensor) -> bool:
    return not value.ndim and value.dtype == torch.int64


def _average_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    if processes.count() == 1:
        return
    for parameter in parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        processes.average(parameter.grad)
