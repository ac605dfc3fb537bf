"""Who plays whom in trainings of language models: teacher and student are adapters on one frozen base, as in `roles.py`.

A role answers with logits where a denoiser's answers with a velocity. It is called as its family's authors call it
(`TextHost.own`), on whole texts without padding: texts of one length go together, so that no model needs a mask for
padding and no row can depend on how long its neighbours are.

Shapes: B texts of at most L tokens; V tokens of the vocabulary; n tokens that are asked for; C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from hasten.canvas import TextFacts
from hasten.distill.method import Batch
from hasten.distill.network.host_call import Condition
from hasten.distill.network.roles import Adapter, Role, Roles, Stage
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.text_models.family import Family
from hasten.pipelines.text_models.host import TextHost

NEVER = -1e30
"""Logit of tokens that are never written. Finite, so that 0 log 0 is 0 in an entropy and in its gradient."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Rows of tokens. ids int64 [B, L], padded behind `end`; the part [start, end) int64 [B] was generated."""

    ids: Tensor
    start: Tensor
    end: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Texts:
        """The texts of a batch. Raises `UsageError` for a batch of other data."""
        found = batch.condition.tensors
        if not {"ids", "start", "end"} <= found.keys():
            raise UsageError(f"Tokens are needed, and the data has {', '.join(found)}. Make it with text_teach.make_texts.")
        return cls(found["ids"], found["start"], found["end"])

    @property
    def condition(self) -> Condition:
        """As rows of a `Store`."""
        return Condition({"ids": self.ids, "start": self.start, "end": self.end})

    @property
    def place(self) -> Tensor:
        """0 to L - 1, int64 [1, L]."""
        return torch.arange(self.ids.shape[1], device=self.ids.device)[None]

    def over(self, ends: tuple[int, ...]) -> Tensor:
        """Behind the first of the tokens `ends` in what was generated, or `end` where there is none, int64 [B]: what a
        model wrote behind an end of text says nothing."""
        stops = torch.isin(self.ids, torch.tensor(ends, dtype=torch.int64, device=self.ids.device))
        stops = stops & (self.place >= self.start[:, None]) & (self.place < self.end[:, None])
        return torch.where(stops.any(1), stops.long().argmax(1) + 1, self.end)

    def written(self, ends: tuple[int, ...]) -> Tensor:
        """bool [B, L]: what was generated up to there."""
        return (self.place >= self.start[:, None]) & (self.place < self.over(ends)[:, None])


@dataclass(frozen=True, slots=True)
class TextCall:
    """A language model and how it is called. site: what exports call the network."""

    host: Family
    site: str = "model"

    @classmethod
    def of(cls, host: TextHost) -> TextCall:
        """Raises `RefusedError` for a model that cannot be asked for the logits of a whole text."""
        if not isinstance(host, Family):
            raise RefusedError(f"{type(host.model).__name__} gives no logits of whole texts, so that it cannot be trained here.")
        return cls(host)

    @property
    def network(self) -> nn.Module:
        """The transformers model."""
        return self.host.model

    @property
    def facts(self) -> TextFacts:
        """What the engine knows of it."""
        return self.host.facts

    def logits(self, ids: Tensor, end: Tensor, asked: Tensor) -> Tensor:
        """float32 [n, V]: of the tokens at `asked` (bool [B, L]), row after row; those never written are `NEVER`.

        ids int64 [B, L] with masks in it, of which row b has end[b] tokens. Of a model that predicts the next token the
        first one of a text cannot be asked for.
        """

        def evaluate(rows: Tensor, mine: Tensor) -> Tensor:
            whole = self.host.own(rows)
            return torch.cat([whole[:, :1], whole[:, :-1]], 1) if self.facts.shifted else whole

        return self.allowed(each_length(ids, end, asked, evaluate))

    def states(self, ids: Tensor, end: Tensor, asked: Tensor) -> Tensor:
        """[n, C]: what goes into the layer that gives logits, at `asked`, unshifted; else as `logits`.

        Raises `RefusedError` for a model whose last layer is not known.
        """
        return each_length(ids, end, asked, lambda rows, mine: self.inner(rows))

    def inner(self, rows: Tensor) -> Tensor:
        """[m, N, C]: what goes into the layer that gives logits, of whole rows int64 [m, N] of one length."""
        seen: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            self.host.own(rows)
        finally:
            handle.remove()
        return seen[0]

    def read(self, states: Tensor) -> Tensor:
        """Logits float32 [n, V] of states [n, C] by the model's own last layer; those never written are `NEVER`."""
        found: Tensor = self.head(states)
        return self.allowed(found)

    def allowed(self, logits: Tensor) -> Tensor:
        """float32 [n, V] with `NEVER` for what is never written."""
        never = torch.tensor(sorted(self.facts.forbidden), dtype=torch.int64, device=logits.device)
        return logits.float().index_fill(1, never, NEVER)

    @property
    def head(self) -> nn.Module:
        """The layer that gives logits."""
        found = self.host.head()
        if found is None:
            raise RefusedError(f"Nobody knows which layer of {type(self.network).__name__} gives its logits.")
        return found


def each_length(ids: Tensor, end: Tensor, asked: Tensor, evaluate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What `evaluate` gives at `asked` (bool [B, L]), row after row. It is called once for the rows of each length: with
    ids int64 [b, l] and which rows of the batch these are, bool [B]; it gives [b, l, ...]."""
    number = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    found, order = [], []
    for length in sorted(set(end.tolist())):  # one look at the device per call: a training looks once per step anyway
        mine = end == length
        wanted = asked[mine, : int(length)]
        found.append(evaluate(ids[mine, : int(length)], mine)[wanted])
        order.append(number[mine, : int(length)][wanted])
    return torch.cat(found)[torch.cat(order).argsort()]


class TextRole(Role):
    """One player that is a language model."""

    def __init__(self, name: str, call: TextCall, stage: Stage | None, adapters: tuple[str, ...], trained: bool) -> None:
        super().__init__(name, cast(Any, call), stage, adapters, trained)  # it has a network and a site, and no path
        self.call = call

    def logits(self, ids: Tensor, end: Tensor, asked: Tensor) -> Tensor:
        """As `TextCall.logits`, by this role."""
        with self.playing():
            return self.call.logits(ids, end, asked)

    def states(self, ids: Tensor, end: Tensor, asked: Tensor) -> Tensor:
        """As `TextCall.states`, by this role."""
        with self.playing():
            return self.call.states(ids, end, asked)

    def answer(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        raise UsageError("A language model has no velocity: this way of training is for pictures. See hasten train --help.")


class TextRoles(Roles):
    """name -> `TextRole`."""

    @classmethod
    def of_model(cls, call: TextCall, trained: Iterable[str], adapter: Adapter) -> Self:
        """teacher, and each of `trained` as an adapter on the teacher's own weights.

        An adapter without names of layers is on all linear layers but the one that gives logits: its weights are the
        embeddings' in most small models.
        """
        stage = Stage(call.network)
        roles = cls(teacher=TextRole("teacher", call, stage, (), False))
        for name in trained:
            stage.add(name, adapter if adapter.layers else replace(adapter, layers=_inner(call)))
            roles[name] = TextRole(name, call, stage, (name,), True)
            stage.train(roles[name].parameters().values())
        return roles

    @classmethod
    def of_model_copies(cls, call: TextCall, trained: Iterable[str]) -> Self:
        """teacher, and each of `trained` as a whole copy of it."""
        call.network.requires_grad_(False)
        roles = cls(teacher=TextRole("teacher", call, None, (), False))
        for name in trained:
            twin = copy.copy(call.host)
            twin.model = copy.deepcopy(call.network).requires_grad_(True)
            roles[name] = TextRole(name, replace(call, host=twin), None, (), True)
        return roles

    def text(self, name: str) -> TextRole:
        """This role. Raises `UsageError` where it is no language model."""
        found = self.of(name)
        if not isinstance(found, TextRole):
            raise UsageError(f"Role {name!r} is no language model. This way of training is for text: --model tiny-dllm.")
        return found


def _inner(call: TextCall) -> tuple[str, ...]:
    head = call.host.head()
    return tuple(name for name, module in call.network.named_modules() if isinstance(module, nn.Linear) and module is not head)
