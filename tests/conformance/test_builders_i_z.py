"""The small models of the classes I to Z are what the suite takes them for: fast, deterministic, and alive."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import time
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from diffusers.models import transformers
from torch import Tensor, nn

from tests.conformance.small import EXCLUDED, SMALL, Inputs, every

every()
NAMES = sorted(name for name in SMALL if name[0] >= "I")
WITH_PROMPT = [name for name in NAMES if SMALL[name].inputs(1, 0)]
INJECTIONS = [(name, kind) for name in NAMES for kind in SMALL[name].injections]


@functools.cache
def model(name: str) -> nn.Module:
    return SMALL[name].made()


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a return value, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [tensor for part in parts for tensor in tensors(part)]


def output(
    name: str, *, x: int = 0, t: float = 0.7, prompt: int = 1, size: int = 0, extra: Inputs | None = None
) -> Tensor:
    small = SMALL[name]
    with torch.no_grad():
        value = small.call(
            model(name), small.sample(x, size), t, {**small.inputs(prompt, size), **(extra or {})}
        )
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors(value))
    return tensors(value)[0]


@functools.cache
def usual(name: str) -> Tensor:
    return output(name)


def change(name: str, **other: Any) -> float:
    """How far the output moves when one argument is another, relative to its size."""
    return float((output(name, **other) - usual(name)).norm() / usual(name).norm())


def defined() -> set[str]:
    """Names I to Z of all models that diffusers defines below `models.transformers`."""
    found = set()
    for module in pkgutil.iter_modules(transformers.__path__):
        members = vars(importlib.import_module(f"{transformers.__name__}.{module.name}"))
        classes = (
            value for value in members.values() if inspect.isclass(value) and issubclass(value, ModelMixin)
        )
        found |= {
            kind.__name__ for kind in classes if kind.__module__.endswith(f".transformers.{module.name}")
        }
    return {name for name in found if name[0] >= "I"}


def test_every_class_is_described_or_excluded() -> None:
    excluded = {name for name in EXCLUDED if name[0] >= "I"}
    missing = defined() - set(NAMES) - excluded
    assert not missing, (
        f"describe these in tests/conformance/models/, or exclude them with a reason: {missing}"
    )
    assert not excluded & set(NAMES)
    assert all(EXCLUDED[name] for name in excluded)


@pytest.mark.parametrize("name", NAMES)
def test_is_built_quickly_and_alike(name: str) -> None:
    start = time.thread_time()
    again = SMALL[name].made()
    assert time.thread_time() - start < 1
    assert type(again).__name__ == name
    states = zip(again.state_dict().items(), model(name).state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in states)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_was_drawn(name: str) -> None:
    dead = [
        key for key, value in model(name).named_parameters() if value.numel() > 1 and not bool(value.any())
    ]
    assert not dead


@pytest.mark.parametrize("name", NAMES)
def test_is_deterministic_and_listens(name: str) -> None:
    assert torch.equal(output(name), usual(name))
    assert change(name, x=9) > 1e-2
    assert change(name, t=0.3) > 1e-2


@pytest.mark.parametrize("name", WITH_PROMPT)
def test_follows_the_conditioning(name: str) -> None:
    assert change(name, prompt=2) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_another_resolution(name: str) -> None:
    assert SMALL[name].sample(0, 1).shape != SMALL[name].sample(0, 0).shape
    assert output(name, size=1).shape != usual(name).shape


@pytest.mark.parametrize(("name", "kind"), INJECTIONS)
def test_injections_act(name: str, kind: str) -> None:
    assert change(name, extra=SMALL[name].injections[kind](5, 0)) > 1e-3
    output(name, size=1, extra=SMALL[name].injections[kind](5, 1))
