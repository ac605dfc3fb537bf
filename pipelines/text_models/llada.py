"""LLaDA: the first (OLMo-type, arXiv 2502.09992; 1.5), LLaDA-MoE, and the block-causal LLaDA2.0 and 2.1.

Shapes: m texts, N computed tokens of each, D head dimension.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.caching.store import Pass
from hasten.pipelines.text_models.family import Family, Sizes, block_causal, logits_of
from hasten.session import Attachment


class LLaDA(Family):
    """Takes no positions: its rotary modules count from 0. Each gets ours while it generates.

    A model whose attention runs in the flash-attn package does so through an attribute of its blocks, which is taken
    away for as long. With tied weights the head is the embedding, so tokens are dropped before the last norm instead.
    """

    family: ClassVar[str] = "LLaDA"
    names: ClassVar[tuple[str, ...]] = ("LLaDAModelLM",)
    types: ClassVar[tuple[str, ...]] = ("llada",)
    mask_token: ClassVar[int | None] = 126336

    @classmethod
    def sizes(cls, config: Any) -> Sizes:
        heads = 1 if getattr(config, "multi_query_attention", None) else config.n_heads
        return Sizes(
            config.n_layers, getattr(config, "n_kv_heads", None) or heads, config.embedding_size or config.vocab_size,
            config.vocab_size, config.max_sequence_length,
        )  # fmt: skip

    def forward(self, ids: Tensor, positions: Tensor, now: Pass) -> Any:
        return self.model(input_ids=ids, use_cache=False)

    def head(self) -> nn.Module | None:
        if self.model.config.weight_tying:  # type: ignore[union-attr]
            return self.model.model.transformer.ln_f  # type: ignore[union-attr, return-value]
        return super().head()

    def shadow(self, attachment: Attachment) -> None:
        for module in self.model.modules():
            tables = getattr(module, "get_rotary_embedding", None)
            if tables is not None:
                attachment.replace(module, "get_rotary_embedding", self._placed(tables))
            if getattr(module, "flash_attn_func", None) is not None:
                attachment.replace(module, "flash_attn_func", None)

    def _placed(self, tables: Any) -> Any:
        def at_positions(seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
            """Sines and cosines [m, 1, N, D] of the tokens that are computed, instead of the first `seq_len`."""
            sin, cos = tables(self.facts.context, device)
            positions = self.positions
            return sin[0, 0][positions][:, None], cos[0, 0][positions][:, None]

        return at_positions


class LLaDAMoE(Family):
    """Llama-type names, positions as an argument, and asserts against every kind of cache."""

    family: ClassVar[str] = "LLaDA-MoE"
    names: ClassVar[tuple[str, ...]] = ("LLaDAMoEModelLM",)
    types: ClassVar[tuple[str, ...]] = ("lladamoe",)
    mask_token: ClassVar[int | None] = 156895


class LLaDA2(Family):
    """Block-causal by a mask that its caller brings; blocks of 32, which no config of it says."""

    family: ClassVar[str] = "LLaDA2"
    names: ClassVar[tuple[str, ...]] = ("LLaDA2MoeModelLM",)
    types: ClassVar[tuple[str, ...]] = ("llada2_moe",)
    mask_token: ClassVar[int | None] = 156895
    causal: ClassVar[bool] = True
    block: ClassVar[int | None] = 32
    in_interface: ClassVar[bool | None] = None

    def own(self, ids: Tensor) -> Tensor:
        device, count = ids.device, ids.shape[1]
        dtype = next(self.model.parameters()).dtype
        mask = block_causal(count, self.facts.block, device).to(dtype).log()[None, None]
        positions = torch.arange(count, device=device)[None]
        return logits_of(self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False))
