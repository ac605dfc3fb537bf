"""Does sparse attention pay for these calls on this machine? Asked before anything is sparse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from hasten.errors import UsageError
from hasten.pipelines.attention.tokens import Key, Learned
from hasten.sparse_attn.measure.calibrate import measured
from hasten.sparse_attn.measure.roofline import PLANNING, Machine, Shape, machine_called, predict
from hasten.sparse_attn.policy import SparseAttention

TOO_SHORT = 512
"""No machine gains anything on fewer tokens; there it is not even measured."""

USUAL_DENSITY = 0.25
"""Assumed for selectors that are given no share of what they read."""


def declines(
    found: dict[Key, Learned], policy: SparseAttention, model: nn.Module, say: Callable[[str], None]
) -> dict[Key, Learned]:
    """`found`, with those calls dense that would gain nothing. say: told once for each size why."""
    judged: dict[tuple[int, ...], str] = {}
    result = dict(found)
    eligible = {key: each for key, each in found.items() if each.q is not None}
    for key, each in eligible.items():
        size = (*each.shapes[0][1:], each.shapes[1][2])
        if size not in judged:
            layers = sum((*other.shapes[0][1:], other.shapes[1][2]) == size for other in eligible.values())
            judged[size] = reason_against(each, layers, len(eligible), policy, model)
            if judged[size]:
                say(f"{layers} attention calls ({each.name}, ...) stay dense: {judged[size]}")
        if judged[size]:
            result[key] = replace(each, q=None, k=None, reason=judged[size])
    return result


def reason_against(each: Learned, layers: int, sites: int, policy: SparseAttention, model: nn.Module) -> str:
    """Why calls like `each` stay dense; empty where they may gain. layers: how many there are, of `sites` in all."""
    (batch, heads, tokens, head_dim), keys = each.shapes[0], each.shapes[1][2]
    if policy.min_tokens is not None:
        return f"{tokens} tokens are fewer than min_tokens = {policy.min_tokens}" if tokens < policy.min_tokens else ""
    if tokens < TOO_SHORT:
        return f"{tokens} tokens are too few to gain anything (min_tokens=0 makes them sparse all the same)"
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    shape = Shape(
        type(model).__name__, tokens, layers, heads, head_dim, linear=2.0 * weights * layers / sites, keys=keys, batch=batch
    )
    found = predict(
        shape, expected_density(policy), machine_of(model), planning=PLANNING / policy.refresh,
        dense_share=min(1.0, policy.warm + policy.tail + policy.dense_layers / layers),
    )  # fmt: skip
    return "" if found.worthwhile else f"{found.why} (min_tokens=0 makes them sparse all the same)"


def expected_density(policy: SparseAttention) -> float:
    """The share of pairs that the policy's selectors are told to read; a usual one where they are told none."""
    shares = [getattr(pattern.select, name, None) for pattern in policy.patterns for name in ("share", "first")]
    told = [share for share in shares if share is not None]
    return float(max(told)) if told else USUAL_DENSITY


def machine_of(model: nn.Module) -> Machine:
    """Rates of the device that the network is on: from a table, or measured where there is none (a few tenths of a
    second, once for each size of calls in a session)."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    device = weight.device if weight is not None else torch.device("cpu")
    try:
        return machine_called(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
    except UsageError:
        return measured(device)
