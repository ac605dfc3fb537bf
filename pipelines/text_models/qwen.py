"""Families on Llama and Qwen classes: Dream, SDAR, Fast-dLLM v2, dllm's A2D, and models of ours.

Shapes: m texts, N tokens of each.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.caching.store import Pass
from hasten.errors import ModelError
from hasten.pipelines.text_models.family import Family, Told, block_causal, logits_of
from hasten.session import Attachment


class Dream(Family):
    """Shifted logits (arXiv 2508.15487). The release that Fast-dLLM patched takes position_ids and does not use them,
    so the model's one rotary module is told the positions in both."""

    family: ClassVar[str] = "Dream"
    names: ClassVar[tuple[str, ...]] = ("DreamModel",)
    types: ClassVar[tuple[str, ...]] = ("Dream",)
    mask_token: ClassVar[int | None] = 151666
    shifts: ClassVar[bool] = True

    def forward(self, ids: Tensor, positions: Tensor, now: Pass) -> Any:
        return self.model(input_ids=ids, attention_mask="full", position_ids=positions, use_cache=False)

    def shadow(self, attachment: Attachment) -> None:
        rotary: Any = self.model.model.rotary_emb  # type: ignore[union-attr]
        tables = rotary.forward
        attachment.replace(rotary, "forward", lambda x, position_ids: tables(x, self.positions))

    def own(self, ids: Tensor) -> Tensor:
        return logits_of(self.model(input_ids=ids, attention_mask="full"))


class SDAR(Family):
    """SDAR and TraDo, block-causal by a mask that the caller brings (arXiv 2510.06303).

    A mask of ones only sends a call to the flash-attn package, and no mask is an error: it gets one zero, on the CPU,
    so that asking whether all are ones does not wait for the device.
    """

    family: ClassVar[str] = "SDAR"
    names: ClassVar[tuple[str, ...]] = ("SDARForCausalLM", "SDARMoeForCausalLM")
    types: ClassVar[tuple[str, ...]] = ("sdar", "sdar_moe")
    mask_token: ClassVar[int | None] = 151669
    causal: ClassVar[bool] = True

    def forward(self, ids: Tensor, positions: Tensor, now: Pass) -> Any:
        unread = torch.zeros(1, 1, 1)
        return self.model(
            input_ids=ids, attention_mask=unread, position_ids=positions, use_cache=False, store_kv=False
        )

    def own(self, ids: Tensor) -> Tensor:
        count = ids.shape[1]
        mask = block_causal(count, self.facts.block, ids.device)[None]
        positions = torch.arange(count, device=ids.device)[None]
        each = [  # its masks are [1, N, N]: one text at a time
            logits_of(self.model(input_ids=row[None], attention_mask=mask, position_ids=positions, use_cache=False))
            for row in ids
        ]
        return torch.cat(each)


class FastDLLM2(Family):
    """Fast-dLLM v2 (arXiv 2509.26328): makes its block-causal mask by itself, from the order of the tokens it gets."""

    family: ClassVar[str] = "Fast-dLLM v2"
    names: ClassVar[tuple[str, ...]] = ("Fast_dLLM_QwenForCausalLM",)
    types: ClassVar[tuple[str, ...]] = ("Fast_dLLM_Qwen",)
    mask_token: ClassVar[int | None] = 151665
    shifts: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    block: ClassVar[int | None] = 32

    def own(self, ids: Tensor) -> Tensor:
        return logits_of(self.model(input_ids=ids, use_cache=False, block_size=self.facts.block))


class A2D(Family):
    """Autoregressive classes made bidirectional by dllm; the config has the mask token if it was saved with it."""

    family: ClassVar[str] = "A2D"
    names: ClassVar[tuple[str, ...]] = ("A2DQwen3LMHeadModel", "A2DQwen2LMHeadModel", "A2DLlamaLMHeadModel")
    types: ClassVar[tuple[str, ...]] = ("a2d-qwen3", "a2d-qwen2", "a2d-llama")
    in_interface: ClassVar[bool | None] = None

    def own(self, ids: Tensor) -> Tensor:
        return logits_of(self.model(input_ids=ids, use_cache=False))


KINDS = ("full", "block", "causal")
"""What `hasten_diffusion["kind"]` may be."""


class Bundled(Family):
    """An unmodified transformers class whose config has `mask_token_id` and `hasten_diffusion`.

    `hasten_diffusion` is {"kind": "full" | "block" | "causal", "block": slots, "shifted": true | false}. Our own small
    models are such; so is any model of yours that was trained with the mask it names. One of kind causal is shifted, said
    or not: a language model whose blocks are single tokens, and which is written from left to right.
    """

    family: ClassVar[str] = "hasten_diffusion"
    in_interface: ClassVar[bool | None] = None

    @classmethod
    def named(cls, model: Any) -> bool:
        return getattr(model.config, "hasten_diffusion", None) is not None

    @classmethod
    def of(cls, model: Any, tokenizer: Any = None, told: Told = Told()) -> Bundled:  # noqa: B008 - frozen
        says = model.config.hasten_diffusion
        kind = says.get("kind") if isinstance(says, dict) else None
        if kind not in KINDS:
            raise ModelError(
                f"hasten_diffusion in the config of {type(model).__name__} is {says!r}; allowed: a mapping with kind"
                f" one of {', '.join(KINDS)}, block (slots, for kind block) and shifted (true or false)."
            )
        if told.shifted is None:
            told = Told(told.mask_token_id, told.block, kind == "causal" or bool(says.get("shifted", False)))
        return super().of(model, tokenizer, told)

    @classmethod
    def block_of(cls, config: Any, told: Told) -> int | None:
        says = config.hasten_diffusion
        if says["kind"] == "full":
            return super().block_of(config, told)
        block = 1 if says["kind"] == "causal" else told.block or says.get("block")
        if not isinstance(block, int) or block < 1:
            raise ModelError(f"hasten_diffusion says kind block, and block is {block!r}. It must be a number of slots.")
        return block

    def own(self, ids: Tensor) -> Tensor:
        pairs = block_causal(ids.shape[1], self.facts.block, ids.device)
        mask = pairs[None, None].expand(len(ids), -1, -1, -1)
        return logits_of(self.model(input_ids=ids, attention_mask=mask, use_cache=False))
