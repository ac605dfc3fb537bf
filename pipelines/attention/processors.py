"""Attention processors that hand their attention to a site: classes derived from the host's own, one instance each.

All of diffusers' processors end in `scaled_dot_product_attention`, directly or through the common dispatch. While such a
processor runs for a followed call, that function (and nothing else) is caught underneath it, by a mode that belongs to
the thread. Models, modules and classes stay as they are.
"""

from __future__ import annotations

import functools
import inspect
from types import FunctionType
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hasten.pipelines.attention.ranks import by_heads
from hasten.sparse_attn.op import Site, attend

SITE, TICKET, ORIGINAL, RANKS = "_hasten_site", "_hasten_ticket", "_hasten_original", "_hasten_ranks"
NATIVE = AttentionBackendName.NATIVE


class Catch(TorchFunctionMode):
    """Hands every `scaled_dot_product_attention` underneath to a site. ticket: how compiled graphs name it."""

    def __init__(self, site: Site, ticket: Tensor) -> None:
        super().__init__()
        self.site, self.ticket = site, ticket

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._caught(*args, **kwargs)
        if func is torch.Tensor.unflatten:  # a Python method that calls super(), which torch.compile cannot follow here
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)

    def _caught(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        if torch.compiler.is_compiling():
            return attend(query, key, value, self.ticket, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return self.site.attend(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip


def stand_in(original: Any, site: Any, ticket: Tensor) -> Any:
    """A processor of a class derived from `original`'s, which shares its attributes and hands its attention to `site`.

    While `site.awake` is false the original itself is called.
    """
    made: Any = object.__new__(_derived(type(original)))  # type: ignore[arg-type]  # mypy: classes cannot be hashed
    object.__setattr__(made, "__dict__", original.__dict__)
    ranks = by_heads(getattr(original, "_parallel_config", None), site.heads)
    for name, value in ((SITE, site), (TICKET, ticket), (ORIGINAL, original), (RANKS, ranks)):
        object.__setattr__(made, name, value)
    return made


def reason_against(processor: Any) -> str:
    """Why no class can be derived from this processor's; empty when one can."""
    own = inspect.getattr_static(type(processor), "__call__", None)
    if not isinstance(own, FunctionType) or not hasattr(processor, "__dict__"):
        return f"its processor is a {type(processor).__name__}, from which no class can be derived"
    return ""


@functools.cache
def _derived(kind: Any) -> Any:
    """The class derived from `kind`. One for all sessions, because compiled graphs are guarded by their processors'
    classes: a new one for each session would be compiled again each time."""
    own: Any = kind.__call__

    @functools.wraps(own)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and not self._hasten_site.awake:
            return self._hasten_original(*args, **kwargs)
        with Catch(self._hasten_site, self._hasten_ticket):
            return own(self, *args, **kwargs)

    members: dict[str, Any] = {
        "__slots__": (SITE, TICKET, ORIGINAL, RANKS),
        "__call__": __call__,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    if hasattr(kind, "_attention_backend"):
        members["_attention_backend"] = property(_backend, _set_backend)
    if hasattr(kind, "_parallel_config"):
        members["_parallel_config"] = property(_ranks, _set_ranks)
    return type(kind)(kind.__name__, (kind,), members)


def _backend(processor: Any) -> Any:
    """The backend that ends where `Catch` looks, between ranks too."""
    return NATIVE


def _set_backend(processor: Any, value: Any) -> None:
    processor.__dict__["_attention_backend"] = value  # which the original shares


def _ranks(processor: Any) -> Any:
    """How the ranks exchange tokens around what `Catch` sees."""
    return processor._hasten_ranks


def _set_ranks(processor: Any, value: Any) -> None:
    processor.__dict__["_parallel_config"] = value  # which the original shares
    object.__setattr__(processor, RANKS, by_heads(value, processor._hasten_site.heads))


def chosen_backend(original: Any) -> Any:
    """The backend that was chosen for a processor; None for the common one or where there is no choice."""
    return getattr(original, "_attention_backend", None)


def dense(original: Any, q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
    """The host's own attention: q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv] -> [B, Hq, Sq, Dv].

    named: further arguments of `scaled_dot_product_attention`. Runs on the backend chosen for `original`, if any; of ranks
    that share a sequence, on each by itself, since they have exchanged their tokens already.
    """
    backend = chosen_backend(original)
    dispatches = hasattr(original, "_attention_backend")
    active = backend if backend is not None or not dispatches else _AttentionBackendRegistry.get_active_backend()[0]
    if not dispatches or active == NATIVE or q.dim() != 4:
        return F.scaled_dot_product_attention(q, k, v, **named)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    found: Tensor = dispatch_attention_fn(q, k, v, **named, backend=active)
    return found.transpose(1, 2)
