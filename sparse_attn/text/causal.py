"""The policy on the `attention` axis of a causal language model: what the prompt reads, what each new token reads.

Shapes: B batch, Hq, Hk heads, n new queries, S keys, D, Dv head dimensions.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from hasten.errors import RecipeError
from hasten.recipe import Attention, Axis
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

    def joined(self, other: Axis) -> CausalAttention | None:
        """Prompts read as one part says, caches as the other. A `SparseAttention`, made for diffusion models, says it of
        prompts. Raises `RecipeError` where both are about prompts, both about caches, or about different layers."""
        if isinstance(other, SparseAttention):
            other = CausalAttention(prompt=other)
        if not isinstance(other, CausalAttention):
            return None
        twice = [name for name in ("prompt", "cache") if getattr(self, name) and getattr(other, name)]
        if twice:
            words = {"prompt": "what prompts read of themselves", "cache": "what new tokens read of the cache"}
            raise RecipeError(
                f"both say {' and '.join(words[name] for name in twice)}. Two of them join where one is about prompts alone"
                " and the other about caches alone, as in minference+squeezed."
            )
        if self.dense != other.dense:
            raise RecipeError("they keep different layers dense. Give both the same `dense`.")
        prompts, caches = (self if self.prompt else other), (self if self.cache else other)
        return caches.model_copy(update={"prompt": prompts._prompt(caches.min_tokens)})

    def _prompt(self, min_tokens: int) -> SparseAttention | None:
        """The part for prompts, for a policy of `min_tokens` and with what it has of its own here."""
        if self.prompt is None or self.prompt.min_tokens is not None or self.min_tokens == min_tokens:
            return self.prompt
        return self.prompt.model_copy(update={"min_tokens": self.min_tokens})
