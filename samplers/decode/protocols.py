"""The parts of a decode loop: a drafter proposes, the model reads, a verifier accepts, a pace says how much is worth it.

Shapes: B rows, N nodes of a proposal, V tokens of the vocabulary, H hidden width. Parts are frozen; `start()` gives the
state of one call of `generate`.

One round: `pace.next()` -> `drafter.propose(context, nodes)` -> the model reads the tree -> `verifier.verify(proposal,
target)` -> the loop commits the path -> `drafter.observe(outcome)`, `pace.learn(round)`. Without drafts: `verifier.alone`
for each token, until `pace.quiet()` rounds are over; then the drafter and the pace are told.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from hasten.recipe import Drafting, Pacing, Verify
from hasten.rounds import Round
from hasten.samplers.decode.proposal import Proposal, nothing
from hasten.samplers.decode.tree import Warp


@dataclass(frozen=True, eq=False)
class Facts:
    """What does not change in one call of `generate`.

    rows: texts in the batch. vocabulary: width of the logits. sampled: are tokens drawn, or the most probable ones taken?
    warp: logits processors and temperature of the call, for the drafter's own logits, too. ends: ids that end a row.
    host: the model itself, for drafters that are made of it; tail: its keys and values of what is committed
    (`hasten.pipelines.decode.tail.Tail`), for those that run it. What they add there they have to take back.
    kept: what drafters keep by name from call to call; it lives as long as the session. weighs: of the drafter.
    """

    rows: int
    vocabulary: int
    device: torch.device
    sampled: bool
    warp: Warp
    ends: tuple[int, ...] = ()
    host: Any = None
    tail: Any = None
    kept: dict[str, Any] = field(default_factory=dict)
    weighs: bool = False


Weigh = Callable[[list[list[float]], "Context"], int]
"""(for each row, the chances that its drafts stand, the best first; where the rows are) -> drafts of a row that are worth reading."""


@dataclass(frozen=True, eq=False)
class Context:
    """Where the rows are.

    texts: tokens of each row so far, on the host and without padding; the last is node 0 of the next proposal. Not to be
    changed. last int64 [B]: these last tokens on the device. active: rows that are not finished. room: tokens that each row
    may still write; a node deeper than room - 1 is never of use. seen: what `observe` saw last; None before the first round.
    weigh: for drafters that know how sure they are, the pace's say in how many of their drafts are read.
    """

    texts: list[list[int]]
    last: Tensor
    active: list[bool]
    room: list[int]
    seen: Outcome | None = None
    weigh: Weigh | None = None

    @property
    def reach(self) -> int:
        """Greatest depth at which a node can be of use to any row."""
        return max((room - 1 for room, active in zip(self.room, self.active, strict=True) if active), default=0)


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a verifier says. path int64 [B, D + 1]: accepted nodes, node 0 first, -1 behind the last of them. count int64
    [B]: accepted drafts (node 0 is none). token int64 [B]: what is written behind the last accepted node."""

    path: Tensor
    count: Tensor
    token: Tensor


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a proposal.

    written int64 [B, D + 1]: the new tokens of each row, accepted drafts and the verdict's own, -1 behind them: fewer than
    the verdict has where the row ended or ran out of room. lengths: how many, on the host. logits [B, N, V]: of the model
    behind every node, before processors. hidden: for each name in the drafter's `needs`, a tensor [B, N, H].
    """

    proposal: Proposal
    verdict: Verdict
    written: Tensor
    lengths: list[int]
    logits: Tensor
    hidden: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Prefill:
    """What the model said of the prompt. ids, mask int64 [B, L] as given to `generate` (padding is 0 in the mask); logits
    [B, V] behind the last token; hidden: as in `Outcome`, [B, L, H]."""

    ids: Tensor
    mask: Tensor
    logits: Tensor
    hidden: dict[str, Tensor] = field(default_factory=dict)


class Drafter(Drafting):
    """Base of the drafters; `start()` gives the state for one call of `generate`.

    needs: what of the model it reads besides logits: "hidden:i" is what enters layer i, "hidden:-1" what the head reads
    (behind the last norm). nodes: drafts of a row at most, node 0 not counted. shape: whether its proposals are chains. weighs:
    it drafts on the host, says how sure it is, and reads the best of its drafts alone where `Context.weigh` says so.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    weighs: ClassVar[bool] = False
    nodes: int = Field(8, ge=1)

    @property
    def shape(self) -> Literal["tree", "chain"]:
        """"chain" where no node has two children; some verifiers take nothing else."""
        return "tree"

    def start(self, facts: Facts) -> DrafterState:
        """State of one call of `generate`."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class DrafterState:
    """The state of a `Drafter`."""

    def begin(self, prefill: Prefill, context: Context) -> None:
        """Once, when the prompt has been read and the first token is written. By default nothing is kept of it."""

    def propose(self, context: Context, nodes: int) -> Proposal:
        """At most `nodes` >= 1 drafts of each row behind `context.last`; fewer, or none (`nothing`), where it knows none."""
        raise NotImplementedError(f"{type(self).__name__} has no propose().")

    def reading(self, proposal: Proposal) -> AbstractContextManager[None]:
        """Open while the model reads `proposal`: for drafters whose prompt nodes need more of the model than an input."""
        return nullcontext()

    def observe(self, outcome: Outcome, context: Context) -> None:
        """After each round, also after those without drafts: learn, and take back what was not accepted. `context` is that
        after the commit. Several rounds without drafts are one outcome, as of a chain that stood."""


class Target(Protocol):
    """What the model says of a proposal's nodes, with the processors of the call applied."""

    sampled: bool

    def best(self) -> Tensor:
        """Most probable token behind every node, int64 [B, N]."""

    def law(self) -> Tensor:
        """Probabilities behind every node, float32 [B, N, V], also where tokens are not sampled."""


class Verifier(Verify):
    """Base of the verifiers; `start()` gives the state for one call of `generate`.

    lossless: what is written follows the model's law, and equals its most probable tokens where they are taken. shape:
    whether it can judge trees, or only chains.
    """

    lossless: ClassVar[bool] = True
    shape: ClassVar[Literal["tree", "chain"]] = "tree"

    def start(self, facts: Facts) -> VerifierState:
        """State of one call of `generate`."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class VerifierState:
    """The state of a `Verifier`."""

    def verify(self, proposal: Proposal, target: Target) -> Verdict:
        """Which path is accepted, and what is written behind it. Never waits for the device."""
        raise NotImplementedError(f"{type(self).__name__} has no verify().")

    def alone(self, last: Tensor, target: Target) -> Tensor:
        """What is written behind `last` int64 [B] where nothing was drafted: the same as the verdict's token on `nothing`."""
        return self.verify(nothing(last), target).token


class Pace(Pacing):
    """Base of the paces; `start()` gives the state for one call of `generate`."""

    def start(self, facts: Facts) -> PaceState:
        """State of one call of `generate`."""
        raise NotImplementedError(f"{type(self).__name__} has no start().")


class PaceState:
    """The state of a `Pace`."""

    def next(self, most: int) -> int:
        """How many drafts of a row the next round should have, 0 to `most`; 0: plain decoding."""
        raise NotImplementedError(f"{type(self).__name__} has no next().")

    def weigh(self, chances: list[list[float]], context: Context) -> int:
        """How many drafts of a row are worth reading, of a proposal whose drafter weighs (`Context.weigh`); by default all."""
        return max(map(len, chances))

    def quiet(self) -> int:
        """After `next` has said 0: in how many rounds behind that one it will say so again, whatever they show. So many are run
        in one go; 0: it wants to be asked."""
        return 0

    def learn(self, done: Round) -> None:
        """After each round, in order; rounds that were run in one go one after the other when they are over."""
