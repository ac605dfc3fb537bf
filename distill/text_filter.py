"""Train a commit filter (`samplers/filter.py`) on a model's own generations, and calibrate it.

The model generates sequentially; at every step, what an evaluation said of each open slot is kept, with whether its
token is the one that stands there in the end. A network of about 900 weights learns to tell. Its threshold is then
chosen on texts that it has not seen, so that the expected share of slots which it would have written wrong is below a
target (conformal risk control, Angelopoulos et al., arXiv 2208.02814).

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
from torch import Tensor
from torch.nn import functional as F

from hasten.atomic import atomic_write
from hasten.canvas import Canvas
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


def fit(
    host: TextHost, prompts: Sequence[Tensor], new: int | Sequence[int], recipe: Recipe, out: str | Path, *,
    form: Form = "slots", false_commits: float = 0.01, oracle: bool = False, seed: int = 0, model: str = "",
    told: Told = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Train a filter for `recipe` on generations of `new` slots behind `prompts`, write it to `out`, return its card.

    new: for all, or for each. The recipe's commit rule is replaced by one slot at a time. false_commits: the expected
    share of a text's slots that may be written wrong. A third of the prompts is kept for the threshold. oracle: learn
    from states in which all that is final is written at once (as Learn2PD does), in place of sequential ones. model: its
    name, for the card; what binds the filter to it is a stamp of its weights.

    Raises `UsageError` where there are too few prompts for that share.
    """
    each = [new] * len(prompts) if isinstance(new, int) else list(new)
    check(len(prompts), each, false_commits)
    traces = collect(host, prompts, each, recipe, form=form, oracle=oracle, told=told)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    held = order[: kept_for_threshold(len(prompts))]
    learned, kept = traces.of(order[len(held) :]), traces.of(held)
    told(f"learning from {len(learned.inputs):,} states")
    net = train(learned, form, seed=seed)
    above = threshold(net, kept, false_commits)
    card = {
        "filter": form, "model": model, "above": above, "false_commits": false_commits, "texts": len(prompts),
        "kept": len(held), "states": len(traces.inputs), "oracle": oracle, "seed": seed, **score(net, kept, above),
        "false": risk(net, kept, above),
    }  # fmt: skip
    words = {key: str(value) for key, value in card.items()}
    atomic_write(out, save({**net.state_dict(), STAMP: stamp(host.model)}, words))
    return card


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


# --- what is learned --------------------------------------------------------------------------------


def train(
    traces: Traces, form: Form, *, hidden: int = 32, steps: int = 600, batch: int = 4096, lr: float = 1e-2, seed: int = 0
) -> FilterNet:  # fmt: skip
    """A filter that tells right tokens from wrong ones: binary cross-entropy on random rows, AdamW, cosine."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = FilterNet(form, hidden, traces.inputs.shape[1])
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    target, weight = traces.right.float(), traces.valid.float()
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(target), (batch,), generator=g) if len(target) > batch else slice(None)
        loss = F.binary_cross_entropy_with_logits(net(traces.inputs[rows]), target[rows], weight[rows], reduction="sum")
        optimizer.zero_grad()
        torch.autograd.backward(loss / weight[rows].sum().clamp(min=1))
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


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
