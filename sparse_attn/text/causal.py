"""The policy on the `attention` axis of a causal language model: what the prompt reads, what each new token reads.

Shapes: B batch, Hq, Hk heads, n new queries, S keys, D, Dv head dimensions.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from hasten.recipe import Attention
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.scorers.spans import Depth
from hasten.sparse_attn.text.reader import Reader


class CausalAttention(Attention):
    """Sparse reading of the prompt, of the cache, or both.

    prompt: what the prompt's queries read of it, all at once; None: everything. Its `warm`, `tail` and `refresh` are
    about steps of a diffusion model and do nothing here. cache: what each new token reads of the cache; None:
    everything. dense: stretches of the model's layers that stay as they are. LongGen (2410.01485): the middle third,
    dense=[{begin: 0.333, end: 0.667}]; MASFormer (2310.12442): a few layers. min_tokens: prompts shorter than this,
    and caches that hold fewer, are read densely.
    """

    kind: ClassVar[str] = "causal"
    prompt: SparseAttention | None = None
    cache: Reader | None = None
    dense: tuple[Depth, ...] = ()
    min_tokens: int = Field(default=4096, ge=0)

    def acts_on(self, layer: int, layers: int) -> bool:
        """Is layer number `layer` of `layers` one of the sparse ones?"""
        return not any(depth.holds(layer, layers) for depth in self.dense)
