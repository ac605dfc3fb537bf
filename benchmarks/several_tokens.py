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

import torch

from hasten.distill.bench.drafts import drafted
from hasten.distill.bench.texts import evaluations
from hasten.distill.text.roles import Texts
from hasten.distill.text.teach import make_texts
from hasten.pipelines.bench import dllm
from hasten.pipelines.recipes import recipe
from hasten.pipelines.text_models.families import choose
from hasten.pipelines.text_models.loading import open_text


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
