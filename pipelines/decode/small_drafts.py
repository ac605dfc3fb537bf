"""How a small model's drafts grow: the most probable paths as points, or draws that keep their laws."""

from __future__ import annotations

import functools
import hashlib
import heapq
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.errors import ModelError, RefusedError
from hasten.pipelines.decode import compat, places
from hasten.pipelines.decode.small_model import Branch, Reader, read_drafts
from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Context, DrafterState, Facts, Outcome
from hasten.samplers.decode.tree import Tree
from hasten.samplers.drafters.host_tree import HostTree, joined

if TYPE_CHECKING:
    from hasten.pipelines.decode.drafters_small import SmallModel

SOURCES = ("small-model",)


def opened(name: str, facts: Facts) -> Any:
    """The causal language model `name`, where the large one is and in its precision; nothing is fetched."""
    from transformers import AutoModelForCausalLM

    from hasten.pipelines import tiny_models
    from hasten.pipelines.quiet import no_bars

    if name not in tiny_models.names() and not Path(name).expanduser().is_dir():
        raise ModelError(
            f"There is no small model {name!r}: it is no bundled model ({', '.join(tiny_models.names())}) and no folder here. Pass"
            " a loaded one with SmallModel.of(model)."
        )
    place = tiny_models.path(name) if name in tiny_models.names() else Path(name).expanduser()
    with no_bars():
        model = AutoModelForCausalLM.from_pretrained(
            place, use_safetensors=True, local_files_only=True, dtype=facts.host.dtype
        )
    return model.to(facts.device).eval()


def check(small: Any, facts: Facts) -> None:
    """Raise `RefusedError` unless the small model can draft for the large one."""
    width = small.config.get_text_config(decoder=True).vocab_size
    if width != facts.vocabulary or _tokens(small) != _tokens(facts.host) and None not in (_tokens(small), _tokens(facts.host)):
        raise RefusedError(
            f"The small model has another tokenizer ({width:,} tokens, and the model {facts.vocabulary:,}), so its drafts are not this"
            " model's tokens. Call generate(assistant_model=..., tokenizer=..., assistant_tokenizer=...) without a recipe:"
            " transformers translates between them."
        )
    kinds = set(compat.layer_kinds(small.config.get_text_config(decoder=True)))
    reason = compat.why_not(small) or places.why_model(small) or ("it has sliding windows" if kinds != {"full_attention"} else "")
    if reason:
        raise RefusedError(f"The small model {type(small).__name__} cannot draft: {reason}. Take another one.")
    if small.device != facts.device:
        raise RefusedError(f"The small model is on {small.device}, the model on {facts.device}. Move it there with .to().")


def _tokens(model: Any) -> str | None:
    """A digest of what a model's tokenizer knows, from the folder it was loaded from; None where that is not known."""
    file = Path(str(model.config.name_or_path)) / "tokenizer.json"
    if not str(model.config.name_or_path) or not file.is_file():
        return None
    return _digest(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _digest(file: Path, stamp: int) -> str | None:
    """Of the tokens in a tokenizer's file, which is read once, and again when it has changed; None where it lists none."""
    tokens = json.loads(file.read_text(encoding="utf-8")).get("model", {}).get("vocab")
    return None if tokens is None else hashlib.sha256(json.dumps(tokens, sort_keys=True).encode()).hexdigest()


class SmallState(DrafterState):
    """known: tokens of each row's text that the small model has read. branches: what it has read of the last drafts."""

    def __init__(self, drafter: SmallModel, small: Any, facts: Facts) -> None:
        self.drafter, self.facts = drafter, facts
        self.reader = Reader(small, facts.rows, facts.device)
        self.known = [0] * facts.rows
        self.branches: list[Branch] = []
        self.size = 0

    def propose(self, context: Context, nodes: int) -> Proposal:
        self._settle(context)
        logits = self._catch_up(context)
        deep = [min(self.drafter.depth, nodes, room - 1) if active else 0 for room, active in zip(context.room, context.active, strict=True)]
        grow = Drawn if self.facts.sampled else Best
        return grow(self, context, nodes, deep).run(logits)

    def observe(self, outcome: Outcome, context: Context) -> None:
        self._settle(context)

    def _settle(self, context: Context) -> None:
        """Keep what was written of the last drafts. The last token of a text is always read anew, for its logits."""
        if not self.branches:
            return
        slots = []
        for row, (text, branch) in enumerate(zip(context.texts, self.branches, strict=True)):
            slots.append(branch.accepted(text[self.known[row] : -1]))
            self.known[row] += len(slots[-1])
        self.reader.keep(slots, self.size)
        self.branches = []

    def _catch_up(self, context: Context) -> Tensor:
        """Read what is new of the texts; logits [B, V] of the small model behind them."""
        new = [
            text[known:] if active else []
            for text, known, active in zip(context.texts, self.known, context.active, strict=True)
        ]
        logits = self.reader.text(new, self.known)
        self.known = [known + len(each) for known, each in zip(self.known, new, strict=True)]
        self.branches, self.size = [Branch() for _ in new], self.reader.slots
        return logits

    def read(self, context: Context, asked: list[list[tuple[int, int, int]]]) -> Tensor:
        """Logits [B, K, V] behind drafts, (node, parent, token) of every row."""
        return read_drafts(self.reader, self.branches, self.known, asked)


class Growth:
    """One proposal while it grows. deep: depth that each row may reach."""

    def __init__(self, state: SmallState, context: Context, nodes: int, deep: list[int]) -> None:
        self.state, self.context, self.nodes, self.deep = state, context, nodes, deep
        self.width, self.above = state.drafter.width, state.drafter.above
        self.rows = range(len(deep))
        self.order = 0
        self.reads = max(deep, default=0) - 1

    def push(self, heap: list[tuple[Any, ...]], score: float, *rest: Any) -> None:
        """Put a candidate into a row's heap, the best first, of equals the first."""
        if score >= self.above:
            self.order += 1
            heapq.heappush(heap, (-score, self.order, *rest))


class Best(Growth):
    """The most probable paths, as points: the best candidates are read until there have been enough forwards, then the best of
    all stay (as EAGLE-2 ranks its tree, arXiv 2406.16858)."""

    def run(self, logits: Tensor) -> Proposal:
        """logits [B, V]: behind the texts."""
        self.heaps: list[list[tuple[Any, ...]]] = [[] for _ in self.rows]
        self.made: list[list[tuple[float, int, int]]] = [[(1.0, -1, 0)] for _ in self.rows]  # score, parent, token
        self.depths = [[0] for _ in self.rows]
        self._open([[0] for _ in self.rows], logits[:, None])
        for _ in range(self.reads):
            asked = [self._take(row, self.width) for row in self.rows]
            asked = [[each for each in wanted if self.depths[row][each[0]] < self.deep[row]] for row, wanted in enumerate(asked)]
            if not any(asked):
                break
            self._open([[node for node, _, _ in wanted] for wanted in asked], self.state.read(self.context, asked))
        for row in self.rows:
            self._take(row, self.nodes)
        return joined([self._tree(row) for row in self.rows], self.context.last, SOURCES)

    def _take(self, row: int, most: int) -> list[tuple[int, int, int]]:
        """Make nodes of the best candidates of a row."""
        found = list[tuple[int, int, int]]()
        while len(found) < most and self.heaps[row]:
            score, _, parent, token = heapq.heappop(self.heaps[row])
            found.append((len(self.made[row]), parent, token))
            self.made[row].append((-score, parent, token))
            self.depths[row].append(self.depths[row][parent] + 1)
        return found

    def _open(self, nodes: list[list[int]], logits: Tensor) -> None:
        """Candidates behind `nodes` of each row. logits [B, K, V]."""
        column = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
        chance, tokens = torch.softmax(self._warped(nodes, logits, column), -1).topk(min(self.width, logits.shape[-1]), -1)
        chances, best = chance.tolist(), tokens.tolist()
        for row, each in enumerate(nodes):
            for place, node in enumerate(each):
                if self.depths[row][node] < self.deep[row]:
                    for token, share in zip(best[row][place], chances[row][place], strict=True):
                        self.push(self.heaps[row], self.made[row][node][0] * share, node, token)

    def _warped(self, nodes: list[list[int]], logits: Tensor, column: Tensor) -> Tensor:
        """Through the call's processors, each node with its own prefix."""
        size = max(map(len, self.made))
        tokens = [[token for _, _, token in made] + [0] * (size - len(made)) for made in self.made]
        parents = [[parent for _, parent, _ in made] + [0] * (size - len(made)) for made in self.made]
        asked = [each + [0] * (logits.shape[1] - len(each)) for each in nodes]
        told = [torch.tensor(each, device=logits.device) for each in (asked, tokens, parents)]
        return self.state.facts.warp(logits, *told)

    def _tree(self, row: int) -> HostTree:
        """The made nodes that most probably stand."""
        tree = HostTree(self.nodes, self.deep[row])
        names = {0: 0}
        for node, (score, parent, token) in sorted(enumerate(self.made[row]), key=lambda each: -each[1][0])[1:]:
            above = self.made[row][parent][0]
            made = tree.child(names[parent], token, score / above) if parent in names else None
            if made is not None:
                names[node] = made
        return tree


class Drawn(Growth):
    """Draws in the order in which they most probably stand. What is drawn next may depend on what was drawn before, so each
    node keeps the law it was drawn from."""

    def run(self, logits: Tensor) -> Proposal:
        """logits [B, V]: behind the texts."""
        facts = self.state.facts
        self.tree = Tree(self.context.last, law="iid" if self.width == 1 else "without_replacement", warp=facts.warp, sources=SOURCES)
        self.heaps: list[list[tuple[Any, ...]]] = [[] for _ in self.rows]
        self.known = [{0} for _ in self.rows]
        self.nodes_of = [{0: (1.0, 0, -1, 0, 0)} for _ in self.rows]  # score, depth, parent, token, children
        self.tree.know(torch.zeros_like(self.context.last)[:, None], logits[:, None])
        for row in self.rows:
            if self.deep[row] > 0:
                self.push(self.heaps[row], 1.0, 0)
        for _ in range(self.nodes):
            self._read()
            if not self._draw():
                break
        return self.tree.proposal()

    def _read(self) -> None:
        """Let the small model read the best nodes of every row, where the best of all are not known yet."""
        unknown = [[each for each in heap if each[2] not in self.known[row]] for row, heap in enumerate(self.heaps)]
        if self.reads <= 0 or not any(heap and heap[0][2] not in self.known[row] for row, heap in enumerate(self.heaps)):
            return
        self.reads -= 1
        asked = []
        for row in self.rows:
            nodes = [each[2] for each in sorted(unknown[row])[: self.width]]
            asked.append([(node, *self.nodes_of[row][node][2:4]) for node in nodes])
            self.known[row] |= set(nodes)
        logits = self.state.read(self.context, asked)
        index = [[node for node, _, _ in wanted] + [0] * (logits.shape[1] - len(wanted)) for wanted in asked]
        self.tree.know(torch.tensor(index, device=logits.device), logits)

    def _draw(self) -> bool:
        """One child of the best known node of each row; False where there is none in any."""
        best = [self._best(row) for row in self.rows]
        if not any(best):
            return False
        device = self.context.last.device
        parent = torch.tensor([[each[1] if each else 0] for each in best], device=device)
        where = torch.tensor([[each is not None] for each in best], device=device)
        node = self.tree.extend(where) if self.width == 1 else self.tree.draw(parent, 1, where)
        number = self.tree.size - 1
        told = torch.cat([self.tree.score.gather(1, node), self.tree.valid.gather(1, node), self.tree.tokens.gather(1, node)], 1)
        for row, (score, valid, token) in enumerate(told.double().tolist()):
            if (above := best[row]) is not None and valid:
                self._grown(row, number, above[1], above[0] - score, score, int(token))
        return True

    def _best(self, row: int) -> tuple[float, int] | None:
        """Take the best candidate out of a row's heap whose law is known: its chance, and the node whose child it will be."""
        held: list[tuple[Any, ...]] = []
        found = None
        while self.heaps[row] and found is None:
            each = heapq.heappop(self.heaps[row])
            if each[2] in self.known[row]:
                found = each
            else:
                held.append(each)
        for each in held:
            heapq.heappush(self.heaps[row], each)
        return None if found is None else (-found[0], int(found[2]))

    def _grown(self, row: int, node: int, parent: int, left: float, score: float, token: int) -> None:
        """A node was drawn: its own children may be next, and its parent's other ones, which have what is `left`."""
        above, depth, grand, own, children = self.nodes_of[row][parent]
        self.nodes_of[row][node] = (score, depth + 1, parent, token, 0)
        self.nodes_of[row][parent] = (above, depth, grand, own, children + 1)
        if depth + 1 < self.deep[row]:
            self.push(self.heaps[row], score, node)
        if children + 1 < self.width:
            self.push(self.heaps[row], left, parent)
