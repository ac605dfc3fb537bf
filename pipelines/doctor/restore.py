"""What stands on a pipeline, remembered before it is examined, so that nothing can be left on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from hasten.pipelines.host import denoisers

REGISTRIES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))
"""Where a module keeps parameters, buffers, children and hooks."""

OWNED = ("_parameters", "_modules")
"""Registries whose values must be the very same objects; buffers are made anew by some networks in each run."""


class Snapshot:
    """The attributes of a pipeline, its scheduler and its denoisers, down to each module, without any weights copied.

    differences: names of what would act and was not there before, or is not there any more. Plain values do not
    count: networks and pipelines keep notes of their own. restore: put all of it back. weights: also remember where
    each weight's numbers lie, for checks that move them; this keeps that memory in use.
    """

    def __init__(self, pipe: Any, *, weights: bool = False) -> None:
        self._owners = dict(_owners(pipe))
        self._values = {path: dict(vars(owner)) for path, owner in self._owners.items()}
        self._registries = {
            (path, name): dict(vars(owner)[name])
            for path, owner in self._owners.items()
            if isinstance(owner, nn.Module)
            for name in REGISTRIES
        }
        networks = list(denoisers(pipe).values())
        self._trained = [(p, p.requires_grad) for network in networks for p in network.parameters()]
        self._modes = [(module, module.training) for network in networks for module in network.modules()]
        self._data: list[tuple[Tensor, Tensor]] = []
        if weights:
            self._data = [(t, t.data) for n in networks for t in (*n.parameters(), *n.buffers())]

    def names(self) -> set[str]:
        """Dotted names of every attribute there is now."""
        return {f"{path}.{name}" for path, owner in self._owners.items() for name in vars(owner)}

    def differences(self) -> list[str]:
        """Names of what acts on the pipeline now and did not, or did and does not."""
        found = []
        for path, owner in self._owners.items():
            before, now = self._values[path], vars(owner)
            for name in before.keys() | now.keys():
                old, new = before.get(name), now.get(name)
                if old is not new and (_acts(name, old) or _acts(name, new)):
                    found.append(f"{path}.{name}")
        for (path, name), entries in self._registries.items():
            registry = vars(self._owners[path]).get(name, {})
            same = registry.keys() == entries.keys()
            if not same or (name in OWNED and any(registry[key] is not value for key, value in entries.items())):
                found.append(f"{path}.{name}")
        found += ["requires_grad" for parameter, was in self._trained if parameter.requires_grad != was][:1]
        found += ["training" for module, was in self._modes if module.training != was][:1]
        return sorted(found)

    def restore(self) -> None:
        """Make everything as it was."""
        for path, owner in self._owners.items():
            now = vars(owner)
            for name in set(now) - set(self._values[path]):
                del now[name]
            now.update(self._values[path])
        for (path, name), entries in self._registries.items():
            registry = vars(self._owners[path])[name]
            registry.clear()
            registry.update(entries)
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)
        for tensor, data in self._data:
            tensor.data = data


def _owners(pipe: Any) -> Iterator[tuple[str, Any]]:
    yield "pipe", pipe
    yield "scheduler", pipe.scheduler
    for site, network in denoisers(pipe).items():
        for name, module in network.named_modules():
            yield f"{site}.{name}" if name else site, module


def _acts(name: str, value: Any) -> bool:
    """Would an attribute of this name and value change what is computed?"""
    return callable(value) or name in ("scheduler", "_hasten_shadows")
