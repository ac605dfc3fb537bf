"""One training in several processes: each holds every role, and trains on its share of each batch.

Launched by `torchrun` or `accelerate launch`, which say in the environment who is who. Gradients are averaged in
`trainer.py`; here the group is made, and what one process alone may do is done by the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Number of this process, 0 for the first or only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def launched() -> int:
    """How many processes were launched together. Also outside of `joined`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this process was launched alone or as the first: who tells the user. Also outside of `joined`."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[None]:
    """While open, this process belongs to the group it was launched in; nothing happens to one that was launched alone.
    Over NCCL where there are GPUs, a GPU for each process, otherwise over gloo."""
    if launched() < 2 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def first_alone() -> Iterator[None]:
    """The body runs in the first process, and then in the others: what one writes, the others find."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and count() > 1:
        dist.barrier()


@torch.no_grad()
def share(tensors: Iterable[Tensor]) -> None:
    """Everybody gets the first process's values, in place."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


@torch.no_grad()
def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def average(tensor: Tensor) -> Tensor:
    """The mean over all processes, in place."""
    if count() > 1:
        dist.all_reduce(tensor)
        tensor /= count()
    return tensor
