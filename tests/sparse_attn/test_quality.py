"""Mass, errors and budgets agree with what is counted pair by pair; machines are measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.sparse_attn.density import density, tile_density
from hasten.sparse_attn.layouts.kmeans import KMeans
from hasten.sparse_attn.layouts.layout import Identity
from hasten.sparse_attn.measure.calibrate import DENSITY, measured, scattered
from hasten.sparse_attn.measure.quality import at_tile_density, quality, sampled_error, within
from hasten.sparse_attn.measure.synthetic import heads
from hasten.sparse_attn.measure.trial import Inputs, Method, Trial
from hasten.sparse_attn.reference import dense, reference, token_map
from hasten.sparse_attn.scorers.pooled import Centroid, Pooled
from hasten.sparse_attn.segments import Tokens, text, video
from hasten.sparse_attn.stand_ins.compensate import Compensate
from hasten.sparse_attn.stand_ins.linear_rest import LinearRest

GRID = (3, 7, 9)
KINDS = ("semantic", "temporal", "diffuse")
METHODS = (
    Method("raster", Identity(block=16), Pooled(), None, 32, 16),
    Method("clusters", KMeans(q_size=24, k_size=11), Centroid(), Compensate(order=2), 32, 16),
    Method("linear", KMeans(q_size=24, k_size=11), Centroid(), LinearRest(features=32), 32, 16),
)


def inputs(words: int = 0, groups: int = 1) -> Inputs:
    q, k, v = heads(GRID, 24, KINDS, seed=5)
    if words:
        q, k, v = (torch.cat([x[:, :, :words] * 0.5, x], 2) for x in (q, k, v))
    q = q.repeat_interleave(groups, 1)
    return Inputs(q, k, v, Tokens((text(words), video(*GRID)) if words else (video(*GRID),)))


def truth_of(x: Inputs) -> tuple[Tensor, Tensor]:
    """Dense attention in float64: the weights [Pq, S, S] and the output [Pq, S, D]."""
    groups = x.heads[1] // x.heads[2]
    q, k, v = (y.double() for y in (x.q, x.k.repeat_interleave(groups, 1), x.v.repeat_interleave(groups, 1)))
    weights = (q @ k.mT * x.scale).softmax(-1)
    return weights[0], (weights @ v)[0]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize(("words", "groups"), [(0, 1), (10, 1), (0, 2)])
def test_mass_and_error_are_those_of_the_pairs(method: Method, words: int, groups: int) -> None:
    x = inputs(words, groups)
    trial = Trial(method, x)
    trial.choose(0.3)
    out = trial.attend()
    found = quality(out, dense(x.q, x.k, x.v, x.scale))
    weights, o = truth_of(x)
    read = token_map(trial.blocks, trial.keep, x.heads[1], groups)
    mass = (weights * read).sum(-1)
    assert torch.allclose(found.mass.double(), mass.mean(-1), atol=1e-5)
    error = (out.o[0].double() - o).norm(dim=(-1, -2)) / o.norm(dim=(-1, -2))
    assert torch.allclose(found.output_error.double(), error, rtol=1e-3)
    apart = (out.rho[0].double() - mass).abs().mean(-1)
    assert torch.allclose(found.rho_error.double(), apart, atol=1e-5)


def test_everything_read_is_perfect() -> None:
    x = inputs()
    trial = Trial(METHODS[1], x)
    trial.choose(1.0)
    found = quality(trial.attend(), dense(x.q, x.k, x.v, x.scale))
    assert torch.allclose(found.mass, torch.ones(3), atol=1e-5) and float(found.output_error.max()) < 1e-5
    assert float(found.rho_error.max()) < 1e-5


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_budgets_are_kept(share: float) -> None:
    trial = Trial(METHODS[1], inputs(words=10))
    trial.choose(share)
    # Always-read text is outside the budget; one cluster more or less per row is as near as it gets.
    assert float(density(trial.plan)) == pytest.approx(share, abs=0.12)
    plain = Trial(METHODS[1], inputs())
    plain.choose(share, "tiles")
    least = Trial(METHODS[1], inputs())
    least.choose(1e-6)  # one cluster each, which may already be more tiles than asked for
    assert float(tile_density(plain.plan)) <= max(share, float(tile_density(least.plan))) + 1e-6
    view = trial.look()
    scores = Centroid().start().scores(view)
    one = within(scores, view.blocks, 1e-6)
    selectable = one[:, view.blocks.q.roles == 0][:, :, view.blocks.k.roles == 0]
    assert bool((selectable.sum(-1) == 1).all()), "at least one block"


def test_the_tile_budget_is_used_up() -> None:
    trial = Trial(METHODS[0], inputs())
    view = trial.look()
    scores = Pooled().start().scores(view)

    def tiles(keep: Tensor) -> float:
        return float(keep.float().mean())

    keep = at_tile_density(scores, view.blocks, 0.5, tiles)
    assert 0.35 <= tiles(keep) <= 0.5


def test_sampled_error_is_the_references() -> None:
    x = inputs(words=10, groups=2)
    trial = Trial(METHODS[1], x)
    trial.choose(0.3)
    out = trial.attend(compensated=False)
    whole = reference(x.q, x.k, x.v, trial.blocks, trial.keep, scale=x.scale).o
    out.o[..., 100, :] += 0.1
    every = sampled_error(out, x.q, x.k, x.v, trial.blocks, trial.keep, samples=10_000, scale=x.scale)
    assert every == pytest.approx(float((out.o - whole).abs().max() / whole.abs().max()), rel=1e-4)
    out.o[..., 100, :] -= 0.1
    assert sampled_error(out, x.q, x.k, x.v, trial.blocks, trial.keep, samples=5, scale=x.scale) < 1e-5


def test_machines_are_measured() -> None:
    found = measured(torch.device("cpu"), tokens=192, heads=1, head_dim=16, repeats=1)
    assert found.name == "cpu" and found.source == "measured here"
    assert min(found.dense, found.sparse, found.linear, found.bandwidth, found.overhead) > 0


@pytest.mark.parametrize("tokens", [64, 640, 700])
def test_scattered_plans_have_the_density_asked_for(tokens: int) -> None:
    plan = scattered(torch.zeros(1, 2, tokens, 8), DENSITY)
    assert float(density(plan)) == pytest.approx(min(1.0, max(DENSITY, 128 / tokens)), abs=0.13)
