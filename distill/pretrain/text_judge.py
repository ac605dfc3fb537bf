"""How good a text model is by itself: exact match on unseen list tasks, and its loss beside the closed forms.

    python -m hasten.distill.pretrain.text_judge FOLDER [--count 32] [--code code.safetensors] [--json FILE]

Decoding is the plainest there is: one token a forward, the most certain place first (a causal model: left to right).
Shapes: b texts of l tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from hasten.distill.pretrain.text_config import ModelConfig
from hasten.distill.pretrain.text_objective import seen, seen_doubled
from hasten.pipelines.list_tasks import TASKS, Question, ask

SLOTS = 16
"""Tokens generated for an answer: at most nine letters, then ends of text."""
_SEED = 1_000_003


def kind_of(model: Any) -> ModelConfig:
    """What `config.hasten_diffusion` says about the model's attention, as the training's section `model`."""
    said = model.config.hasten_diffusion
    return ModelConfig(attention=said["kind"], block=said.get("block"), shifted=said["shifted"])


def logits(model: Any, ids: Tensor, clean: Tensor | None = None) -> Tensor:
    """Logits (b, l, v) float32 aligned to the token they predict, for texts ids (b, l) with masks in them.

    clean (b, l): for block models, what the blocks after a masked one see of it, as in training.
    """
    c, length = kind_of(model), ids.shape[1]
    sight, position = seen(c, length), torch.arange(length)[None]
    if clean is not None:
        assert c.block is not None
        ids, position, sight = torch.cat([ids, clean], 1), position.repeat(1, 2), seen_doubled(c.block, length)
    out: Tensor = model(input_ids=ids, attention_mask=sight[None, None], position_ids=position).logits
    out = out[:, :length].float()
    if c.shifted or c.attention == "causal":
        out = torch.cat([out[:, :1], out[:, :-1]], 1)
    out[..., [model.config.mask_token_id, model.config.pad_token_id]] = -math.inf
    return out


@torch.no_grad()
def decode(model: Any, prompt: Tensor, slots: int = SLOTS) -> Tensor:
    """Write `slots` tokens after prompts (b, l) of one length; (b, l + slots). Masks are filled one a forward."""
    c, mask = kind_of(model), model.config.mask_token_id
    ids = torch.cat([prompt, torch.full((len(prompt), slots), mask)], 1)
    block = torch.arange(ids.shape[1]) // (c.block or ids.shape[1])
    for step in range(slots):
        best, token = logits(model, ids).softmax(-1).max(-1)
        open_ = ids == mask
        if c.attention == "causal":
            place = torch.full((len(ids), 1), prompt.shape[1] + step)
        else:
            first = torch.where(open_, block, block[-1]).amin(1, keepdim=True)
            place = best.masked_fill(~(open_ & (block <= first)), -1.0).argmax(1, keepdim=True)
        ids.scatter_(1, place, token.gather(1, place))
    return ids


def tasks_rows(model: Any, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """One row per task over `count` questions that training never saw: exact match, loss, closed form."""
    rows = []
    for task in TASKS:
        rng = random.Random(_SEED)
        asked = [ask(task, rng, held_out=True) for _ in range(count)]
        prompt = torch.tensor(tokenizer([q.prompt for q in asked]).input_ids)
        started = time.perf_counter()
        written = decode(model, prompt)[:, prompt.shape[1] :]
        seconds = time.perf_counter() - started
        right = [q.right(read(tokenizer, row)) for q, row in zip(asked, written, strict=True)]
        rows.append(
            {
                "task": task,
                "n": count,
                "exact_match": round(sum(right) / count, 4),
                "nll": round(nll(model, _texts(tokenizer, asked, prompt), prompt.shape[1]), 4),
                "closed_form": round(statistics.mean(q.entropy for q in asked), 4),
                "seconds": round(seconds, 2),
            }
        )
    return rows


def read(tokenizer: Any, ids: Tensor) -> str:
    """The text before the first end of text."""
    row = ids.tolist()
    stop = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
    return str(tokenizer.decode(row[:stop]))


def _texts(tokenizer: Any, asked: list[Question], prompt: Tensor) -> Tensor:
    eos = tokenizer.eos_token_id
    answers = [(a + [eos] * SLOTS)[:SLOTS] for a in tokenizer([q.answer for q in asked]).input_ids]
    return torch.cat([prompt, torch.tensor(answers)], 1)


@torch.no_grad()
def nll(model: Any, ids: Tensor, begin: int, seed: int = 0) -> float:
    """Mean negative log-likelihood in nats of the tokens from `begin` on of texts ids (b, l), given those before.

    Causal: exact. Diffusion: the bound that averages over orders of writing (arXiv:2406.07524): k of the m places
    are masked, k even over 1..m, and the masked ones' cross-entropy counts m / k times. Block models: the same
    within each block after clean ones, as they are trained (arXiv:2503.09573).
    """
    c, (b, length) = kind_of(model), ids.shape
    g = torch.Generator().manual_seed(seed)
    asked = (torch.arange(length) >= begin).expand(b, -1)
    weight = torch.ones(b, length)
    masks, clean = ids, None
    if c.attention != "causal":
        group = torch.arange(length) // (c.block or length)
        asked, weight = _orders(asked, group, g)
        masks, clean = ids.masked_fill(asked, model.config.mask_token_id), ids if c.block else None
    out = logits(model, masks, clean)
    each = F.cross_entropy(out.flatten(0, 1), ids.flatten(), reduction="none").view(b, length)
    return float((torch.where(asked, each, 0.0) * weight).sum() / b)


def _orders(asked: Tensor, group: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """k of the m askable places (b, l) of each group (l,), k evenly from 1..m over the rows; and the weights m / k."""
    chosen, weight = torch.zeros_like(asked), torch.ones(asked.shape)
    b = len(asked)
    for part in range(int(group.max()) + 1):
        here = asked & (group == part)
        m = here.sum(1, keepdim=True)
        even = (torch.randperm(b, generator=g)[:, None] + torch.rand(b, 1, generator=g)) / b
        k = (even * m).floor() + 1
        score = torch.rand(asked.shape, generator=g).masked_fill(~here, 2.0)
        chosen |= (score.argsort(1).argsort(1) < k) & here
        weight = torch.where(here, m / k, weight)
    return chosen, weight


def code_row(model: Any, code: Tensor, windows: int = 64, length: int = 128) -> dict[str, Any]:
    """Nats per token on windows of unseen sources (bound or exact, as `nll`)."""
    start = torch.linspace(0, len(code) - length, windows).long()[:, None]
    ids = code[start + torch.arange(length)].long()
    begin = 1  # the first token cannot be asked of a model that predicts the next one; the same for all
    mean = statistics.mean(nll(model, part, begin, i) for i, part in enumerate(torch.split(ids, 16)))
    return {"task": "code", "n": windows, "nats_per_token": round(mean / (length - begin), 4)}


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=32, help="questions per task")
    parser.add_argument("--code", type=Path, help="code.safetensors of the training, for the loss on unseen sources")
    parser.add_argument("--dtype", default="float32", help="what the model computes in")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=getattr(torch, options.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    rows = tasks_rows(model, tokenizer, options.count)
    if options.code:
        rows.append(code_row(model, load_file(options.code)["validation"]))
    for row in rows:
        print(json.dumps(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
