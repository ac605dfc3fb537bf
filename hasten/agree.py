"""Ranks that compute parts of one sample must decide alike, or one waits for ever for what another has skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Mean = Callable[[Tensor], Tensor]
"""Takes the numbers that a decision rests on and returns what all ranks decide by."""


def alone(values: Tensor) -> Tensor:
    """One rank: its own numbers."""
    return values


def across(group: Any) -> Mean:
    """The mean over the ranks of `group`, a torch.distributed process group: one small all-reduce per step.

    A flag (1 finite, 0 not) is 1 afterwards only where it was 1 on every rank, so `flag < 1` still finds the bad one.
    NaN on one rank is NaN on all, which every rule reads as "compute".
    """
    size = torch.distributed.get_world_size(group)

    def mean(values: Tensor) -> Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total, group=group)
        return total / size

    return mean


def group_of(model: Any) -> Any:
    """The process group over which diffusers splits this model's tokens (context parallelism), None where it does not."""
    config = getattr(model, "_parallel_config", None)
    inner = getattr(config, "context_parallel_config", None)
    mesh = getattr(inner, "_flattened_mesh", None)
    return mesh.get_group() if mesh is not None else None


def is_sharded(model: Any) -> bool:
    """Are this model's weights spread over ranks (FSDP), so that every evaluation needs all of them?"""
    names = {type(module).__name__ for module in [model, *getattr(model, "children", list)()]}
    return any(name.startswith(("FSDP", "FullyShardedDataParallel")) for name in names)
