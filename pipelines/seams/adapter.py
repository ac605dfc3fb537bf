"""A LoRA on a network for as long as a session is open, and off it again without a trace.

peft's layers do the work, as they do for diffusers' own `load_lora_weights`, so that both give the same pictures. Put
on by hand rather than through diffusers, because some of its networks (PixArt) have no such method, and because what
was there before (other adapters, which of them were on, which weights want gradients) has to be as it was.

Shapes: as in `pipelines/lora.py`.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import nn

from hasten.errors import RefusedError
from hasten.pipelines.host import is_whole_compiled
from hasten.pipelines.lora import Lora, LowRank
from hasten.session import Attachment

_OURS = "_hasten_wraps"


def put_on(attachment: Attachment, network: nn.Module, lora: Lora, scale: float) -> str:
    """Let `network` run with `scale` times the change of `lora`, beside adapters that are on, until `attachment` is restored.

    Returns its name in the network.

    Raises `ModelError` for an adapter of another model, `RefusedError` where it could not be put on and taken off exactly.
    """
    lora.check(network)
    _refuse(network)
    name = _free_name(network)
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    had_config = "peft_config" in vars(network)
    attachment.on_restore(lambda: _take_off(network, name, flags, had_config))
    add(network, lora, name, scale)
    _give_back(flags)
    return name


def add(network: nn.Module, lora: Lora, name: str, scale: float = 1.0) -> None:
    """Put `lora` on `network` for good, as the adapter `name`, on beside those that are on. No weight of it wants gradients.

    Raises `ModelError` for an adapter of another model.
    """
    lora.check(network)
    before = {key: tuple(layer.active_adapters) for key, layer in _tuned(network).items()}
    _inject(network, lora, name)
    for key, layer in _tuned(network).items():
        if key not in before:
            setattr(layer, _OURS, True)
        layer.set_adapter([*before.get(key, ()), *([name] if key in lora.layers else [])], inference_mode=True)
        if key in lora.layers:
            _fill(layer, name, lora.layers[key], scale)


def _refuse(network: nn.Module) -> None:
    kind = type(network).__name__
    if is_whole_compiled(network):
        raise RefusedError(f"This {kind} is compiled as a whole, so no adapter can be put on it. Open the session first.")
    hooks = [getattr(module, "_diffusers_hook", None) for module in network.modules()]
    if any("group_offloading" in hook.hooks for hook in hooks if hook is not None):
        raise RefusedError(f"This {kind} is offloaded in groups, which would not move an adapter. Use offload 'model' or none.")
    for key, layer in _tuned(network).items():
        if layer.merged or layer.disable_adapters:
            state = "fused into the weights" if layer.merged else "switched off"
            raise RefusedError(f"An adapter on {key!r} of this {kind} is {state}. Unload it before another is put on.")


def _inject(network: nn.Module, lora: Lora, name: str) -> None:
    """peft's layers for every change, without weights yet: on `meta`, so that no random numbers are drawn."""
    from peft import LoraConfig, inject_adapter_in_model

    # A list of names would also match layers whose names end alike (proj_out, blocks.0.proj_out); a pattern does not.
    exactly = "|".join(re.escape(layer) for layer in lora.layers)
    config = LoraConfig(**(lora.configuration() | {"lora_bias": False, "target_modules": exactly}))
    with warnings.catch_warnings():  # another adapter being there already is no news to us
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, network, adapter_name=name, low_cpu_mem_usage=True)


def _fill(layer: Any, name: str, low: LowRank, scale: float) -> None:
    """Give one layer its weights, in the type and on the device of what they change."""
    like = layer.get_base_layer().weight
    kind = like.dtype if like.dtype.is_floating_point and like.dtype.itemsize > 1 else torch.float32  # packed weights
    for part, value in ((layer.lora_A[name], low.down), (layer.lora_B[name], low.up)):
        part.weight = nn.Parameter(value.to(like.device, kind), requires_grad=False)
    if low.bias is not None:
        bias = (low.bias / low.scale).to(like.device, kind)
        layer.lora_B[name].bias = nn.Parameter(bias, requires_grad=False)
        layer.lora_bias[name] = True
    layer.scaling[name] = low.scale * scale


def _take_off(network: Any, name: str, flags: list[tuple[nn.Parameter, bool]], had_config: bool) -> None:
    for key, layer in _tuned(network).items():
        layer.set_adapter([other for other in layer.active_adapters if other != name], inference_mode=True)
        layer.delete_adapter(name)
        # Whoever takes the last adapter off a layer that a session wrapped unwraps it; sessions end in any order.
        if getattr(layer, _OURS, False) and not len(layer.lora_A):
            parent, _, child = key.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
    config = vars(network).get("peft_config", {})
    config.pop(name, None)
    if not had_config and not config:
        vars(network).pop("peft_config", None)
    _give_back(flags)


def _give_back(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, wanted in flags:
        parameter.requires_grad_(wanted)


def _tuned(network: nn.Module) -> dict[str, Any]:
    """Name -> peft's layer, for those that are there."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def _free_name(network: nn.Module) -> str:
    taken, number = getattr(network, "peft_config", {}), 1
    while f"hasten_{number}" in taken:
        number += 1
    return f"hasten_{number}"
