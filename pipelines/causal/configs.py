"""The configs of one model, copied: its attention modules call another function, and whoever else shares a config does not."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hasten.session import Attachment

OURS = "hasten"
"""What the names of our attention functions begin with."""


def taken(modules: Iterable[nn.Module]) -> bool:
    """Does a session stand on these attention modules already?"""
    return any(module.config._attn_implementation.startswith(OURS) for module in modules)  # type: ignore[union-attr, operator]


def redirect(attachment: Attachment, host: nn.Module, modules: Iterable[nn.Module], name: str) -> None:
    """Let the attention `modules` of `host` call the function that is registered as `name`, until `attachment` is undone.

    Every module of the host gets a copy of its config, the same one where they share one.
    """
    memo: dict[int, Any] = {}
    copy.deepcopy(host.config, memo)
    ours = {id(module.config): module.config for module in modules}
    for number, own in ours.items():
        if number not in memo:
            copy.deepcopy(own, memo)
    for module in host.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig) and id(config) in memo:
            attachment.replace(module, "config", memo[id(config)])
    for number in ours:
        memo[number]._attn_implementation_internal = name
