"""Scorers that know the true mass, two scorers in one, routing by error."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.layouts.layout import Identity, Layout
from hasten.sparse_attn.layouts.tree import Tree
from hasten.sparse_attn.mask import Mask, causal
from hasten.sparse_attn.scorers.bands import AShape
from hasten.sparse_attn.scorers.both import Both
from hasten.sparse_attn.scorers.error_routing import ErrorRouting
from hasten.sparse_attn.scorers.mass import CachedMass, Oracle, block_mass
from hasten.sparse_attn.scorers.pooled import Centroid, Pooled
from hasten.sparse_attn.scorers.scorer import Scorer, View
from hasten.sparse_attn.segments import plain
from hasten.sparse_attn.stand_ins.compensate import block_variance
from tests.sparse_attn.random_blocks import normal
from tests.sparse_attn.views import GRID, clustered, true_mass, view_of


@pytest.mark.parametrize("mask", [None, causal(105, 105), Mask(left=20, right=3)])
@pytest.mark.parametrize("layout", [Identity(block=16), Tree(block=16)])
def test_the_oracle_knows_the_true_mass(mask: Mask | None, layout: Layout) -> None:
    view = view_of(17, plain(105, GRID), mask=mask if isinstance(layout, Identity) else None, layout=layout)
    mass = block_mass(view)
    assert torch.allclose(mass.double(), true_mass(view), atol=1e-6)
    assert torch.allclose(mass.sum(-1), torch.ones(8, view.blocks.q.count), atol=1e-5)


def test_the_oracle_works_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(18, plain(105, GRID))
    whole = block_mass(view)
    monkeypatch.setattr("hasten.sparse_attn.scorers.mass.ELEMENTS", 105 * 10)
    assert torch.allclose(block_mass(view), whole, atol=1e-6)


def test_mass_of_a_dense_step_is_remembered() -> None:
    view, later = view_of(19, plain(105, GRID)), view_of(20, plain(105, GRID))
    state = CachedMass().start()
    assert (state.scores(view) == math.inf).all(), "until a dense step was seen, everything is read"
    logits = view.q @ view.k.repeat_interleave(2, 1).mT * view.scale
    state.observe(view, logits.logsumexp(-1))
    assert torch.allclose(state.scores(later), Oracle().start().scores(view), atol=1e-5)
    assert (CachedMass().start().scores(later) == math.inf).all(), "another run knows nothing of it"


def test_other_shapes_are_not_remembered() -> None:
    view, other = view_of(21, plain(105, GRID)), view_of(22, plain(64))
    state = CachedMass().start()
    state.observe(view, (view.q @ view.k.repeat_interleave(2, 1).mT * view.scale).logsumexp(-1))
    assert (state.scores(other) == math.inf).all()


def test_a_sample_of_queries_stands_for_its_block() -> None:
    view = view_of(23, plain(105, GRID))
    lse = (view.q @ view.k.repeat_interleave(2, 1).mT * view.scale).logsumexp(-1)
    assert torch.allclose(block_mass(view, lse, 16)[:, :6], block_mass(view, lse)[:, :6], atol=1e-6)
    rows = torch.tensor([block * 16 + 8 for block in range(6)] + [100])
    one = replace(view, q=view.q[:, :, rows], blocks=replace(view.blocks, q=replace(
        view.blocks.q, bounds=torch.arange(8, dtype=torch.int32)[None], tokens=7)))  # fmt: skip
    assert torch.allclose(block_mass(view, lse, 1), block_mass(one), atol=1e-6)


def test_remembering_blocks_that_move_is_refused() -> None:
    view = view_of(24, plain(105, GRID), layout=Tree(block=16))
    with pytest.raises(UsageError, match="layout"):
        CachedMass().start().scores(view)


# --- two in one, routing by error -------------------------------------------------------------------


def test_two_scorers_join() -> None:
    view = view_of(25, plain(64), heads=(1, 1, 1))
    window, pooled = AShape(sink=0, window=1), Pooled()
    second = pooled.start().scores(view)
    diagonal = torch.eye(4, dtype=torch.bool)[None]

    def joined(how: Any) -> Tensor:
        return Both(first=window, second=pooled, how=how).start().scores(view)

    assert torch.equal(joined("union") == math.inf, diagonal)
    assert torch.equal(joined("union")[~diagonal], second[~diagonal])
    assert torch.equal(joined("within") > -math.inf, diagonal)
    assert torch.equal(joined("within")[diagonal], second[diagonal])
    assert torch.equal(joined("max")[diagonal], second[diagonal].clamp(min=0.0))
    assert torch.equal(joined("max")[~diagonal], second[~diagonal])
    assert torch.allclose(joined("sum")[diagonal].exp(), second[diagonal].exp() + 1)


def test_both_needs_what_its_parts_need() -> None:
    state = Both(first=CachedMass(), second=ErrorRouting()).start()
    assert state.needs_lse and state.needs_values
    assert not Both(first=AShape(), second=Pooled()).start().needs_lse


@pytest.mark.parametrize("order", [1, 2])
def test_routing_prefers_what_the_mean_gets_wrong(order: Any) -> None:
    q = normal(1, 1, 1, 1, 16).expand(-1, -1, 16, -1)
    k, v = normal(2, 1, 1, 3, 1, 16).expand(-1, -1, -1, 16, -1).clone(), normal(3, 1, 1, 3, 16, 16)
    k[:, :, 1:] = k[:, :, :1]
    k[:, :, 1] += normal(4, 16, 16)
    v[:, :, 2] = v[:, :, 2].mean(-2, keepdim=True)
    k, v = k.flatten(2, 3), v.flatten(2, 3)
    blocks = Identity(block=16).start().blocks(q, k, plain(16), plain(48))
    view = View(q, k, blocks, plain(16), plain(48), 0.25, None, v)
    scores = ErrorRouting(order=order).start().scores(view)[0, 0]
    assert scores.argmax() == 1, "spread keys; the others' mean is the truth"
    assert scores.isfinite().all(), "and those may be read all the same"


def test_a_mean_of_equal_values_is_not_wrong() -> None:
    """With the second order only the weights' share in the values' spread is left to be wrong."""
    q, k = normal(1, 1, 1, 16, 16), normal(2, 1, 1, 1, 16, 16).expand(-1, -1, 2, -1, -1).flatten(2, 3)
    v = normal(3, 1, 1, 2, 16, 16)
    v[:, :, 1] = v[:, :, 1].mean(-2, keepdim=True)
    blocks = Identity(block=16).start().blocks(q, k, plain(16), plain(32))
    view = View(q, k, blocks, plain(16), plain(32), 0.25, None, v.flatten(2, 3))
    second, first = (ErrorRouting(order=order).start().scores(view)[0, 0] for order in (2, 1))
    assert second[0] > second[1] + 5
    assert first[0] > first[1] > second[1], "the first order has the mass wrong too"


def test_routing_by_error_beats_routing_by_mass_with_compensation() -> None:
    total = {"error": 0.0, "centroid": 0.0}
    for seed in range(6):
        view = clustered(30 + seed)
        v = normal(seed, 1, 1, 8 * 256, 12)
        view = replace(view, v=v)
        for part in (ErrorRouting(), Centroid(variance=True)):
            total[part.kind] += remaining(view, v, part)
    assert total["error"] < 0.7 * total["centroid"]


def remaining(view: View, v: Tensor, part: Scorer) -> float:
    """Squared error of the output when the best 2 of 8 blocks are exact and the others second-order means."""
    best = part.start().scores(view)[0].topk(2, -1).indices
    q, k = view.q[0, 0].double(), view.k[0, 0].double()
    logits = q @ k.T * view.scale
    truth = logits.softmax(-1) @ v[0, 0].double()
    exact = torch.zeros(8, 8, dtype=torch.bool).scatter_(1, best, True)
    means = k.view(8, 256, -1).mean(1)
    spread = block_variance(view.k, view.blocks.k, means[None].float())[0].double()
    stand_in = q @ means.T * view.scale + math.log(256) + q.square() @ spread.T * view.scale**2 / 2
    rows = exact.repeat_interleave(16, 0)
    both = torch.cat([
        logits.masked_fill(~rows.repeat_interleave(256, 1), -math.inf), stand_in.masked_fill(rows, -math.inf)
    ], 1)  # fmt: skip
    values = torch.cat([v[0, 0].double(), v[0, 0].double().view(8, 256, -1).mean(1)])
    return float((both.softmax(-1) @ values - truth).square().sum())
