"""Make a trained tiny transformer deeper without changing what it computes.

Stacking trained layers to start a deeper model is "Efficient Training of BERT by Progressively Stacking" (Gong et
al. 2019, https://proceedings.mlr.press/v97/gong19a.html). Different here: each new block stands behind the block
it copies and its three output projections start at zero, so the grown model begins as the same function.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_BLOCK = re.compile(r"^(.*?blocks\.)(\d+)\.(.*)$")
_OUTPUTS = ("attn1.to_out.0.", "attn2.to_out.0.", "ffn.net.2.", "ff.net.2.")


def grown_weights(weights: Mapping[str, Tensor], layers: int, new_layers: int) -> dict[str, Tensor]:
    """The weights of a model of `new_layers` blocks that computes what `weights`, of `layers` blocks, compute.

    The added blocks are spread evenly; each copies the block before it, with its output projections zeroed.
    Works for diffusers' Wan and PixArt transformers.
    """
    grown: dict[str, Tensor] = {}
    origin = [i * layers // new_layers for i in range(new_layers)]
    for name, value in weights.items():
        match = _BLOCK.match(name)
        if match is None:
            grown[name] = value.clone()
            continue
        prefix, old, rest = match[1], int(match[2]), match[3]
        for new, source in enumerate(origin):
            if source == old:
                added = new > 0 and origin[new - 1] == source
                silent = added and rest.startswith(_OUTPUTS)
                grown[f"{prefix}{new}.{rest}"] = value.new_zeros(value.shape) if silent else value.clone()
    return grown
