"""The attention modules of a network: each asks whoever walks through the network what to do.

Shapes: B batch, Hq, Hk heads, Sq, Sk tokens, D, Dv head dimensions.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from hasten.errors import UsageError
from hasten.pipelines.attention import ranks
from hasten.pipelines.attention.processors import SITE, Catch, dense, reason_against, stand_in
from hasten.pipelines.host import is_whole_compiled
from hasten.session import Attachment
from hasten.sparse_attn.op import ticket

ELSEWHERE = "elsewhere"
"""Name of the site that stands for attention outside of all processors; seen in learning walks only."""

HEADS = ("heads", "num_heads", "num_attention_heads", "n_heads")
"""What attention modules call the number of their heads."""


class Walk(Protocol):
    """One evaluation of a network in one thread: what its attention calls are answered with."""

    def wants(self, site: Site) -> bool:
        """Is it worth asking about this site? Those that nobody wants run as if nothing had been attached."""
        ...

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, named: dict[str, Any]) -> Tensor:
        """o [B, Hq, Sq, Dv] for q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv] of one call.

        named: further arguments of `torch.nn.functional.scaled_dot_product_attention`.
        """
        ...


@dataclass(slots=True, eq=False, weakref_slot=True)
class Site:
    """One attention module. name: dotted. number: its place among the network's modules. original: its processor. heads:
    of its queries; None where it does not say."""

    name: str
    number: int
    original: Any
    walks: Walks
    heads: int | None = None
    ticket: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.ticket = ticket(self)

    @property
    def awake(self) -> bool:
        """Is somebody walking through the network, in this thread, who wants this site?"""
        return self.walks.now is not None and self.walks.now.wants(self)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        """What the present walk says; the host's own attention where there is none."""
        walk = self.walks.now
        return self.dense(q, k, v, **named) if walk is None else walk.attend(self, q, k, v, named)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        """The host's own attention."""
        return dense(self.original, q, k, v, **named)


class Walks(threading.local):
    """The walk that is in progress in each thread."""

    now: Walk | None = None


class Sites:
    """All attention sites of one network, put onto it until `detach`. refused: name -> why a module is none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.walks = Walks()
        self.all: list[Site] = []
        self.refused: dict[str, str] = {}
        self.elsewhere = Site(ELSEWHERE, -1, None, self.walks)
        self._attachment = Attachment()
        for name, module in model.named_modules():
            processor = getattr(module, "processor", None)
            if processor is None or not callable(processor) or name.rpartition(".")[2] == "processor":
                continue
            if hasattr(processor, SITE):
                self.detach()
                raise UsageError(
                    "Another open session already makes this network's attention sparse. Close it first, or put both"
                    " methods into one recipe."
                )
            heads = _heads(module)
            shared = getattr(processor, "_parallel_config", None)
            if reason := reason_against(processor) or ranks.reason_against(shared, heads):
                self.refused[name] = reason
                continue
            site = Site(name, len(self.all), processor, self.walks, heads)
            self.all.append(site)
            self._attachment.replace(module, "processor", stand_in(processor, site, site.ticket))

    def detach(self) -> None:
        """Give all modules their own processors back."""
        self._attachment.restore()

    @contextlib.contextmanager
    def walking(self, walk: Walk | None, *, everywhere: bool = False) -> Iterator[None]:
        """While open, attention calls of this thread go to `walk` (None: to nobody). everywhere: those outside of processors,
        too."""
        before, self.walks.now = self.walks.now, walk
        try:
            # A mode around compiled blocks would have them compiled again, only to look.
            if everywhere and not any(map(is_whole_compiled, self.model.modules())):
                with Catch(self.elsewhere, self.elsewhere.ticket):
                    yield
            else:
                yield
        finally:
            self.walks.now = before


def _heads(module: nn.Module) -> int | None:
    """What an attention module says of its heads."""
    found = next((n for name in HEADS if isinstance(n := getattr(module, name, None), int)), None)
    return found if found is None or found > 0 else None
