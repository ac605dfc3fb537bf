"""An adapter that acts on mask tokens alone: what a model says of ordinary tokens stays as it is, bit for bit.

The low-rank branch of each layer is multiplied by 1 where its input token is a mask and by 0 elsewhere, and x + 0 is x.
(Gated LoRA: Samragh et al., arXiv 2507.11851, section 3.2.) The gate is read off `input_ids` of the call, so that it
also serves a model that plain peft has loaded. Hooks are on the one instance and go away with the context.

Shapes: m texts of N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from hasten.errors import UsageError


@contextmanager
def gated(network: nn.Module, adapter: str, mask_id: int) -> Iterator[None]:
    """While open, `adapter` (a peft LoRA that is on the network) acts on tokens `mask_id` alone.

    The network is called with `input_ids` int64 [m, N] by name. Raises `UsageError` where it has no such adapter.
    """
    modules: list[Any] = list(network.modules())
    branches = [module.lora_B[adapter] for module in modules if adapter in getattr(module, "lora_B", ())]
    if not branches:
        raise UsageError(f"{type(network).__name__} has no adapter {adapter!r} to gate.")
    now: list[Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        now[:] = [(kwargs["input_ids"] == mask_id)[..., None]]

    def gate(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * now[0].to(output.dtype)

    with ExitStack() as stack:
        stack.callback(network.register_forward_pre_hook(look, with_kwargs=True).remove)
        for branch in branches:
            stack.callback(branch.register_forward_hook(gate).remove)
        yield
