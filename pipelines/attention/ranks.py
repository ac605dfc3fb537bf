"""Ranks that share a sequence: diffusers' context parallelism with the exchange that sparse attention needs.

A plan is about all tokens, and a rank holds some. Ulysses trades them: each rank gets all tokens of some heads, plans and
reads those, and trades back. A ring leaves a rank with all keys and its own queries, and diffusers' native backend, the
one that `Catch` looks into, has no ring at all. So sites that are followed trade heads for tokens whatever the degrees are:
over the very ranks of the ring, or of the ring and Ulysses together. For N ranks that moves 2 / N of what diffusers' ring
gathers, and holds as much less.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hasten.agree import Mean, alone


def by_heads(config: Any, heads: int | None) -> Any:
    """`config` (diffusers' ParallelConfig or None) with Ulysses over all of its ranks; itself where it is that already.

    heads: of the attention that it is for; None: unknown. Heads that the ranks do not divide are padded by diffusers
    ("Ulysses Anything", 0.42), as are tokens of a ring that may be of any number.
    """
    shared = getattr(config, "context_parallel_config", None)
    if shared is None or shared.ring_degree == 1:
        return config
    ranks = shared.ring_degree * shared.ulysses_degree
    inner, outer = copy.copy(shared), copy.copy(config)
    inner.ring_degree, inner.ulysses_degree = 1, ranks
    inner._ulysses_mesh = shared._flattened_mesh  # in whose order the tokens are spread
    inner.ulysses_anything = shared.ring_anything or (heads or ranks) % ranks != 0
    inner.ring_anything = False
    outer.context_parallel_config = inner
    return outer


def reason_against(config: Any, heads: int | None) -> str:
    """Why attention of `heads` heads cannot be traded under `config`; empty where it can, and without a ring."""
    shared = getattr(config, "context_parallel_config", None)
    if shared is None or shared.ring_degree == 1 or heads is None:
        return ""
    ranks = shared.ring_degree * shared.ulysses_degree
    missing = -heads % ranks
    if missing < -(-heads // ranks):  # diffusers pads the last rank only, which has to keep a head of its own
        return ""
    return f"its {heads} heads cannot be spread over the {ranks} ranks of the ring, so that each has one"


def is_ring(model: Any) -> bool:
    """Do ranks pass keys of this model round a ring, alone or inside Ulysses?"""
    shared = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    return shared is not None and shared.ring_degree > 1


@dataclass(frozen=True, slots=True)
class Accord:
    """What ranks have to decide alike, because an evaluation, or the way tokens are exchanged in it, needs all of them.

    agree: see `hasten.agree`; without a group each decides for itself. Asked once for each kind of call, so it may wait
    for the device, `device`, whose tensors the ranks can exchange.
    """

    agree: Mean
    device: torch.device

    def anywhere(self, flag: bool) -> bool:
        """Is it so on any rank?"""
        return flag if self.agree is alone else self._shares([flag])[0] > 0

    def everywhere(self, flags: Sequence[bool]) -> list[bool]:
        """Which are so on all ranks?"""
        return list(flags) if self.agree is alone else [share == 1 for share in self._shares(flags)]

    def _shares(self, flags: Sequence[bool]) -> list[float]:
        found: list[float] = self.agree(torch.tensor(flags, dtype=torch.float32, device=self.device)).tolist()
        return found
