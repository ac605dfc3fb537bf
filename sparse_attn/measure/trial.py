"""One way of being sparse, tried on given queries, keys and values at a given budget: what benchmarks and studies time.

Shapes: B batch, Hq, Hk heads, S tokens, D, Dv head dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from hasten.sparse_attn.attention import sparse_attention
from hasten.sparse_attn.blocks import Blocks
from hasten.sparse_attn.density import tile_density
from hasten.sparse_attn.layouts.layout import Layout, LayoutState
from hasten.sparse_attn.measure.quality import at_tile_density, sampled_error, within
from hasten.sparse_attn.pack import pack
from hasten.sparse_attn.plan import Compensation, Output, Plan
from hasten.sparse_attn.scorers.scorer import Scorer, ScorerState, View
from hasten.sparse_attn.segments import Tokens
from hasten.sparse_attn.stand_ins.compensate import StandIn, approximate_map, query_squares

Budget = Literal["tokens", "tiles"]
"""What a density counts: pairs of tokens, or the work of whole tiles of the kernel."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """q [B, Hq, S, D], k [B, Hk, S, D], v [B, Hk, S, Dv] of self- or joint attention, and which tokens they are."""

    q: Tensor
    k: Tensor
    v: Tensor
    tokens: Tokens

    @property
    def scale(self) -> float:
        """D^-0.5."""
        return float(self.q.shape[-1] ** -0.5)

    @property
    def heads(self) -> tuple[int, int, int]:
        """(B, Hq, Hk)."""
        return self.q.shape[0], self.q.shape[1], self.k.shape[1]


@dataclass(frozen=True, slots=True)
class Method:
    """An order of the tokens, a score for pairs of blocks, and what stands in for the rest (None: nothing).

    block_m, block_n: queries per tile and keys per chunk of the plan.
    """

    name: str
    layout: Layout
    score: Scorer
    compensate: StandIn | None = None
    block_m: int = 128
    block_n: int = 64


@dataclass(slots=True)
class Trial:
    """A method at work on one set of inputs. `choose` makes a plan, `attend` runs it as often as wanted."""

    method: Method
    inputs: Inputs
    blocks: Blocks = field(init=False)
    keep: Tensor = field(init=False)
    plan: Plan = field(init=False)
    _layout: LayoutState = field(init=False)
    _score: ScorerState = field(init=False)
    _left: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._layout, self._score = self.method.layout.start(), self.method.score.start()

    def choose(self, density: float, budget: Budget = "tokens") -> None:
        """Order the tokens, score the blocks, select `density` of them, pack. Later calls start from warm clusters."""
        view = self.look()
        self.select(self._score.scores(view), view.blocks, density, budget)

    def look(self) -> View:
        """What the scorer sees, in the layout's order."""
        x = self.inputs
        blocks = self._layout.blocks(x.q, x.k, x.tokens, x.tokens)
        v = blocks.k.arrange(x.v) if self._score.needs_values else None
        return View(blocks.q.arrange(x.q), blocks.k.arrange(x.k), blocks, x.tokens, x.tokens, x.scale, None, v)

    def select(self, scores: Tensor, blocks: Blocks, density: float, budget: Budget = "tokens") -> None:
        """Select by `scores` (float32 [P1, Cq, Ck]) and pack."""
        if budget == "tiles":

            def tiles(keep: Tensor) -> float:
                return float(tile_density(self._packed(blocks, keep)))

            keep = at_tile_density(scores, blocks, density, tiles)
        else:
            keep = within(scores, blocks, density)
        self.use(blocks, keep)

    def use(self, blocks: Blocks, keep: Tensor) -> None:
        """Read what `keep` (bool [P1, Cq, Ck], roles applied) says."""
        self.blocks, self.keep, self.plan = blocks, keep, self._packed(blocks, keep)
        groups = self.inputs.heads[1] // self.inputs.heads[2]
        self._left = approximate_map(blocks, keep, groups=groups)

    def attend(self, compensated: bool = True) -> Output:
        """Arrange keys and values, make what stands in (unless not `compensated`), attend."""
        x, order = self.inputs, self.blocks.k
        k, v = order.arrange(x.k), order.arrange(x.v)
        tables, rest = self._tables(k, v) if compensated else None, self.method.compensate
        out = sparse_attention(x.q, k, v, self.plan, scale=x.scale, compensation=tables, arranged=True)
        return rest.add(out, x.q, k, v, self.blocks, self._left, x.scale) if compensated and rest is not None else out

    def error(self, found: Output, samples: int = 128, compensated: bool = True) -> float:
        """Largest relative error of `found` against the float64 reference on sampled queries of every head. What
        stands in must be tables (`Compensate`)."""
        x, order = self.inputs, self.blocks.k
        tables = self._tables(order.arrange(x.k), order.arrange(x.v)) if compensated else None
        return sampled_error(
            found, x.q, x.k, x.v, self.blocks, self.keep, samples=samples, scale=x.scale, compensation=tables
        )

    def _tables(self, k: Tensor, v: Tensor) -> Compensation | None:
        if self.method.compensate is None:
            return None
        x = self.inputs
        squares = query_squares(x.q, x.heads[1] // x.heads[2], x.scale)
        return self.method.compensate.tables(k, v, self.blocks.k, self._left, squares)

    def _packed(self, blocks: Blocks, keep: Tensor) -> Plan:
        method = self.method
        return pack(blocks, keep, self.inputs.heads, block_m=method.block_m, block_n=method.block_n)
