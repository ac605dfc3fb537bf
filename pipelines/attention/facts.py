"""What attention did, from the policy's states into the trace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.sparse_attn.policy import Fact, SparseState
from hasten.trace import Attended, Trace


@dataclass(frozen=True, slots=True)
class Held:
    """A state and where it belongs. tokens: queries of its calls."""

    site: str
    tokens: int
    state: SparseState


def record(trace: Trace, run: int, states: Iterable[Held]) -> None:
    """Write all facts into the trace, in order, and empty the states' lists. Waits for each device once."""
    facts = [(held, fact) for held in states for fact in held.state.facts]
    values = _numbers([value for _, fact in facts for value in (fact.density, fact.rho) if value is not None])
    entries = [_entry(run, held, fact, values) for held, fact in facts]
    for held, _ in facts:
        held.state.facts.clear()
    trace.attention.extend(sorted(entries, key=lambda entry: (entry.step, entry.branch, entry.layer)))


def _entry(run: int, held: Held, fact: Fact, values: dict[int, float]) -> Attended:
    told = held.state.policy.tells_recall and fact.rho is not None
    return Attended(
        run, fact.step, fact.branch, held.site, held.state.layer, fact.action, held.tokens,
        1.0 if fact.density is None else values[id(fact.density)],
        values[id(fact.rho)] if told else None, fact.reused,
    )  # fmt: skip


def _numbers(tensors: list[Tensor]) -> dict[int, float]:
    """id -> value of scalars, all of one device read together."""
    found: dict[int, float] = {}
    for device in {tensor.device for tensor in tensors}:
        here = [tensor for tensor in tensors if tensor.device == device]
        numbers = torch.stack([tensor.detach().float().reshape(()) for tensor in here]).tolist()
        found |= {id(tensor): number for tensor, number in zip(here, numbers, strict=True)}
    return found
