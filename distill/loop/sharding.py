"""Weights in parts: N processes hold what one would, and each changes its part.

Networks are cut by torch's `fully_shard`, block by block: a block's weights are whole only while it is evaluated, and the
gradients of a network that is trained arrive as parts. Adapters and heads are small and stay whole; their gradients are
summed in parts, and optimiser and average have a part each. Either way an optimiser sees plain tensors: runs of a weight's
numbers, laid flat, which share the weight's memory.

Shapes: N processes; n numbers of a part, at most `size`; all parts of a weight together are its numbers, in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hasten.distill.loop import processes
from hasten.distill.network.roles import Roles
from hasten.errors import UsageError


@dataclass(frozen=True)
class Share:
    """This process's part of one weight. own [n]: its numbers, as the optimiser sees them; size: of the longest part."""

    weight: nn.Parameter
    own: nn.Parameter
    size: int

    @classmethod
    def of(cls, weight: nn.Parameter) -> Share:
        """The part of a weight that is cut already, or of one that is whole."""
        if isinstance(weight, DTensor):  # cut by rows, the last parts shorter or empty
            flat = _local(weight).view(-1)
            rows = -(-weight.shape[0] // processes.count())
            return cls(weight, nn.Parameter(flat), rows * (weight.numel() // weight.shape[0]))
        size = -(-weight.numel() // processes.count())
        return cls(weight, nn.Parameter(_part(weight.detach().view(-1), size)), size)

    @property
    def cut(self) -> bool:
        """Whether no process has the whole weight."""
        return isinstance(self.weight, DTensor)

    def part(self, whole: Tensor) -> Tensor:
        """This process's part [n] of any tensor of the weight's shape."""
        return _part(whole.reshape(-1), self.size)


def shard(roles: Roles) -> None:
    """Cut every network of these roles. Adapters on them stay whole. Raises `UsageError` in a single process."""
    if processes.count() < 2:
        raise UsageError(
            "train.shard cuts weights among processes, and there is one. Leave it out, or start several: torchrun"
            " --nproc-per-node 2 -m hasten train ..."
        )
    first = next(roles["teacher"].host.network.parameters())
    mesh = init_device_mesh(first.device.type, (processes.count(),))
    adapters = {p for role in roles.values() if role.stage is not None and role.trained for p in role.parameters().values()}
    for network in {id(role.host.network): role.host.network for role in roles.values()}.values():
        whole = adapters & set(network.parameters())
        for block in _blocks(network):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        # What is outside of blocks stays whole until `rest`: judges differentiate what blocks answer, and the network's own
        # answer, by which torch would know when to gather the rest again, is in no loss of theirs.
        fully_shard(network, mesh=mesh, reshard_after_forward=False, ignored_params=whole)


def rest(roles: Roles) -> None:
    """Behind a phase, when nothing is to be differentiated any more: networks hold their parts alone."""
    for role in roles.values():
        network: Any = role.host.network
        network.reshard()


def take_gradients(shares: Sequence[Share]) -> None:
    """Give every part the gradient of its numbers, the mean over all processes; the weights keep none."""
    for share in shares:
        if share.cut:
            found = share.weight.grad
            share.own.grad = None if found is None else _local(found).reshape(-1)
    whole = [share for share in shares if not share.cut]
    if whole:
        given = [torch.zeros_like(s.weight) if s.weight.grad is None else s.weight.grad for s in whole]
        parts = torch.cat([_rows(grad.reshape(-1), share.size) for grad, share in zip(given, whole, strict=True)], 1)
        mine = parts.new_empty(parts.shape[1])
        dist.reduce_scatter_tensor(mine, parts.reshape(-1))
        mine /= processes.count()
        for share, run in zip(whole, torch.split(mine, [share.size for share in whole]), strict=True):
            share.own.grad = run[: len(share.own)].clone()
    for share in shares:
        share.weight.grad = None


def spread(shares: Iterable[Share]) -> None:
    """Weights that every process has whole get the parts that each has changed."""
    whole = [share for share in shares if not share.cut]
    for share, found in zip(whole, gather(whole, [share.own for share in whole]), strict=True):
        share.weight.detach().copy_(found)


@torch.no_grad()
def gather(shares: Sequence[Share], parts: Sequence[Tensor]) -> list[Tensor]:
    """Whole tensors of the weights' shapes from every process's parts [n] of them."""
    if not shares:
        return []
    mine = torch.cat([_padded(part, share.size) for part, share in zip(parts, shares, strict=True)])
    all_of_it = mine.new_empty(processes.count(), len(mine))
    dist.all_gather_into_tensor(all_of_it.view(-1), mine)
    runs = torch.split(all_of_it, [share.size for share in shares], 1)
    return [
        run.reshape(-1)[: share.weight.numel()].reshape(share.weight.shape)
        for run, share in zip(runs, shares, strict=True)
    ]


def clip(shares: Sequence[Share], most: float) -> Tensor:
    """Scale the parts' gradients so that their norm over all processes is at most `most`; the norm before."""
    found = [share.own.grad for share in shares if share.own.grad is not None]
    square = torch.zeros((), device=shares[0].own.device)
    for grad in found:
        square += grad.float().square().sum()
    norm = processes.total(square).sqrt()
    if found:
        torch._foreach_mul_(found, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes that this process holds of these tensors."""
    return sum(t.numel() * t.element_size() for t in map(_local, tensors))


def local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """This process's parts of tensors that are cut, and the others as they are."""
    return [_local(tensor) for tensor in tensors.values()]


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules: what a network evaluates one after the other."""
    found: list[nn.Module] = []
    lists: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(lists)):
            lists.append(f"{name}.")
            found += [child for child in module if next(child.parameters(), None) is not None]
    return found


def _local(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that is cut, or the tensor; without gradient."""
    if isinstance(tensor, DTensor):
        own: Tensor = tensor.to_local()
        return own.detach()
    return tensor.detach()


def _part(flat: Tensor, size: int) -> Tensor:
    begin = min(processes.rank() * size, len(flat))
    return flat[begin : begin + size]


def _padded(part: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(part.detach(), (0, size - len(part)))


def _rows(flat: Tensor, size: int) -> Tensor:
    """[N, size]: every process's part, padded."""
    return _padded(flat, size * processes.count()).view(processes.count(), size)
