"""What single parts of sparse attention are worth, on synthetic heads of every kind: mean over six heads and two seeds.

    python benchmarks/attention_parts.py > benchmarks/results/cpu-2core/attention_parts.txt

1. Scorers: a tenth of the tokens is read; the mass that was read, and the relative error of the output with the means of
   the rest in their place (second order) and without.
2. Orders of compensation: the same, blocks chosen by centroids; order 2 with its limit and without.
3. The closed loop: how far the mass that was read is from a target, call by call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.sparse_attn.layouts.kmeans import KMeans
from hasten.sparse_attn.layouts.layout import Identity, Layout
from hasten.sparse_attn.layouts.tiles import Tiles
from hasten.sparse_attn.layouts.tree import Tree
from hasten.sparse_attn.measure.synthetic import HEADS, heads
from hasten.sparse_attn.measure.trial import Inputs, Method, Trial
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.reference import dense
from hasten.sparse_attn.scorers.error_routing import ErrorRouting
from hasten.sparse_attn.scorers.mass import Oracle, block_mass
from hasten.sparse_attn.scorers.pooled import Antidiagonal, Centroid, MeanRows, Pooled
from hasten.sparse_attn.scorers.scorer import Scorer
from hasten.sparse_attn.segments import Tokens, video
from hasten.sparse_attn.selectors.target import TargetRecall
from hasten.sparse_attn.stand_ins.compensate import Compensate

GRID = (8, 14, 16)
LAYOUTS: dict[str, Layout] = {
    "raster": Identity(block=64), "tiles": Tiles(block=64), "tree": Tree(block=64), "k-means": KMeans(q_size=126, k_size=38),
}  # fmt: skip
SCORERS: dict[str, Scorer] = {
    "pooled": Pooled(), "centroid": Centroid(), "centroid, variance": Centroid(variance=True), "mean rows": MeanRows(),
    "antidiagonal 8": Antidiagonal(stride=8), "error": ErrorRouting(), "oracle": Oracle(),
}  # fmt: skip
ORDERS = {"first": Compensate(order=1), "second": Compensate(), "no limit": Compensate(most=1e9)}


def inputs(seed: int) -> Inputs:
    return Inputs(*heads(GRID, 64, seed=seed), Tokens((video(*GRID),)))


def errors(found: Output, truth: Output) -> Tensor:
    """Relative error of each head."""
    apart, whole = ((x.square().sum((0, 2, 3))).sqrt() for x in (found.o.double() - truth.o, truth.o))
    return apart / whole


def tried(layout: Layout, scorer: Scorer, stand_in: Compensate, x: Inputs, truth: Output) -> Tensor:
    """Mass read, error without and with `stand_in`, of each head: [3, H]."""
    trial = Trial(Method("", layout, scorer, stand_in), x)
    view = trial.look()
    trial.select(scorer.start().scores(view), view.blocks, 0.1)
    sizes = view.blocks.q.sizes.expand(len(HEADS), -1)
    mass = ((block_mass(view) * trial.keep).sum(-1) * sizes).sum(-1) / sizes.sum(-1)
    return torch.stack([mass.double(), errors(trial.attend(False), truth), errors(trial.attend(), truth)])


def closed_loop(layout: Layout, x: Inputs, calls: int) -> Tensor:
    """|mass - 0.95| at each call: [calls, H]."""
    trial = Trial(Method("", layout, Centroid(variance=True)), x)
    view = trial.look()
    scores, mass = trial.method.score.start().scores(view), block_mass(view)
    weights = view.blocks.q.sizes / view.blocks.q.sizes.sum(-1, keepdim=True)
    state, far = TargetRecall(target=0.95).start(), []
    for _ in range(calls):
        rho = ((mass * state.keep(scores, view.blocks)).sum(-1) * weights).sum(-1)
        state.observe(rho)
        far.append((rho - 0.95).abs())
    return torch.stack(far)


def main() -> None:
    torch.set_num_threads(1)
    both = [(x, dense(x.q.double(), x.k.double(), x.v.double(), scale=x.scale)) for x in map(inputs, (0, 1))]
    print("scorers at a tenth of the tokens            mass   dropped  means")
    for place, layout in LAYOUTS.items():
        for name, scorer in SCORERS.items():
            row = torch.stack([tried(layout, scorer, Compensate(), x, truth) for x, truth in both]).mean((0, 2))
            print(f"{place:10s} {name:30s} " + "  ".join(f"{value:6.3f}" for value in row.tolist()), flush=True)
    print("\nerror by order of compensation, mean and " + ", ".join(HEADS))
    for place, layout in LAYOUTS.items():
        for name, stand_in in ORDERS.items():
            rows = [tried(layout, Centroid(variance=True), stand_in, x, truth)[2] for x, truth in both]
            head = torch.stack(rows).mean(0)
            print(f"{place:10s} {name:10s} {head.mean():.3f}   " + " ".join(f"{value:.3f}" for value in head.tolist()))
    print("\nclosed loop, target 0.95: distance at calls 1 to 14, and the largest of the last four")
    for place, layout in LAYOUTS.items():
        far = torch.stack([closed_loop(layout, x, 14) for x, _ in both])
        steps = " ".join(f"{value:.3f}" for value in far.mean((0, 2)).tolist())
        print(f"{place:10s} {steps}   {far[:, -4:].max():.3f}")


if __name__ == "__main__":
    main()
