"""How much one generation really computes and holds, whichever library skips the rest.

Libraries count blocks, modules or calls, each in its own way. Here every method is measured alike: the floating
point operations that run inside the denoiser, and by how many bytes the living tensors grow from its first call to
the end of its last.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hasten.pipelines.host import denoisers


@dataclass(slots=True)
class Work:
    """flops: inside the denoisers. calls: of them. growth: of the living tensors up to the weighed call, in bytes."""

    flops: int = 0
    calls: int = 0
    growth: int | None = None


@contextlib.contextmanager
def watch(pipe: Any, weigh_at: int | None = None) -> Iterator[Work]:
    """Measure the calls of `pipe`'s denoisers while open. Slows them down: never time such a run.

    weigh_at: after how many calls the living tensors are weighed (1 is the first); None for never.
    """
    work, at_first, handles = Work(), 0, []
    counters: list[Any] = []  # TorchDispatchMode carries no types

    def before(*_: Any) -> None:
        nonlocal at_first
        if work.calls == 0 and weigh_at is not None and not counters:
            at_first = bytes_alive()
        counters.append(Flops())
        counters[-1].__enter__()

    def after(*_: Any) -> None:
        counter = counters.pop()
        counter.__exit__(None, None, None)
        work.flops += counter.total
        work.calls += 1
        if work.calls == weigh_at:
            work.growth = bytes_alive() - at_first

    for model in denoisers(pipe).values():
        handles.append(model.register_forward_pre_hook(before))
        handles.append(model.register_forward_hook(after, always_call=True))
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()
        while counters:  # a call that was broken off
            counters.pop().__exit__(None, None, None)


class Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts with PyTorch's own formulas. Its FlopCounterMode follows the module tree, too, which cache-dit makes cyclic."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(_counted_as(func._overloadpacket))
        if formula is None:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=output))
        return output


def _counted_as(packet: Any) -> Any:
    """The operator whose formula counts this one: attention on the CPU has none of its own."""
    aten = torch.ops.aten
    on_cpu = packet is aten._scaled_dot_product_flash_attention_for_cpu
    return aten._scaled_dot_product_flash_attention if on_cpu else packet


def bytes_alive() -> int:
    """Bytes of all storages that Python's tensors refer to, each counted once; what waits for collection is not."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):  # isinstance would wake lazy proxies of other libraries
            with contextlib.suppress(RuntimeError, NotImplementedError):  # tensors without a storage
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
