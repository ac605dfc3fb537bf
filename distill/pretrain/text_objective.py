"""The losses of text models: masked cross-entropy with all of its variants, and next-token cross-entropy.

A share t of the askable tokens is masked and the masked ones are predicted; t is spread evenly over the rows of a
batch. Every masked token counts the same: with the weight 1/t of the variational bound (MDLM,
https://arxiv.org/abs/2406.07524) the list tasks hardly began to be learned. The judge reports the bound.

full      every token sees every token (LLaDA, https://arxiv.org/abs/2502.09992)
shifted   the same, but the output at i - 1 predicts token i (Dream, https://arxiv.org/abs/2508.15487)
block     blocks of the masked text see themselves and the clean blocks before them: one pass over [masked; clean]
          with the mask of BD3-LM (https://arxiv.org/abs/2503.09573, section 3.1); t is drawn per block
causal    an ordinary language model

Shapes: b texts of l tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.distill.pretrain.task import step_seed
from hasten.distill.pretrain.text_config import ModelConfig, TextPretrainConfig, at_step
from hasten.distill.pretrain.text_data import Batch, code_batch, recall_batch, tasks_batch
from hasten.distill.pretrain.tiny_attention import MaskedBmmAttention


def seen(c: ModelConfig, length: int) -> Tensor:
    """bool (l, l): which tokens (columns) a token (row) sees in a model of this kind."""
    at = torch.arange(length)
    if c.attention == "full":
        return torch.ones(length, length, dtype=torch.bool)
    if c.attention == "block":
        assert c.block is not None
        at = at // c.block
    return at[:, None] >= at[None, :]


def seen_doubled(block: int, length: int) -> Tensor:
    """bool (2 l, 2 l) for [masked; clean]: masked blocks see themselves and earlier clean ones, clean ones as ever."""
    b = torch.arange(length) // block
    same, before = b[:, None] == b[None, :], b[:, None] > b[None, :]
    nothing = torch.zeros_like(same)
    return torch.cat([torch.cat([same, before], 1), torch.cat([nothing, same | before], 1)])


def masked(c: ModelConfig, answer: Tensor, generator: torch.Generator) -> Tensor:
    """bool (b, l): a random share of the askable tokens, evenly spread shares over the rows (and blocks)."""
    b, length = answer.shape
    width = c.block or length
    parts = -(-length // width)
    order = torch.randperm(b * parts, generator=generator)
    share = (order + torch.rand(b * parts, generator=generator)) / (b * parts)
    share = share.view(b, parts).repeat_interleave(width, 1)[:, :length]
    return answer & (torch.rand(b, length, generator=generator) < share)


def predict(model: Any, c: ModelConfig, ids: Tensor, asked: Tensor, clean: Tensor | None = None) -> Tensor:
    """Logits (asked.sum(), vocabulary) for the tokens at `asked` (b, l) of `ids` (b, l), which may be masks.

    clean (b, l): for `block` models in training, the text without masks. Position 0 of a model that predicts the
    next token cannot be asked for.
    """
    length = ids.shape[1]
    position = torch.arange(length, device=ids.device)[None]
    sight = seen(c, length)
    if clean is not None:
        assert c.block is not None
        ids, position = torch.cat([ids, clean], 1), position.repeat(1, 2)
        sight = seen_doubled(c.block, length)
    with MaskedBmmAttention(None if bool(sight.all()) else sight):
        hidden = model.model(
            input_ids=ids,
            attention_mask=sight[None, None].to(ids.device),
            position_ids=position,
            use_cache=False,
        ).last_hidden_state[:, :length]
    if c.shifted or c.attention == "causal":
        hidden, asked = hidden[:, :-1], asked[:, 1:]
    return F.linear(hidden[asked], model.lm_head.weight)


class TextObjective:
    """The loss of a text model at a step: the mean over its parts (list tasks, code, recall) of their mean losses."""

    def __init__(self, config: TextPretrainConfig, tokenizer: Any, code: Tensor | None, device: Any) -> None:
        self.config, self.tokenizer, self.code, self.device = config, tokenizer, code, device
        self.last: dict[str, float] = {}

    def __call__(self, model: Any, step: int) -> Tensor:
        """Mean of the parts' losses, in nats per token."""
        c, seed = self.config, step_seed(self.config.seed, "text", step)
        batches: dict[str, Batch] = {}
        if c.tasks is not None:
            batches["tasks"] = tasks_batch(self.tokenizer, at_step(c.tasks, c.later_from, step), seed)
        if c.code is not None:
            assert self.code is not None
            batches["code"] = code_batch(self.code, at_step(c.code, c.later_from, step), seed)
        if c.recall is not None:
            assert self.code is not None
            batches["recall"] = recall_batch(self.code, c.recall, seed, len(self.tokenizer))
        losses = {name: self.part(model, batch, seed) for name, batch in batches.items()}
        self.last = {name: round(float(loss.detach()), 4) for name, loss in losses.items()}
        return torch.stack(list(losses.values())).mean()

    def part(self, model: Any, batch: Batch, seed: int) -> Tensor:
        """Weighted mean cross-entropy of one batch under its own masks."""
        c, clean = self.config.model, batch.ids
        answer = batch.answer.clone()
        if c.attention == "causal" or c.shifted:
            answer[:, 0] = False
        ids, asked = clean, answer
        if c.attention != "causal":
            asked = masked(c, answer, torch.Generator().manual_seed(seed))
            ids = clean.masked_fill(asked, self.tokenizer.mask_token_id)
        target, weight = clean[asked].to(self.device), batch.weight[asked].to(self.device)
        context = clean.to(self.device) if c.attention == "block" else None
        logits = predict(model, c, ids.to(self.device), asked.to(self.device), context)
        loss = F.cross_entropy(logits.float(), target, reduction="none")
        return (loss * weight).sum() / weight.sum().clamp_min(1e-6)
