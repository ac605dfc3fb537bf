"""What a commit filter (`samplers/filter.py`) is trained on, a model's own generations, and how it is calibrated.

The model generates sequentially; at every step, what an evaluation said of each open slot is kept, with whether its
token is the one that stands there in the end. A network of about 1000 weights learns to tell (`methods/learn2pd.py`). Its
threshold is then chosen on texts that it has not seen, so that the expected share of slots which it would have
written wrong is below a target (conformal risk control, Angelopoulos et al., arXiv 2208.02814).

Shapes: n rows of I inputs and O outputs (one slot, or all of a block: see `FilterNet`); B texts, L slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.atomic import atomic_write
from hasten.canvas import Canvas
from hasten.distill.data.store import Store
from hasten.distill.network.host_call import Condition
from hasten.errors import UsageError
from hasten.pipelines.text.loop import TextLoop
from hasten.pipelines.text_models.host import TextHost
from hasten.pipelines.text_models.stamp import stamp
from hasten.recipe import Recipe
from hasten.samplers.commit import CommitState, Quota, Unmask
from hasten.samplers.commit_told import Oracle
from hasten.samplers.filter import STAMP, FilterNet, Form, confidences, features, neighbours
from hasten.samplers.scores import Draw, Logits, Scores


@dataclass(slots=True)
class Traces:
    """What was seen. inputs float32 [n, I]; right bool [n, O]: the token is the final one; valid bool [n, O]: the
    slot was open; slot int64 [n, O]; text int64 [n]."""

    inputs: Tensor
    right: Tensor
    valid: Tensor
    slot: Tensor
    text: Tensor

    @classmethod
    def join(cls, parts: Sequence[Traces]) -> Self:
        """All rows of `parts`."""
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})

    def of(self, texts: Tensor) -> Traces:
        """The rows of these texts."""
        mine = torch.isin(self.text, texts)
        return Traces(**{field.name: getattr(self, field.name)[mine] for field in fields(self)})


Told = Callable[[str], None]
"""Called with what has been done, in words."""


def as_store(traces: Traces, seed: int) -> Store:
    """Rows for a training: those of two thirds of the texts, drawn by `seed`. The rest, for the threshold, is `held_back`."""
    texts = int(traces.text.max()) + 1
    order = torch.randperm(texts, generator=torch.Generator().manual_seed(seed))
    held = torch.isin(traces.text, order[: kept_for_threshold(texts)])
    tensors = {field.name: getattr(traces, field.name) for field in fields(traces)} | {"held": held}
    return Store((), Condition(tensors), Condition({}), (~held).nonzero()[:, 0])


def held_back(rows: Store) -> Traces:
    """What `as_store` keeps from the training."""
    found = rows.conditions.tensors
    return Traces(**{field.name: found[field.name][found["held"]] for field in fields(Traces)})


def kept_for_threshold(texts: int) -> int:
    """How many of so many texts the threshold is chosen on."""
    return texts // 3


def fewest(false_commits: float) -> int:
    """How many texts a share of false commits needs at least."""
    return 3 * max(math.ceil(1 / false_commits) - 1, 1)


def check(texts: int, new: Sequence[int], false_commits: float) -> None:
    """Raise `UsageError` for numbers that no filter can come of, before anything is computed."""
    if min(new, default=1) < 1:
        raise UsageError(f"new must be at least 1, got {min(new)}.")
    if not 0 < false_commits < 1:
        raise UsageError(f"false_commits must be between 0 and 1, got {false_commits}; 0.01 is one slot in a hundred.")
    if texts < fewest(false_commits):
        raise UsageError(
            f"A share of {false_commits} false commits needs at least {fewest(false_commits)} prompts, a third of them to"
            f" choose the threshold on; got {texts}. Give more prompts, or allow a larger share."
        )


# --- what is seen -----------------------------------------------------------------------------------


def collect(
    host: TextHost, prompts: Sequence[Tensor], new: Sequence[int], recipe: Recipe, *, form: Form = "slots",
    oracle: bool = False, batch: int = 32, told: Told = lambda _: None,
) -> Traces:  # fmt: skip
    """Generate new[b] slots behind every prompt (int64 [P_b] each) and keep what was known of open slots at each step."""
    parts = []
    for first in range(0, len(prompts), batch):
        some = slice(first, first + batch)
        seen = _generate(host, prompts[some], new[some], recipe, Unmask(rule=Quota()), form)
        if oracle:
            final = seen.final()
            seen = _generate(host, prompts[some], new[some], recipe, Unmask(rule=Oracle(final=final)), form)
        parts.append(seen.traces(first))
        told(f"generated {min(first + batch, len(prompts))} of {len(prompts)} texts")
    return Traces.join(parts)


def _generate(
    host: TextHost, prompts: Sequence[Tensor], new: Sequence[int], recipe: Recipe, commit: Unmask, form: Form
) -> _Recorder:  # fmt: skip
    canvas = Canvas.of(prompts, new, host.facts, host.device)
    plain = Recipe(kv=recipe.kv, blocks=recipe.blocks, commit=commit)
    loop = TextLoop(host, plain, canvas, Draw(torch.zeros(len(prompts), dtype=torch.int64, device=host.device)))
    loop.sees_written |= form == "block"
    loop.rule = recorder = _Recorder(loop.rule, form)
    recorder.canvas = loop.run()
    return recorder


class _Recorder(CommitState):
    """Keeps what another rule sees at each step."""

    canvas: Canvas

    def __init__(self, rule: CommitState, form: Form) -> None:
        self.rule, self.form = rule, form
        self.steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def observe(self, known: Logits, canvas: Canvas) -> None:
        self.rule.observe(known, canvas)

    def select(self, scores: Scores, canvas: Canvas) -> Tensor:
        among = scores.among(canvas)
        if self.form == "slots":
            text, place = among.nonzero(as_tuple=True)
            seen = neighbours(features(scores, canvas))[among]
            self.steps.append((seen, text, place[:, None], scores.token[among][:, None]))
        else:
            width = FilterNet("block").width
            text = canvas.open.nonzero()[:, 0]
            slot = canvas.span[:, :1] + torch.arange(width, device=text.device)
            slot = torch.where(F.pad(among, (0, width)).gather(1, slot), slot, -1)
            token = scores.token.gather(1, slot.clamp(min=0))
            self.steps.append((confidences(scores, canvas, width)[text], text, slot[text], token[text]))
        return self.rule.select(scores, canvas)

    def final(self) -> tuple[tuple[int, ...], ...]:
        """What was generated for each text."""
        canvas = self.canvas
        bounds = zip(canvas.ids.tolist(), canvas.start.tolist(), canvas.end.tolist(), strict=True)
        return tuple(tuple(ids[start:end]) for ids, start, end in bounds)

    def traces(self, first: int) -> Traces:
        """What was seen, now that it is known how it ended. first: number of the first text."""
        inputs, text, slot, token = (torch.cat(column) for column in zip(*self.steps, strict=True))
        right = self.canvas.ids[text[:, None], slot.clamp(min=0)] == token
        valid = (slot >= 0) & (slot < self.canvas.end[text][:, None])  # behind the end nothing is final
        return Traces(*(x.cpu() for x in (inputs, right, valid, slot, text + first)))


# --- what is chosen on the texts that are held back ------------------------------------------------------


def finished(net: FilterNet, rows: Store, false_commits: float) -> dict[str, Any]:
    """The card of a trained filter: its threshold, and how it does on the texts that were held back."""
    kept, texts = held_back(rows), rows.conditions.tensors["text"]
    above = threshold(net, kept, false_commits)
    return {
        "filter": net.form, "above": above, "false_commits": false_commits, "texts": int(texts.max()) + 1,
        "kept": len(torch.unique(kept.text)), "states": len(texts), **score(net, kept, above), "false": risk(net, kept, above),
    }  # fmt: skip


def save_filter(net: FilterNet, card: dict[str, Any], model: nn.Module, out: str | Path) -> None:
    """Write a filter that knows its model, with its card in the header."""
    words = {key: str(value) for key, value in card.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    atomic_write(out, save({**tensors, STAMP: stamp(model)}, words))


def threshold(net: FilterNet, traces: Traces, false_commits: float) -> float:
    """The least probability at which the expected share of a text's slots that are written wrong is <= false_commits.

    A slot counts as written wrong if at any step a wrong token of it would pass. That share falls with the threshold,
    so for a new text drawn like these n the expectation holds with (sum of shares + 1) / (n + 1). (It is about states
    of sequential decoding; a filter at work leads to others.)
    """
    worst, share = _worst(net, traces)
    order = worst.flatten().sort(descending=True)
    expected = (share.flatten()[order.indices].double().cumsum(0) + 1) / (len(worst) + 1)
    allowed = int((expected <= false_commits).sum())
    if allowed == len(expected):
        return 0.0
    return float(order.values[allowed].nextafter(torch.tensor(2.0)))  # that slot, the first too many, must not pass


def risk(net: FilterNet, traces: Traces, above: float) -> float:
    """The mean share of a text's slots of which a wrong token passes at some step, 0 to 1: what `threshold` bounds."""
    worst, share = _worst(net, traces)
    return float(torch.where((worst >= above) & (worst > 0), share, 0.0).sum(1).mean())


def _worst(net: FilterNet, traces: Traces) -> tuple[Tensor, Tensor]:
    """Of each text and slot: the highest probability of a wrong token of it, 0 for none; its share of the text's slots."""
    chance = torch.where(traces.valid & ~traces.right, net(traces.inputs).sigmoid(), 0.0)
    texts, row = torch.unique(traces.text, return_inverse=True)
    worst = torch.zeros(len(texts), int(traces.slot.max()) + 1)
    there = torch.zeros_like(worst)
    at = (row[:, None].expand_as(traces.slot) * worst.shape[1] + traces.slot.clamp(min=0)).flatten()
    worst.view(-1).scatter_reduce_(0, at, chance.flatten(), "amax")
    there.view(-1).scatter_reduce_(0, at, traces.valid.float().flatten(), "amax")
    return worst, there / there.sum(1, keepdim=True).clamp(min=1)


def score(net: FilterNet, traces: Traces, above: float) -> dict[str, float]:
    """How the filter does: recall: of right tokens, those that pass; wrong: of what passes, what is wrong."""
    passes = (net(traces.inputs).sigmoid() >= above) & traces.valid
    right = traces.right & traces.valid
    return {
        "recall": float((passes & right).sum() / right.sum().clamp(min=1)),
        "wrong": float((passes & ~right).sum() / passes.sum().clamp(min=1)),
    }
