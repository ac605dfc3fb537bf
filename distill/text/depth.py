"""A language model with some of its layers: others are not run, or something stands in their place.

A list of gates shadows the list of layers on the instance, as in `pipelines/text_models/layers.py`; weights, hooks and
adapters stay where they are, and when the context ends everything is as it was.

Shapes: m texts of N tokens; K layers; C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hasten.distill.text.roles import TextCall
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.seams.stack_gate import Gate, GateList
from hasten.session import Attachment

Run = Callable[[int, nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""Stands for a call of a layer: its number, the layer, and what it is called with."""


@contextmanager
def standing(call: TextCall, run: Run, which: Sequence[int] | None = None) -> Iterator[None]:
    """While open, `run` stands for each layer. which: numbers of those that there are, None for all of them."""
    owner, name = call.host.layers.owner, call.host.layers.name
    attachment, layers = Attachment(), getattr(owner, name)
    numbers = range(len(layers)) if which is None else which
    gates = [Gate(layers[number], number, run) for number in numbers]
    attachment.replace(owner, name, GateList(layers, gates))
    try:
        yield
    finally:
        attachment.restore()


@contextmanager
def only(call: TextCall, which: Sequence[bool]) -> Iterator[None]:
    """While open, the model has these of its K layers alone; the others are not run, in `generate` neither.

    Raises `UsageError` where there is not one for each layer, or the first is left out: a cache counts its tokens there.
    """
    if len(which) != call.facts.layers or not which[0]:
        raise UsageError(
            f"Which layers are run must be said for all {call.facts.layers}, and the first has to be: got {list(which)}."
        )
    kept = [number for number, there in enumerate(which) if there]
    with standing(call, lambda number, layer, args, kwargs: layer(*args, **kwargs), kept):
        yield


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The states [m, N, C] that a layer is called with."""
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def states_of(answer: Any, call: TextCall) -> Tensor:
    """The states [m, N, C] that a layer answers with. Raises `RefusedError` for a layer that answers with more."""
    if not isinstance(answer, Tensor):
        raise RefusedError(
            f"The layers of {type(call.network).__name__} answer with more than states, so that they cannot be left out."
        )
    return answer
