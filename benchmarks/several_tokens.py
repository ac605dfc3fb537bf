"""Medusa's heads, gated multi-token prediction, parallel prompt tokens: tokens per evaluation of verified greedy decoding on
held-out list tasks.

    python benchmarks/several_tokens.py OUT/student [--model tiny-lm] [--seed 5] [--count 16]

The model writes its own greedy answers; a draft token counts where it is the one that the model itself wrote and all
before it are. Tokens behind the first end of a text do not count. Without drafts it would be 1.00 tokens per evaluation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hasten.distill.methods import medusa, mtp, ppd
from hasten.distill.text_roles import TextCall, TextRole, Texts
from hasten.distill.text_teach import make_texts
from hasten.pipelines.bench import dllm
from hasten.pipelines.recipes import recipe
from hasten.pipelines.text_models.families import choose
from hasten.pipelines.text_models.loading import open_text


def medusa_drafts(folder: Path, network: Any, texts: Texts) -> Tensor:
    """Accepted drafts behind each place, int64 [B, L]; place t: the text up to there is written, the next one is the model's."""
    with safe_open(folder / medusa.FILE, framework="pt") as file:
        count = int(file.metadata()["heads"])
    call = TextCall.of(choose(network))
    heads = medusa.MedusaHeads(network.config.hidden_size, count)
    heads.load_state_dict(load_file(folder / medusa.FILE))
    found = torch.zeros_like(texts.ids)
    asked = (texts.place + 1 >= texts.start[:, None]) & (texts.place + 2 < texts.end[:, None])
    found[asked] = medusa.accepted(call, heads, texts)
    return found.roll(1, 1)


def mtp_drafts(folder: Path, network: Any, texts: Texts, masks: int) -> Tensor:
    """The same of masks behind each place."""
    base = PeftModel.from_pretrained(network, str(folder)).get_base_model().eval()
    role = TextRole("student", TextCall.of(choose(base)), None, ("default",), False)
    head = mtp.SamplerHead(network.config.hidden_size)
    head.load_state_dict(load_file(folder / mtp.FILE))
    found = torch.zeros_like(texts.ids)
    for shift in range(int((texts.end - texts.start).max()) - 1):
        cut = texts.start + shift
        mine = (cut < texts.end - 1).nonzero()[:, 0]
        some = Texts(texts.ids[mine], texts.start[mine], texts.end[mine])
        found[mine, cut[mine]] = mtp.accepted(role, head, some, cut[mine], masks, network.config.mask_token_id)
    return found


def ppd_drafts(folder: Path, network: Any, texts: Texts) -> Tensor:
    """The same of prompt tokens behind each place."""
    prompts = load_file(folder / ppd.FILE)["weight"]
    call, found = TextCall.of(choose(network)), torch.zeros_like(texts.ids)
    for shift in range(int((texts.end - texts.start).max()) - 1):
        at = (texts.start - 1 + shift).minimum(texts.end - 1)
        mine = (at < texts.end - 2).nonzero()[:, 0]
        if len(mine):
            some = Texts(texts.ids[mine], texts.start[mine], texts.end[mine])
            found[mine, at[mine] + 1] = ppd.accepted(call, prompts, some, at[mine, None])[:, 0]
    return found


def drafted(folder: Path, network: Any, texts: Texts, masks: int) -> Tensor:
    """By what is in the folder."""
    if (folder / medusa.FILE).exists():
        return medusa_drafts(folder, network, texts)
    return ppd_drafts(folder, network, texts) if (folder / ppd.FILE).exists() else mtp_drafts(folder, network, texts, masks)


def evaluations(drafts: Tensor, texts: Texts) -> tuple[int, int]:
    """Tokens of all texts, and the evaluations that writing them takes: each gives one token and its accepted drafts."""
    tokens = steps = 0
    for row, start, end in zip(drafts.tolist(), texts.start.tolist(), texts.end.tolist(), strict=True):
        place = start
        while place < end:
            place += 1 + row[place]
            steps += 1
        tokens += end - start
    return tokens, steps


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("student", type=Path)
    parser.add_argument("--model", default="tiny-lm")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--masks", type=int, default=4)
    told = parser.parse_args()
    torch.set_num_threads(1)
    network, tokenizer = open_text(told.model, None, None, None)
    host = choose(network, tokenizer)
    work = dllm.lists(tokenizer, told.count, seed=told.seed)
    made = make_texts(host, tokenizer, work.prompts, work.new, recipe("sequential"))
    whole = Texts(**made.conditions.tensors)
    texts = Texts(whole.ids, whole.start, whole.over(host.facts.eos_ids))
    drafts = drafted(told.student, network, texts, told.masks)
    every = evaluations(drafts, texts)
    print(json.dumps({"what": "all", "tokens": every[0], "evaluations": every[1], "per_evaluation": every[0] / every[1]}))
    for kind in dict.fromkeys(work.kinds):
        mine = torch.tensor([i for i, its in enumerate(work.kinds) if its == kind])
        part = evaluations(drafts[mine], Texts(texts.ids[mine], texts.start[mine], texts.end[mine]))
        print(json.dumps({"what": kind, "tokens": part[0], "evaluations": part[1], "per_evaluation": part[0] / part[1]}))


if __name__ == "__main__":
    main()
