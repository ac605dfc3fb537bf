"""Stopping a model within one block of work, from outside, without changing it.

A pre-hook on every network and every block of this instance asks whether to go on; it raises where not. The exception passes
through hasten's sessions and diffusers' pipelines, which put back what they had changed, and the hooks are taken off again, so
that the next run is what it would have been.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


class Cancelled(BaseException):
    """The job was told to stop. No `Exception`: a search that takes failures for results must not take this for one."""


@contextmanager
def stoppable(host: Any, check: Callable[[], None], on_call: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While open, `check` is called before each block of each network of `host` (a pipeline, or anything with `model`), and
    `on_call` before each evaluation of a network that is called in the loop. Either may raise."""
    with ExitStack() as hooks:
        for network in networks(host):
            for block in blocks(network):
                hooks.callback(block.register_forward_pre_hook(lambda *_: check()).remove)
        for network in looped(host):
            hooks.callback(network.register_forward_pre_hook(lambda *_: on_call()).remove)
        yield


def networks(host: Any) -> list[nn.Module]:
    """All networks of a pipeline: denoisers, text encoders, autoencoder; or the one model of a text pipeline."""
    from torch import nn

    parts = getattr(host, "components", None)
    values = list(parts.values()) if isinstance(parts, dict) else [getattr(host, "model", None)]
    return [value for value in values if isinstance(value, nn.Module)]


def looped(host: Any) -> list[nn.Module]:
    """Those that the loop calls, as far as hooks reach them: not what is compiled as a whole."""
    from hasten.errors import ModelError
    from hasten.pipelines.host import denoisers

    try:
        found = list(denoisers(host).values())
    except ModelError:
        found = networks(host)
    return [network for network in found if not _compiled(network)]


def blocks(network: nn.Module) -> list[nn.Module]:
    """The network itself and all entries of its lists of blocks. Compiled ones are left alone: a hook would compile them anew."""
    from torch import nn

    found = {id(network): network}
    for module in network.modules():
        if isinstance(module, nn.ModuleList):
            found |= {id(entry): entry for entry in module if isinstance(entry, nn.Module)}  # some lists hold None
    return [block for block in found.values() if not _compiled(block) and not isinstance(block, nn.ModuleList | nn.ModuleDict)]


def _compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
