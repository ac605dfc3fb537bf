"""The laws of a call: its logits processors, applied to every node of a tree with that node's own prefix.

Shapes: B rows, N nodes, V tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hasten.pipelines.decode import compat


class Processors:
    """Logits processors of one call, as drafters and verifiers use them (`Warp`).

    given: transformers' list. sampled: are tokens drawn? `texts` are the rows so far as processors are shown them, with their
    padding, on the host; `ids` the same on the device. kind: "alone" (processors look at one row of logits), "prefix" (at the
    tokens before, too), "order" (nobody knows: they are called once for every token, in order).
    """

    def __init__(self, given: Any, sampled: bool) -> None:
        self.given, self.sampled = given, sampled
        names = {_name(each) for each in given}
        self.unknown = sorted({type(each).__name__ for each in given if _name(each) not in compat.ALONE | compat.BY_PREFIX})
        self.kind = "order" if self.unknown else "prefix" if names & compat.BY_PREFIX else "alone"
        self.ids: list[Tensor] = []

    def show(self, ids: list[Tensor]) -> None:
        """The rows so far, int64 [L_b] each, with their padding."""
        self.ids = ids

    def __call__(self, logits: Tensor, nodes: Tensor, tokens: Tensor, parent: Tensor) -> Tensor:
        """Processed logits float32 [B, M, V] of `nodes` int64 [B, M] in the tree `tokens`, `parent` int64 [B, N]."""
        logits = logits.to(torch.float32, copy=True)
        if self.kind == "prefix":
            return self._by_prefix(logits, nodes, tokens, parent)
        if self.kind == "order" or not len(self.given):  # in order: the drafter's own guess; the target asks one by one
            return logits
        flat = logits.flatten(0, 1)
        none = torch.zeros(len(flat), 1, dtype=torch.long, device=flat.device)
        return _scores(self.given(none, flat)).view_as(logits)

    def first(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Where all rows are equally long, as behind the prompt: ids int64 [B, L], logits [B, V]; as `generate` calls them itself.
        float32 [B, V], which may be `logits` themselves. Of kind "alone", nobody looks at `ids`."""
        if not len(self.given):
            return logits.float()
        return _scores(self.given(ids, logits.to(torch.float32, copy=True)))

    def _by_prefix(self, logits: Tensor, nodes: Tensor, tokens: Tensor, parent: Tensor) -> Tensor:
        """Nodes whose prefixes have one length are processed in one call. Waits for the device, to know these lengths."""
        told = torch.stack([tokens, parent]).tolist()
        groups: dict[int, list[tuple[int, int, Tensor]]] = {}
        for row, asked in enumerate(nodes.tolist()):
            for place, node in enumerate(asked):
                prefix = torch.cat([self.ids[row], self.ids[row].new_tensor(_path(node, told[0][row], told[1][row]))])
                groups.setdefault(len(prefix), []).append((row, place, prefix))
        for members in groups.values():
            rows, places = [row for row, _, _ in members], [place for _, place, _ in members]
            prefixes = torch.stack([prefix for _, _, prefix in members])
            logits[rows, places] = _scores(compat.of_rows(self.given, rows)(prefixes, logits[rows, places]))
        return logits


class Scores:
    """What the model says behind every node: a `Target`. scores float32 [B, N, V]: logits behind the processors."""

    def __init__(self, sampled: bool, scores: Tensor) -> None:
        self.sampled, self.scores = sampled, scores

    def best(self) -> Tensor:
        return self.scores.argmax(-1)

    def law(self) -> Tensor:
        return torch.softmax(self.scores, -1)


class TreeTarget(Scores):
    """The same, from the model's logits [B, N, V] behind the nodes of a tree."""

    def __init__(self, processors: Processors, logits: Tensor, tokens: Tensor, parent: Tensor) -> None:
        nodes = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        super().__init__(processors.sampled, processors(logits, nodes, tokens, parent))


def _path(node: int, tokens: list[int], parent: list[int]) -> list[int]:
    """Tokens from behind node 0 to `node`; node 0 is committed already."""
    found: list[int] = []
    while node > 0:
        found.append(tokens[node])
        node = parent[node]
    return found[::-1]


def _scores(processed: Any) -> Tensor:
    found: Tensor = processed
    return found


def _name(processor: Any) -> str:
    """Class name of transformers' own processors; another one's is nobody's."""
    kind = type(processor)
    return kind.__name__ if kind.__module__.startswith("transformers.generation.") else ""
