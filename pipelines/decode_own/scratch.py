"""The model runs on the loop's own keys and values, and what it adds there is thrown away.

Shapes: B rows, N nodes of a chain so far, V tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hasten.errors import RefusedError
from hasten.pipelines.decode import compat
from hasten.pipelines.decode.tail import DenseTail
from hasten.samplers.decode.proposal import Proposal


@contextmanager
def scratch(tail: Any) -> Iterator[None]:
    """While open, the model may append to the cache of `tail`; then it holds what it held, bit for bit where it is read.

    Raises `RefusedError` for a tail whose keys and values are not transformers' own.
    """
    if not isinstance(tail, DenseTail):
        raise RefusedError(
            f"A model that drafts for itself needs keys and values it can take back, and this cache is a {type(tail.cache).__name__}."
            " Take another drafter, or no other cache."
        )
    layers = [layer for layer in tail.cache.layers if layer.is_initialized]
    if tail.static:
        before = [layer.cumulative_length.clone() for layer in layers]
        try:
            yield
        finally:
            for layer, length in zip(layers, before, strict=True):
                layer.cumulative_length.copy_(length)
        return
    kept = [(layer.keys, layer.values) for layer in layers]
    try:
        yield
    finally:
        for layer, (keys, values) in zip(layers, kept, strict=True):
            layer.keys, layer.values = keys, values


def step(model: Any, tail: DenseTail, proposal: Proposal, new: int = 1) -> Tensor:
    """Logits [B, new, V] behind the last `new` nodes of `proposal`, a chain; the nodes before them are in the scratch."""
    inputs = tail.inputs(proposal)
    alone = new == 1 and proposal.rows == 1 and not tail.padded and not tail.static and tail.window is None
    mask = None if alone else _last(inputs["attention_mask"], new)
    found = model(
        input_ids=proposal.tokens[:, -new:],
        **inputs | {"attention_mask": mask, "position_ids": inputs["position_ids"][:, -new:]}, return_dict=True,
    )  # fmt: skip
    logits: Tensor = found.logits
    return logits


def decoder(model: Any) -> Any:
    """The module that owns the list `layers`. Raises `RefusedError` where nobody knows it."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    count = len(compat.layer_kinds(model.config.get_text_config(decoder=True)))
    if found is None or len(getattr(found, "layers", ())) != count:
        raise RefusedError(f"Nobody knows where this {type(model).__name__} keeps its layers, so that none can be left out.")
    return found


def _last(mask: Any, new: int) -> Any:
    """Rows of the last `new` queries of a mask, or of one for each kind of layer."""
    if isinstance(mask, dict):
        return {kind: _last(each, new) for kind, each in mask.items()}
    return None if mask is None else mask[:, :, -new:]
