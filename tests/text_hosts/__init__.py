"""Every family of text diffusion models, small and with random weights: `FAMILIES[name](seed)` gives a `Host`.

One file per family says what was read, what is kept of the original and what is left out. The classes are written anew;
what is kept is what an adapter can trip over: names, signatures, masks, positions, caches, shifts.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.text_hosts import (
    a2d,
    bd3lm,
    bundled,
    diffusion_gemma,
    dream,
    fast_dllm_v2,
    llada,
    llada2,
    llada_moe,
    mdlm,
    sdar,
)
from tests.text_hosts.facts import Facts, Host

FILES = (llada, llada_moe, llada2, dream, sdar, fast_dllm_v2, mdlm, bd3lm, a2d, bundled, diffusion_gemma)

FAMILIES: dict[str, Callable[[int], Host]] = {name: build for file in FILES for name, build in file.FAMILIES.items()}
"""Name -> builder. The seed decides the weights."""

MASKED = {name: build for name, build in FAMILIES.items() if not name.startswith("diffusion-gemma")}
"""Those that are written from masks; DiffusionGemma starts from noise and has a way of its own."""

__all__ = ["FAMILIES", "MASKED", "Facts", "Host"]
