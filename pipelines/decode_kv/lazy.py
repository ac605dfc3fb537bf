"""Decoder layers that compute some of the tokens only: the seam of `hasten.caching.decode.lazy`.

A layer of transformers is called with hidden states and what belongs to their positions. Both become those of the tokens that
go on, between one layer and the next; the layer itself is the model's own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.caching.decode.turns import Turns
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.decode_kv.cache import KVCache


@dataclass(slots=True)
class LazyLayer:
    """One decoder layer, by its number; first, last: those of the model."""

    number: int
    first: int
    last: int

    def forward(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The layer's forward, on the tokens that go on."""
        names = list(inspect.signature(own).parameters)

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs = dict(zip(names, args, strict=False)) | kwargs
            cache = next((given for given in kwargs.values() if isinstance(given, KVCache)), None)
            if cache is None or cache.state.lazy is None or cache.now is None:
                return own(**kwargs)
            return self._call(cache, own, kwargs, names[0])

        return forward

    def _call(self, cache: KVCache, own: Callable[..., Any], kwargs: dict[str, Any], name: str) -> Any:
        lazy, now = cache.state.lazy, cache.now
        assert lazy is not None and now is not None
        if self.number == self.first:
            cache.angles = _written(cache, kwargs)
        if lazy.at is not None:
            kwargs = _positions(cache, kwargs, lazy.at)
        found = own(**kwargs)
        lazy.read(self.number, sum(now.new), now.prompt)
        if not isinstance(found, Tensor):
            raise RefusedError(f"A decoder layer gave {type(found).__name__}, and lazy-llm knows layers that give hidden states alone.")
        if self.number in lazy.shares and cache.prunes:
            found, at = lazy.go_on(self.number, found, now.at)
            cache.narrow(at)
        if self.number == self.last and lazy.at is not None:
            # Nobody asked for the others, and some of them are not of this call; some models count the columns (GPT-2).
            return torch.nn.functional.pad(found[:, -1:], (0, 0, cache.wide - 1, 0))
        return found


def _written(cache: KVCache, kwargs: dict[str, Any]) -> Any:
    """Remember how the model turns the new tokens' keys; what it passes to its layers for that, None for nothing."""
    given, now = kwargs.get("position_embeddings"), cache.now
    assert now is not None
    positions = kwargs.get("position_ids")
    if positions is not None:
        real = now.at >= 0
        if not torch.equal(positions.expand_as(now.at)[real], now.at[real].to(positions.dtype)):
            raise UsageError("lazy-llm computes tokens later by their number in the text, and the model was given other positions.")
    if given is None:
        return None
    if not isinstance(given, tuple) or len(given) != 2 or given[0].dim() != 3:
        raise RefusedError("The model's layers get positions of another form than cosines and sines, which lazy-llm cannot compute later.")
    if cache.state.turns is None:
        cache.state.turns = Turns()
    cache.state.turns.write(*given, now.at, cache.ends)
    return given[0]


def _positions(cache: KVCache, kwargs: dict[str, Any], at: Tensor) -> dict[str, Any]:
    """What belongs to the positions of the tokens that go on, int [B, n]."""
    changed: dict[str, Any] = {}
    if kwargs.get("position_embeddings") is not None:
        if kwargs["position_embeddings"][0] is not cache.angles or cache.state.turns is None:
            raise RefusedError("The model's layers turn keys in several ways (or on several devices), and lazy-llm knows one for all.")
        changed["position_embeddings"] = cache.state.turns.of(at)
    if kwargs.get("position_ids") is not None:
        changed["position_ids"] = at.clamp(min=0)
    return kwargs | changed
