"""A small causal model that reads ragged rows and trees of drafts, with keys and values of its own.

Shapes: B rows, K tokens read at once, S slots. Every read appends K slots for all rows. A slot stays where it is: whether it
is part of a row's text is in `held`, its place in the text is in the key. Slots that belong to no text are dropped at the end
of the cache at once, and from its middle when there are many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hasten.pipelines.decode import compat

SLACK = 64
"""Slots that belong to no text, before the cache is packed."""


class Reader:
    """A model and what it has read. held bool [B, S]: slots that are part of each row's text."""

    def __init__(self, model: Any, rows: int, device: torch.device) -> None:
        self.model, self.cache = model, compat.growing()
        self.held = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        config = model.config.get_text_config(decoder=True)
        self.additive = model.dtype if compat.ATTENTION[config._attn_implementation] else None

    @property
    def slots(self) -> int:
        return self.held.shape[1]

    def read(self, tokens: Tensor, position: Tensor, sees: Tensor, last: bool = False) -> Tensor:
        """Read tokens int64 [B, K] at position int64 [B, K] of their texts; logits [B, K, V], of the last alone on request.

        sees bool [B, K, S + K]: which slots each reads. Everyone sees at least itself, so that padding gives numbers.
        """
        own = torch.eye(tokens.shape[1], dtype=torch.bool, device=sees.device)
        sees[:, :, self.slots :] |= own
        mask = sees[:, None]
        if self.additive is not None:
            mask = torch.zeros_like(mask, dtype=self.additive).masked_fill(~mask, torch.finfo(self.additive).min)
        self.held = torch.nn.functional.pad(self.held, (0, tokens.shape[1]))
        with torch.no_grad():
            found = self.model(
                input_ids=tokens, position_ids=position, attention_mask=mask, past_key_values=self.cache, use_cache=True,
                return_dict=True, **(compat.last_logits(self.model) if last else {}),
            )  # fmt: skip
        logits: Tensor = found.logits
        return logits

    def text(self, new: list[list[int]], known: list[int]) -> Tensor:
        """Read what is new of each row's text, behind its `known` tokens; logits [B, V] behind each. A row with nothing new
        reads padding, whose logits mean nothing."""
        most = max(1, *map(len, new))
        tokens = torch.tensor([[0] * (most - len(row)) + row for row in new], device=self.held.device)
        here = torch.tensor([[0] * (most - len(row)) + [1] * len(row) for row in new], device=tokens.device).bool()
        begin = torch.tensor(known, device=tokens.device)[:, None]
        causal = torch.ones(most, most, dtype=torch.bool, device=tokens.device).tril() & here[:, None, :]
        sees = torch.cat([self.held[:, None].expand(-1, most, -1), causal], 2)
        logits = self.read(tokens, (begin + here.cumsum(1) - 1).clamp(min=0), sees, last=True)
        self.held[:, -most:] = here
        return logits[:, -1]

    def keep(self, slots: list[list[int]], size: int) -> None:
        """Of the slots behind the first `size`, keep these of each row as part of its text; drop the others."""
        for row, each in enumerate(slots):
            self.held[row, each] = True
        end = max([size, *(slot + 1 for each in slots for slot in each)])
        self._take(torch.arange(end, device=self.held.device).expand(len(slots), -1), shift=False)
        most = int(self.held.sum(1).max())
        if end - most > SLACK:
            self._take(torch.argsort((~self.held).long(), dim=1, stable=True)[:, :most], shift=True)

    def _take(self, order: Tensor, *, shift: bool) -> None:
        """Keep the slots `order` int64 [B, S'] of every layer; without `shift` these are the first ones."""
        size = order.shape[1]
        self.held = self.held.gather(1, order)
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                each = getattr(layer, name)
                index = order[:, None, :, None].expand(-1, each.shape[1], -1, each.shape[3])
                setattr(layer, name, each.gather(2, index) if shift else each[:, :, :size])


class Branch:
    """What a `Reader` has read of one row's drafts: where each stands, so that what is accepted can be kept.

    Nodes are numbered as their owner does; node 0 is the last token of the text, which is held already.
    """

    def __init__(self) -> None:
        self.above: dict[int, tuple[int, ...]] = {0: ()}
        self.children: dict[tuple[int, int], int] = {}

    def add(self, node: int, parent: int, token: int, slot: int) -> None:
        self.above[node] = (*self.above[parent], slot)
        self.children.setdefault((parent, token), node)

    def accepted(self, tokens: list[int]) -> list[int]:
        """Slots of the longest path that spells the beginning of `tokens`."""
        at = 0
        for token in tokens:
            found = self.children.get((at, token))
            if found is None:
                break
            at = found
        return list(self.above[at])


def read_drafts(
    reader: Reader, branches: list[Branch], base: list[int], asked: list[list[tuple[int, int, int]]]
) -> Tensor:
    """Read drafts of every row: `asked` has (node, parent, token) of each, whose parents have been read; logits [B, K, V], rows
    with fewer are padded behind. base: tokens of each row's text, the last included."""
    rows, most, before = len(asked), max(map(len, asked)), reader.slots
    device = reader.held.device
    sees = torch.cat([reader.held[:, None].expand(-1, most, -1), torch.zeros(rows, most, most, dtype=torch.bool, device=device)], 2)
    tokens, position = [[0] * most for _ in asked], [[0] * most for _ in asked]
    places: list[tuple[int, int, int]] = []
    for row, wanted in enumerate(asked):
        for column, (node, parent, token) in enumerate(wanted):
            above = branches[row].above[parent]
            tokens[row][column], position[row][column] = token, base[row] + len(above)
            places += [(row, column, slot) for slot in above]
            branches[row].add(node, parent, token, before + column)
    if places:
        sees[tuple(torch.tensor(places, device=device).unbind(1))] = True
    return reader.read(torch.tensor(tokens, device=device), torch.tensor(position, device=device), sees)
