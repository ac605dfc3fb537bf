"""Random attention problems for kernels, with all that goes wrong: empty blocks, one-token chunks, NaN nearby."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hasten.sparse_attn.backends.executor import execute
from hasten.sparse_attn.blocks import NEVER, Blocks, Order
from hasten.sparse_attn.mask import Mask
from hasten.sparse_attn.pack import pack
from hasten.sparse_attn.plan import Compensation, Output, Plan
from hasten.sparse_attn.reference import reference
from hasten.sparse_attn.stand_ins.compensate import approximate_map, centroids


@dataclass(frozen=True)
class Case:
    """q, k, v in original order; k and v hold NaN where `poisoned` keys lie, which no query reads."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Blocks
    keep: Tensor
    plan: Plan
    mask: Mask | None = None
    compensation: Compensation | None = None
    poisoned: Tensor | None = None
    scale: float = 0.3

    def arranged(self) -> tuple[Tensor, Tensor]:
        """k and v in the order of the blocks, with the poison."""
        k, v = self.k, self.v
        if self.poisoned is not None:
            bad = self.poisoned.view(k.shape[0], k.shape[1], -1, 1)
            k, v = (x.masked_fill(bad, torch.nan) for x in (k, v))
        return self.blocks.k.arrange(k).contiguous(), self.blocks.k.arrange(v).contiguous()

    def tables(self) -> Compensation | None:
        """The compensation, with the poison: what does not stand in for any query may hold anything."""
        found = self.compensation
        if found is None:
            return None
        unused = ~found.approximate.any(0)[:, None]
        keys, values = found.keys.masked_fill(unused, torch.nan), found.values.masked_fill(unused, torch.nan)
        spread = found.variances
        return replace(
            found, keys=keys, values=values, variances=None if spread is None else spread.masked_fill(unused, torch.nan)
        )

    def truth(self) -> Output:
        return reference(
            self.q, self.k, self.v, self.blocks, self.keep, scale=self.scale, mask=self.mask,
            compensation=self.compensation,
        )  # fmt: skip

    def twin(self) -> Output:
        """The torch executor in the same dtype; the means of the tables, too, are rounded to it."""
        k, v = self.arranged()
        tables, short = self.compensation, self.q.dtype
        if tables is not None:
            tables = replace(tables, keys=tables.keys.to(short).float(), values=tables.values.to(short).float())
        return execute(self.q, k.nan_to_num(), v.nan_to_num(), self.plan, self.scale, tables)


def order(length: int, count: int, planes: int, perm: str, g: torch.Generator) -> Order:
    """`count` blocks of random sizes (some empty, some of one token). perm: "none", "shared" or "own" (every plane)."""
    rows = planes if perm == "own" else 1
    cuts = torch.randint(0, length + 1, (rows, count - 1), generator=g).sort(1).values
    if count > 3:
        cuts[:, 1] = cuts[:, 0]  # an empty block
        cuts[:, 2] = (cuts[:, 1] + 1).clamp(max=length)  # a block of one token
        cuts = cuts.sort(1).values
    bounds = torch.cat([torch.zeros(rows, 1), cuts, torch.full((rows, 1), length)], 1).int()
    order = None
    if perm != "none":
        order = torch.stack([torch.randperm(length, generator=g) for _ in range(rows)])
    return Order(order, bounds, torch.zeros(count, dtype=torch.int8))


def case(
    seed: int = 0, *, batch: int = 1, heads: tuple[int, int] = (2, 1), tokens: tuple[int, int] = (70, 90),
    dims: tuple[int, int] = (16, 16), counts: tuple[int, int] = (4, 6), tile: tuple[int, int] = (32, 16),
    perm: str = "own", shared: bool = False, density: float = 0.5, dtype: torch.dtype = torch.float32,
    mask: Mask | None = None, compensation: int = 0, poison: bool = True,
) -> Case:  # fmt: skip
    """One problem. shared: all planes share the rows of the plan. The first block of queries reads nothing, the last
    one everything; with poison, the last block of keys is never read and full of NaN."""
    g = torch.Generator().manual_seed(seed)
    (hq, hk), (sq, sk), (d, dv) = heads, tokens, dims
    perm = "none" if shared and perm == "own" else perm
    q, k, v = (
        torch.randn(batch, h, s, w, generator=g).to(dtype) for h, s, w in ((hq, sq, d), (hk, sk, d), (hk, sk, dv))
    )
    blocks = Blocks(order(sq, counts[0], batch * hq, perm, g), order(sk, counts[1], batch * hk, perm, g))
    if poison:
        roles = blocks.k.roles.clone()
        roles[-1] = NEVER
        blocks = Blocks(blocks.q, replace(blocks.k, roles=roles))
    keep = torch.rand(1 if shared else batch * hq, *counts, generator=g) < density
    keep[:, 0], keep[:, -1] = False, True
    keep = blocks.force(keep)
    plan = pack(blocks, keep, (batch, hq, hk), block_m=tile[0], block_n=tile[1], mask=mask)
    poisoned = None
    if poison:
        never = (blocks.k.labels() == counts[1] - 1).expand(batch * hk, -1)
        where = blocks.k.perm
        poisoned = never if where is None else torch.zeros_like(never).scatter_(1, where.expand_as(never), never)
    found = Case(q, k, v, blocks, keep, plan, mask, None, poisoned)
    if not compensation:
        return found
    groups = hq // hk
    stands = approximate_map(blocks, keep, groups=groups, mask=mask).flatten(0, 1)
    arranged = (blocks.k.arrange(x) for x in (k, v))
    tables = centroids(*arranged, blocks.k, stands, second_order=compensation == 2)
    return replace(found, compensation=tables)


def agree(found: Output, problem: Case) -> None:
    """`found` is within twice the twin's own error of the truth, or within the rounding of one operation."""
    truth, twin = problem.truth(), problem.twin()
    assert found.o.dtype == problem.q.dtype and found.lse.dtype == torch.float32
    for name in ("lse", "lse_exact", "o"):
        x, y, z = getattr(found, name), getattr(twin, name), getattr(truth, name)
        assert (x is None) == (z is None), name
        if x is None:
            continue
        assert x.shape == z.shape and not x.isnan().any(), f"{name} holds NaN"
        nothing = z.isinf()
        assert torch.equal(x.isinf(), nothing), f"{name}: other queries read nothing"
        error, own = deviation(x, z), deviation(y, z)
        # Keys and values of 16 bits are exact in both; rounding weights to 16 bits costs as much as rounding o. Squares
        # of queries and variances are float16 in the kernel, float32 in the twin.
        limit = 2 * own + torch.finfo(x.dtype).eps * 4
        if problem.compensation is not None and problem.compensation.variances is not None and x.dtype == torch.float32:
            limit += 2.0**-11 if problem.q.dtype != torch.float32 else 0.0
        assert error <= limit, f"{name}: error {error:.2e}, the twin's {own:.2e}"
    assert (found.o[truth.lse.isinf()] == 0).all()


def deviation(x: Tensor, truth: Tensor) -> float:
    """Largest difference, in units of the largest value; where the truth is infinite nothing is asked."""
    wrong = (x.double() - truth).masked_fill(truth.isinf(), 0.0).abs().max()
    return float(wrong / truth.masked_fill(truth.isinf(), 0.0).abs().max().clamp(min=1.0))
