"""Can this policy read the prompt of a language model? Tried on a small one before anything is attached."""

from __future__ import annotations

import re

import torch

from hasten.errors import HastenError
from hasten.pipelines.causal.site import ONCE
from hasten.sparse_attn.mask import causal
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.segments import plain
from hasten.sparse_attn.text.exact import exact

TOKENS = 192
"""Of the small prompt: a few blocks at usual sizes."""

FUTURE = 1e4
"""What values of the future are in it; those of the past are at most 1."""


def why_not(policy: SparseAttention) -> str:
    """A phrase that says why `policy` cannot read causal prompts; empty where it can.

    Policies of diffusion models may need a grid, or what earlier steps have shown; they say so themselves when they are
    called. What stands in for keys that are not read must not hold keys of the future: the queries of the first half get
    outputs within the values of the first half, or the policy is refused.
    """
    if policy.recover is not None or any(pattern.start().score.needs_lse for pattern in policy.patterns):
        return "it goes by what earlier dense steps have shown, and a prompt is read once"
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, TOKENS, 16, generator=generator) for heads in (2, 1, 1))
    v = v.tanh()
    v[:, :, TOKENS // 2 :] = FUTURE
    tokens, mask, scale = plain(TOKENS), causal(TOKENS, TOKENS), 0.25
    state = policy.model_copy(update={"warm": 0.0, "tail": 0.0, "every": 0, "dense_layers": 0}).start()
    try:
        with torch.no_grad():
            o = state.attend(q, k, v, ONCE, tokens, tokens, scale, lambda: exact(q, k, v, scale, mask).o, mask)
    except Exception as error:  # noqa: BLE001 - whatever it says to a prompt is a reason to leave it alone
        if isinstance(error, HastenError):
            return re.split(r"[.;] ", str(error))[0].rstrip(".")  # what follows is advice to those who call parts themselves
        return f"it fails on a small prompt ({type(error).__name__}: {error})"
    if not torch.isfinite(o).all():
        return "its output is not finite on a small prompt"
    if o[:, :, : TOKENS // 2].abs().max() > 1.001:
        return "what stands in for keys that are not read would show queries what comes after them"
    return ""
