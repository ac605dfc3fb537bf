"""Causal models with fewer layers: what exits and skip routers lose, and what exits save as drafts, on held-out list tasks.

    python benchmarks/fewer_layers.py OUT/student [--model tiny-lm] [--seed 5] [--count 16] [--drafts 4]

Perplexity is that of the plain model's greedy texts up to their ends, exact match that of texts written with fewer layers: of
every exit, of those that the routers choose, and of as many that are the same for all texts (the first ones, or drawn). As a
drafter, an exit says `drafts` tokens and the whole student verifies them, so that the text is the whole student's; layers per token
are those that run one after the other, and without drafts all of them do for each token.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from hasten.distill.methods import first, sorted_exits
from hasten.distill.text.depth import only
from hasten.distill.text.roles import TextCall, TextRole, Texts
from hasten.distill.text.teach import make_texts
from hasten.pipelines.bench import dllm
from hasten.pipelines.recipes import recipe
from hasten.pipelines.text_models.families import choose
from hasten.pipelines.text_models.loading import open_text

Chosen = Callable[[int], Sequence[bool]]
"""Number of a text -> which layers it is written with."""


class Work:
    """A model or student under measurement, and held-out list tasks with the plain model's own texts."""

    def __init__(self, model: str, student: Path, seed: int, count: int) -> None:
        network, self.tokenizer = open_text(model, None, None, None)
        host = choose(network, self.tokenizer)
        self.work = dllm.lists(self.tokenizer, count, seed=seed)
        self.texts = self.written(TextCall.of(host))
        merged = PeftModel.from_pretrained(network, str(student)).merge_and_unload().eval()
        self.call = TextCall.of(choose(merged))

    def written(self, call: TextCall) -> Texts:
        """The greedy texts of a model, up to their ends."""
        made = make_texts(call.host, self.tokenizer, self.work.prompts, self.work.new, recipe("sequential"))
        whole = Texts(**made.conditions.tensors)
        return Texts(whole.ids, whole.start, whole.over(call.facts.eos_ids))

    def row(self, number: int, texts: Texts) -> Tensor:
        """One text, int64 [1, N]."""
        return texts.ids[number : number + 1, : int(texts.end[number])]

    def perplexity(self, chosen: Chosen) -> float:
        """Of the plain model's texts, each with the layers that are chosen for it."""
        losses = []
        for number in range(len(self.work.prompts)):
            ids, start = self.row(number, self.texts), int(self.texts.start[number])
            with only(self.call, chosen(number)):
                said = self.call.allowed(self.call.host.own(ids)[0, start - 1 : -1])
            losses.append(F.cross_entropy(said, ids[0, start:], reduction="none"))
        return float(torch.cat(losses).mean().exp())

    def exact(self, chosen: Chosen) -> float:
        """Share of right answers, written greedily with the layers that are chosen for each, with transformers' own cache."""
        assert self.work.right is not None
        right, network = [], self.call.network
        for number, (prompt, check) in enumerate(zip(self.work.prompts, self.work.right, strict=True)):
            with only(self.call, chosen(number)):
                done = network.generate(prompt[None], max_new_tokens=dllm.SLOTS, do_sample=False)[0, len(prompt) :]  # type: ignore[operator]
            ends = torch.isin(done, torch.tensor(self.call.facts.eos_ids))
            stop = int(ends.float().argmax()) if bool(ends.any()) else len(done)
            right.append(check(str(self.tokenizer.decode(done[:stop]))))
        return statistics.mean(right)

    def told(self, what: str, chosen: Chosen) -> None:
        """A line of both, with the mean number of layers."""
        layers = statistics.mean(sum(chosen(number)) for number in range(len(self.work.prompts)))
        row = {"what": what, "layers": round(layers, 3), "perplexity": round(self.perplexity(chosen), 4)}
        print(json.dumps({**row, "exact_match": round(self.exact(chosen), 4)}), flush=True)


def drafting(work: Work, exit: int, texts: Texts, drafts: int) -> dict[str, Any]:
    """Tokens per evaluation of the whole student, and layers per token, where this exit drafts."""
    role = TextRole("student", work.call, None, (), False)
    asked = sorted_exits.before((texts.place >= texts.start[:, None]) & (texts.place < texts.end[:, None]))
    states = sorted_exits.exit_states(role, texts, asked, (exit,))[:, 0]
    right = torch.zeros_like(asked)
    right[asked.roll(1, 1)] = work.call.read(states).argmax(1) == texts.ids[asked.roll(1, 1)]
    tokens = steps = run = 0
    for row, start, end in zip(right.tolist(), texts.start.tolist(), texts.end.tolist(), strict=True):
        place = start
        while place < end:
            hit = 0
            while hit < drafts and place + hit < end - 1 and row[place + hit]:
                hit += 1
            place, steps = place + hit + 1, steps + 1
            run += drafts * exit + work.call.facts.layers
        tokens += end - start
    return {"tokens_per_evaluation": round(tokens / steps, 3), "layers_per_token": round(run / tokens, 3)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("student", type=Path)
    parser.add_argument("--model", default="tiny-lm")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 4])
    told = parser.parse_args()
    torch.set_num_threads(1)
    work = Work(told.model, told.student, told.seed, told.count)
    whole = [True] * work.call.facts.layers
    if (told.student / first.FILE).exists():
        routed(work, told.student, whole)
    if (told.student / sorted_exits.FILE).exists():
        texts = work.written(work.call)
        exits = json.loads((told.student / sorted_exits.FILE).read_text())["exits"]
        for exit in exits:
            work.told(f"exit {exit}", lambda number, exit=exit: [layer < exit for layer in range(len(whole))])
        for exit in exits[:-1]:
            for drafts in told.drafts:
                print(json.dumps({"what": f"exit {exit} drafts {drafts}", **drafting(work, exit, texts, drafts)}), flush=True)


def routed(work: Work, student: Path, whole: list[bool]) -> None:
    """The layers that the routers choose; as many that are the same for all texts."""
    weights = load_file(student / first.FILE)
    routers = first.Routers(weights["weight"].shape[1], len(whole))
    routers.load_state_dict(weights)
    which = [first.route(work.call, routers, prompt[None])[0].tolist() for prompt in work.work.prompts]
    work.told("all layers", lambda number: whole)
    work.told("routed", lambda number: which[number])
    for kind in dict.fromkeys(work.work.kinds):
        mine = [which[i] for i, its in enumerate(work.work.kinds) if its == kind]
        print(json.dumps({"what": kind, "layers": [round(sum(col) / len(mine), 2) for col in zip(*mine, strict=True)]}), flush=True)
    kept = round(statistics.mean(sum(each) for each in which))
    work.told("the first ones", lambda number: [layer < kept for layer in range(len(whole))])
    drawn = random.Random(0).sample(range(1, len(whole)), kept - 1)
    work.told("drawn", lambda number: [layer == 0 or layer in drawn for layer in range(len(whole))])


if __name__ == "__main__":
    main()
