"""The policy on a recipe's `attention` axis: when attention is sparse, what is read then, what stands in for the rest.

Shapes: B batch, Hq, Hk heads, Sq, Sk tokens, D, Dv head dimensions, Pq = B * Hq planes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hasten.errors import RecipeError, RefusedError
from hasten.recipe import Attention
from hasten.sparse_attn.attention import sparse_attention
from hasten.sparse_attn.autograd import arranged, planned_attention
from hasten.sparse_attn.chooser import Chooser, ChooserState, Sampled
from hasten.sparse_attn.density import density
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.pack import pack
from hasten.sparse_attn.pattern import Pattern, PatternState, Selection, by_head, unlike
from hasten.sparse_attn.plan import Output, Plan
from hasten.sparse_attn.recall import sampled_recall
from hasten.sparse_attn.reference import dense as dense_with_lse
from hasten.sparse_attn.segments import Tokens
from hasten.sparse_attn.stand_ins.compensate import Compensate, StandIn, query_squares
from hasten.sparse_attn.stand_ins.recover import Recover, RecoverState
from hasten.step import Step

Dense = Callable[[], Tensor]
"""The host's own attention for this call: o [B, Hq, Sq, Dv]."""


class SparseAttention(Attention):
    """Attention that reads part of the keys.

    patterns: what is read. With several, `chooser` picks one for each head.
    compensate: what stands in for what is not read; None drops it.
    recover: how outputs are corrected by what dense steps have shown (Re-ttention); None: not at all.
    warm, tail: share of a run's first and last steps that stay dense. every: so is every N-th step in between (0: none).
    dense_layers: as many first attention layers.
    refresh: steps for which a selection is used before it is made anew.
    share_branches: the branches of guidance use one selection (and warm-started clusters), made by the first.
    block_m: queries per tile, block_n: keys per chunk. min_tokens: sequences shorter than this stay dense; None leaves
    it to the predicted gain.
    """

    kind: ClassVar[str] = "sparse"
    patterns: tuple[Pattern, ...]
    chooser: Chooser = Sampled()
    compensate: StandIn | None = None
    recover: Recover | None = None
    warm: float = Field(default=0.1, ge=0, le=1)
    tail: float = Field(default=0.0, ge=0, le=1)
    every: int = Field(default=0, ge=0)
    dense_layers: int = Field(default=0, ge=0)
    refresh: int = Field(default=1, ge=1)
    share_branches: bool = False
    block_m: int = Field(default=128, ge=16, le=256)
    block_n: int = Field(default=64, ge=16, le=128)
    min_tokens: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _has_patterns(self) -> SparseAttention:
        if not self.patterns:
            raise RecipeError("attention.patterns is empty; name at least one pattern (layout, score, select).")
        return self

    @property
    def tells_recall(self) -> bool:
        """Is `Fact.rho` about anything? It is estimated where something stands in for the rest, and measured where a
        selector goes by it; elsewhere nobody knows."""
        return self.compensate is not None or any(pattern.select.probes for pattern in self.patterns)

    @property
    def follows(self) -> bool:
        """Does it read as much as an account of errors can afford, where a run keeps one?"""
        return any(pattern.select.follows for pattern in self.patterns)

    def is_dense(self, step: Step, layer: int) -> bool:
        """Does this step stay dense at this layer, whatever the tensors are? layer: number of the attention site."""
        first, last = round(self.warm * step.total), step.total - round(self.tail * step.total)
        again = self.every > 0 and step.index % self.every == 0
        return layer < self.dense_layers or step.index < first or step.index >= last or again

    def in_every_step(self) -> SparseAttention:
        """The same for a network that was trained to read so: no step is dense, and nothing of one is used in the next.

        `min_tokens` None becomes 0: what was trained to be sparse is no longer dense where that would pay.
        Raises `RefusedError` for parts that learn from dense steps, or through which no gradient passes.
        """
        if self.recover is not None or any(pattern.score.start().needs_lse for pattern in self.patterns):
            raise RefusedError(
                "This attention learns from dense steps (recover, or a score of measured mass), and a trained student has"
                " none. Take another recipe, for example radial or semantic."
            )
        if not isinstance(self.compensate, Compensate | None):
            raise RefusedError(
                f"No gradient passes through compensation by {self.compensate.kind!r}. Take kind 'centroid', or none."
            )
        plain = {"warm": 0.0, "tail": 0.0, "every": 0, "refresh": 1, "share_branches": False}
        return self.model_copy(update=plain | {"min_tokens": self.min_tokens or 0})

    def start(self, layer: int = 0) -> SparseState:
        """Fresh state for one run, branch (or all branches, with `share_branches`) and attention site."""
        return SparseState(self, layer)


@dataclass(frozen=True, slots=True)
class Fact:
    """What one call did. action: "dense" or "sparse". reused: the selection of an earlier step was used.

    density: share of the pairs that were read exactly, rho: mean share of the mass that was, estimated, or measured where
    a selector goes by it (each a scalar tensor that nobody has waited for); None in dense calls.
    """

    step: int
    branch: int
    action: str
    reused: bool = False
    density: Tensor | None = None
    rho: Tensor | None = None


@dataclass(slots=True)
class SparseState:
    """State of `SparseAttention` at one site. facts: one per call; the seam reads and empties them at the end of a run."""

    policy: SparseAttention
    layer: int = 0
    facts: list[Fact] = field(default_factory=list)
    _patterns: list[PatternState] = field(init=False)
    _chooser: ChooserState = field(init=False)
    _recover: RecoverState | None = field(init=False)
    _selection: Selection | None = None
    _plan: Plan | None = None
    _made: tuple[int, tuple[torch.Size, torch.Size]] | None = None

    def __post_init__(self) -> None:
        self._patterns = [pattern.start() for pattern in self.policy.patterns]
        self._chooser = self.policy.chooser.start()
        self._recover = self.policy.recover.start() if self.policy.recover is not None else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, step: Step, q_tokens: Tokens, k_tokens: Tokens,
        scale: float, dense: Dense, mask: Mask | None = None,
    ) -> Tensor:  # fmt: skip
        """o [B, Hq, Sq, Dv] for q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv] in original order."""
        if self.policy.is_dense(step, self.layer):
            return self._dense(q, k, v, step, q_tokens, k_tokens, scale, dense, mask)
        reused = self._current(step, q, k)
        if not reused:
            self._select(q, k, v, step, q_tokens, k_tokens, scale, mask)
        out = self._sparse(q, k, v, scale)
        rho = out.rho.mean(-1)
        probes = max(pattern.select.probes for pattern in self.policy.patterns)
        if probes:
            read = out.lse if out.lse_exact is None else out.lse_exact
            rho = sampled_recall(q, k, read, q_tokens, k_tokens, scale, samples=probes, mask=mask)
        for pattern in self._patterns:
            pattern.select.observe(rho.reshape(-1))
        assert self._plan is not None
        self.facts.append(Fact(step.index, step.branch, "sparse", reused, density(self._plan), rho.mean()))
        return self._recover.correct(out, step) if self._recover is not None else out.o

    def differentiable(
        self, q: Tensor, k: Tensor, v: Tensor, step: Step, q_tokens: Tokens, k_tokens: Tokens,
        scale: float, mask: Mask | None = None,
    ) -> Tensor:  # fmt: skip
        """A sparse call of `attend` with gradients in q, k and v. What is read is chosen anew, and is a constant; what
        stands in for the rest is not. For policies that are `in_every_step`."""
        with torch.no_grad():
            self._select(q.detach(), k.detach(), v.detach(), step, q_tokens, k_tokens, scale, mask)
        assert self._plan is not None and self._selection is not None
        tables, order = None, self._selection.blocks.k
        if self.policy.compensate is not None:
            squares = query_squares(q.detach(), self._plan.groups, scale)
            kept = (arranged(k, order.perm), arranged(v, order.perm))
            tables = self.policy.compensate.tables(*kept, order, self._selection.approximate, squares)
        return planned_attention(q, k, v, self._plan, scale, compensation=tables)[0]

    def aim(self, recall: float) -> None:
        """The share of the mass that is to be read from the next choice on."""
        for pattern in self._patterns:
            pattern.select.aim(recall)

    def num_bytes(self) -> int:
        """Bytes held for later steps."""
        held = self._plan.num_bytes() if self._plan is not None else 0
        held += sum(pattern.layout.num_bytes() for pattern in self._patterns)
        return held + (self._recover.num_bytes() if self._recover is not None else 0)

    def forget(self) -> None:
        """Drop the selection and all that dense steps have shown."""
        self.__post_init__()
        self._selection = self._plan = self._made = None

    # --- parts of a call --------------------------------------------------------------------------

    def _dense(
        self, q: Tensor, k: Tensor, v: Tensor, step: Step, q_tokens: Tokens, k_tokens: Tokens,
        scale: float, dense: Dense, mask: Mask | None,
    ) -> Tensor:  # fmt: skip
        self.facts.append(Fact(step.index, step.branch, "dense"))
        learns = [pattern for pattern in self._patterns if pattern.score.needs_lse]
        if not learns and self._recover is None or self.layer < self.policy.dense_layers:
            return dense()
        full = dense_with_lse(q, k, v, scale=scale, mask=mask)
        for pattern in learns:
            view = pattern.view(q, k, q_tokens, k_tokens, scale, mask, v)
            pattern.score.observe(view, view.blocks.q.arrange(full.lse[..., None])[..., 0])
            self._made = None  # what was chosen before is out of date
        if self._recover is not None and self._recover.wants(step):
            if not self._current(step, q, k):
                self._select(q, k, v, step, q_tokens, k_tokens, scale, mask)
            self._recover.observe(full, self._sparse(q, k, v, scale), step)
        return full.o.to(q.dtype)

    def _current(self, step: Step, q: Tensor, k: Tensor) -> bool:
        """Is there a selection that this call may use?"""
        if self._made is None or self._plan is None:
            return False
        made, shapes = self._made
        return shapes == (q.shape, k.shape) and made <= step.index < made + self.policy.refresh

    def _select(
        self, q: Tensor, k: Tensor, v: Tensor, step: Step, q_tokens: Tokens, k_tokens: Tokens,
        scale: float, mask: Mask | None,
    ) -> None:  # fmt: skip
        views = [state.view(q, k, q_tokens, k_tokens, scale, mask, v) for state in self._patterns]
        found = [state.choose(view) for state, view in zip(self._patterns, views, strict=True)]
        selection = found[0]
        if len(found) > 1:
            choice = self._chooser.choose(q, k, v, found, scale, mask)
            selection = by_head(found, choice, (q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]))
        heads = (q.shape[0], q.shape[1], k.shape[1])
        self._plan = pack(
            selection.blocks, selection.keep, heads, block_m=self.policy.block_m, block_n=self.policy.block_n, mask=mask
        )
        self._selection, self._made = unlike(selection), (step.index, (q.shape, k.shape))

    def _sparse(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Output:
        assert self._plan is not None and self._selection is not None
        blocks = self._selection.blocks
        k, v = blocks.k.arrange(k), blocks.k.arrange(v)
        stand_in, left_out = self.policy.compensate, self._selection.approximate
        tables = None
        if stand_in is not None:
            squares = query_squares(q, self._plan.groups, scale)
            tables = stand_in.tables(k, v, blocks.k, left_out, squares)
        out = sparse_attention(q, k, v, self._plan, scale=scale, compensation=tables, arranged=True)
        return out if stand_in is None else stand_in.add(out, q, k, v, blocks, left_out, scale)
