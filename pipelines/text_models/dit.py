"""MDLM (arXiv 2406.07524) and BD3-LM (arXiv 2503.09573): transformers with a noise level, under names of their own.

Both give raw logits; SUBS, which says that the mask is never written and that known tokens stay, is what the engine
does.

Shapes: m texts, N computed tokens of each, D head dimension.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.caching.store import Pass
from hasten.canvas import TextFacts
from hasten.errors import RefusedError
from hasten.pipelines.text_models.family import Family, Sizes, logits_of
from hasten.session import Attachment

EPS = 1e-3
"""Of the log-linear noise schedule: a share t of masks is the noise level -log(1 - (1 - EPS) t)."""


class MDLM(Family):
    """No positions, no masks, a noise level for each text. Where the model looks at the level (`time_conditioning`) it
    is that of the share of masks, and nothing can be kept from one evaluation to the next."""

    family: ClassVar[str] = "MDLM"
    names: ClassVar[tuple[str, ...]] = ("MDLM",)
    types: ClassVar[tuple[str, ...]] = ("mdlm",)

    def __init__(self, model: nn.Module, facts: TextFacts) -> None:
        super().__init__(model, facts)
        self.caches = not getattr(model.config, "time_conditioning", False)

    @classmethod
    def sizes(cls, config: Any) -> Sizes:
        return Sizes(config.n_blocks, config.n_heads, config.vocab_size, config.vocab_size, config.model_length)

    @classmethod
    def mask_token_of(cls, config: Any) -> int | None:
        return int(config.vocab_size) - 1

    def forward(self, ids: Tensor, positions: Tensor, now: Pass) -> Any:
        assert self.tap.store is not None
        return self.called(ids, now.slots < self.tap.store.slots)

    def called(self, ids: Tensor, real: Tensor) -> Any:
        """One call. real bool [m, N]: what is a token at all."""
        return self.model(input_ids=ids, timesteps=self.noise(ids, real))

    def noise(self, ids: Tensor, real: Tensor) -> Tensor:
        """float32 [m]."""
        if self.caches:  # the model does not look at it
            return torch.zeros(len(ids), device=ids.device)
        share = ((ids == self.facts.mask_id) & real).sum(1) / real.sum(1).clamp(min=1)
        return -torch.log1p(-(1 - EPS) * share)

    def head(self) -> nn.Module | None:
        return self.model.backbone.output_layer  # type: ignore[union-attr, return-value]

    def shadow(self, attachment: Attachment) -> None:
        rotary: Any = self.model.backbone.rotary_emb  # type: ignore[union-attr]
        attachment.replace(rotary, "forward", lambda x, seq_dim=1: self._tables(rotary.inv_freq))

    def _tables(self, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [m, N, 3, 1, D] for packed queries, keys and values; values are not turned."""
        angle = self.positions[..., None].type_as(inv_freq) * inv_freq
        angle = torch.cat((angle, angle), dim=-1)
        turned = [torch.stack((part, part, rest), 2)[..., None, :] for part, rest in (
            (angle.cos(), torch.ones_like(angle)), (angle.sin(), torch.zeros_like(angle)),
        )]  # fmt: skip
        return turned[0], turned[1]

    def own(self, ids: Tensor) -> Tensor:
        return logits_of(self.called(ids, torch.ones_like(ids, dtype=torch.bool)))


class BD3LM(MDLM):
    """Block-causal in `sample_mode`. Its own cache, if a sampler left one, is out of its sight while we generate."""

    family: ClassVar[str] = "BD3-LM"
    names: ClassVar[tuple[str, ...]] = ("BD3LM",)
    types: ClassVar[tuple[str, ...]] = ("bd3lm",)
    causal: ClassVar[bool] = True

    def __init__(self, model: nn.Module, facts: TextFacts) -> None:
        super().__init__(model, facts)
        if not self.caches:
            raise RefusedError(
                "This BD3-LM looks at the noise level (time_conditioning), which differs from block to block; one call"
                " has one level only, so it cannot be evaluated as it was trained."
            )

    def called(self, ids: Tensor, real: Tensor) -> Any:
        return self.model(input_ids=ids, timesteps=self.noise(ids, real), sample_mode=True, store_kv=False)

    def shadow(self, attachment: Attachment) -> None:
        super().shadow(attachment)
        self._uncached(attachment)

    def own(self, ids: Tensor) -> Tensor:
        attachment = Attachment()
        self._uncached(attachment)
        try:
            return super().own(ids)
        finally:
            attachment.restore()

    def _uncached(self, attachment: Attachment) -> None:
        for block in self.model.backbone.blocks:  # type: ignore[union-attr]
            if getattr(block, "kv_cache", None) is not None:
                attachment.replace(block, "kv_cache", None)
