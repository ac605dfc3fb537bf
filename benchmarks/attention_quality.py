"""What is lost by reading part of the keys: ways of being sparse at equal density and at equal work, beside the oracle.

    python benchmarks/attention_quality.py [--inputs synthetic tiny-video tiny-video-large] [--folder PLACE]

Synthetic heads (`hasten.sparse_attn.measure.synthetic`, two seeds), and queries, keys and values recorded from tiny-video: at
its own size (576 tokens) and at twice each side and twice the frames (4352 tokens, which it was not trained on).
tiny-flux has 32 tokens, which are read in one block.
For each method, density and head: the mass that was read, that of the oracle (the same blocks chosen by their true
mass), the relative error of the output with and without what stands in for the rest, how far rho is from the mass,
the work of whole tiles over that of the pairs, and the time of a plan. Static patterns and recipes of several
patterns run at the density that they have.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hasten.cli.output import Output as Streams
from hasten.errors import HastenError
from hasten.pipelines import tiny_models
from hasten.pipelines.recipes import catalogue
from hasten.sparse_attn.density import cost
from hasten.sparse_attn.layouts.kmeans import KMeans
from hasten.sparse_attn.layouts.layout import Identity
from hasten.sparse_attn.layouts.tiles import Tiles
from hasten.sparse_attn.layouts.tree import Tree
from hasten.sparse_attn.measure.quality import quality
from hasten.sparse_attn.measure.synthetic import CLUSTERED, HEADS, heads
from hasten.sparse_attn.measure.trial import Inputs, Method, Trial
from hasten.sparse_attn.pattern import by_head
from hasten.sparse_attn.plan import Output
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.reference import dense
from hasten.sparse_attn.scorers.error_routing import ErrorRouting
from hasten.sparse_attn.scorers.mass import Oracle
from hasten.sparse_attn.scorers.pooled import Centroid, Pooled
from hasten.sparse_attn.scorers.static import Static
from hasten.sparse_attn.segments import Tokens, video
from hasten.sparse_attn.stand_ins.compensate import Compensate

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2core"
DENSITIES = (0.1, 0.2, 0.3)
GRID = (15, 16, 16)
SEEDS = (0, 1)
PASSES = 10
"""Of k-means: what clusters have had after the first steps of a run (three at the first, two more at each)."""

LARGE = {"height": 64, "width": 64, "num_frames": 33, "num_inference_steps": 10}
RECORDED: dict[str, tuple[str, tuple[float, ...], tuple[int, ...], dict[str, Any]]] = {
    "tiny-video": ("tiny-video", (0.1, 0.4, 0.8), (1, 5, 9), {}),
    "tiny-video-large": ("tiny-video", (0.4,), (5,), LARGE),
}
"""Input -> model, steps (of the conditional branch, by their share of the run), layers, what its call differs in."""

Row = dict[str, Any]


def methods(small: bool) -> list[Method]:
    """The parts in combination. small: blocks for sequences of a few hundred tokens."""
    block, q_size, k_size = (16, 32, 8) if small else (64, 252, 76)
    tile_sizes = {"block_m": 32, "block_n": 16} if small else {}
    equal = {"block_m": block, "block_n": block}  # blocks as large as tiles waste nothing
    clusters, second = KMeans(q_size=q_size, k_size=k_size, first=PASSES), Compensate(order=2)
    apart = clusters.model_copy(update={"outliers": 0.02})
    fine = KMeans(q_size=q_size, k_size=k_size / 2, first=PASSES)
    found = [
        Method("raster blocks, pooled", Identity(block=block), Pooled(), second, **equal),
        Method("3-D tiles, centroid", Tiles(block=block), Centroid(), second, **equal),
        Method("3-D tiles, first order", Tiles(block=block), Centroid(), Compensate(order=1), **equal),
        Method("balanced tree, centroid", Tree(block=block, q_block=2 * block), Centroid(), second),
        Method("k-means, centroid", clusters, Centroid(variance=True), second),
        Method("k-means, first order", clusters, Centroid(variance=True), Compensate(order=1)),
        Method("k-means, key clusters half the size", fine, Centroid(variance=True), second),
        Method("k-means, routed by error", clusters, ErrorRouting(), second),
        Method("k-means, 2 % outliers exact", apart, Centroid(variance=True), second),
    ]
    return [method if method.block_m == block else replace(method, **tile_sizes) for method in found]


def recipes() -> Iterator[tuple[str, SparseAttention]]:
    """Every recipe of the catalogue that sets the attention axis."""
    for entry in catalogue():
        if isinstance(entry.recipe.attention, SparseAttention):
            yield entry.name, entry.recipe.attention


# --- inputs ---------------------------------------------------------------------------------------


def synthetic() -> Iterator[tuple[str, list[str], Inputs]]:
    """All archetypes on one grid, once for each seed."""
    for seed in SEEDS:
        q, k, v = heads(GRID, 64, seed=seed)
        yield f"synthetic, seed {seed}", list(HEADS), Inputs(q, k, v, Tokens((video(*GRID),)))


class Recorder(TorchFunctionMode):
    """Keeps q, k, v of self- and joint attention: calls of `scaled_dot_product_attention` with Sk = Sq."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            q, k, v = (given[name] for name in names)
            if q.shape[-2] == k.shape[-2]:
                self.calls.append((q.detach().clone(), k.detach().clone(), v.detach().clone()))
        return func(*args, **(kwargs or {}))


def recorded(source: str) -> Iterator[tuple[str, list[str], Inputs]]:
    """Attention of a bundled model at some steps and layers of one run of its first prompt."""
    model, shares, layers, other = RECORDED[source]
    pipe, call = tiny_models.load(model), tiny_models.call_defaults(model) | other
    steps = [int(share * call["num_inference_steps"]) for share in shares]
    pipe.set_progress_bar_config(disable=True)
    network, found, count = pipe.transformer, [], 0
    plain = network.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if (count - 1) // 2 not in steps or count % 2 == 0:  # two branches: every other evaluation
            return plain(*args, **kwargs)
        with Recorder() as recorder:
            result = plain(*args, **kwargs)
        latents = kwargs.get("hidden_states", args[0] if args else None)
        found.append(((count - 1) // 2, recorder.calls, tuple(latents.shape[2:])))
        return result

    network.forward = watched
    try:
        pipe(tiny_models.card(model)["prompts"][0], generator=torch.Generator().manual_seed(0), **call)
    finally:
        del network.forward
    for step, calls, grid in found:
        for layer in layers:
            if layer < len(calls):
                q, k, v = (x[:1] for x in calls[layer])
                yield (
                    f"{source}, step {step}",
                    [f"layer {layer}, head {h}" for h in range(q.shape[1])],
                    Inputs(q, k, v, Tokens((video(*grid),))),  # a token of this model is one latent
                )


# --- trials ---------------------------------------------------------------------------------------


def at_budgets(method: Method, inputs: Inputs, truth: Output) -> Iterator[tuple[Row, Trial]]:
    """A method at every density, by tokens and by tiles, with the mass of the oracle, which reads as many tokens."""
    trial = Trial(method, inputs)
    view = trial.look()
    best = Oracle().start().scores(view)
    mine = method.score.start().scores(view)
    for density in DENSITIES:
        for budget in ("tokens", "tiles"):
            trial.select(mine, view.blocks, density, budget)  # type: ignore[arg-type]
            read = cost(trial.plan, inputs.q.shape[-1]).density  # some scorers insist on blocks beyond the budget
            blocks, keep = trial.blocks, trial.keep
            trial.select(best, view.blocks, read)
            ceiling = quality(trial.attend(compensated=False), truth).mass
            trial.use(blocks, keep)
            yield {"budget": budget, "asked": density, "oracle_mass": ceiling}, trial


def plan_seconds(method: Method, inputs: Inputs) -> float:
    """Median time of a plan that goes on from an earlier one."""
    trial, taken = Trial(method, inputs), []
    for _ in range(4):
        began = time.perf_counter()
        trial.choose(0.2)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def as_it_is(name: str, policy: SparseAttention, inputs: Inputs, truth: Output) -> Trial:
    """The selection that a policy makes with its own settings."""
    q, k, v = inputs.q, inputs.k, inputs.v
    states = [pattern.start() for pattern in policy.patterns]
    views = [state.view(q, k, inputs.tokens, inputs.tokens, inputs.scale, None, v) for state in states]
    for state, view in zip(states, views, strict=True):
        if state.score.needs_lse:
            state.score.observe(view, view.blocks.q.arrange(truth.lse[..., None])[..., 0])
    found = [state.choose(view) for state, view in zip(states, views, strict=True)]
    selection = found[0]
    if len(found) > 1:
        choice = policy.chooser.start().choose(q, k, v, found, inputs.scale, None)
        selection = by_head(found, choice, (q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]))
    first = policy.patterns[0]
    method = Method(name, first.layout, first.score, policy.compensate, policy.block_m, policy.block_n)
    trial = Trial(method, inputs)
    trial.use(selection.blocks, selection.keep)
    return trial


def judged(trial: Trial, truth: Output, names: Sequence[str], head: Row) -> list[Row]:
    """One row for each head: with what stands in, and without it as `dropped_error`."""
    spent = cost(trial.plan, trial.inputs.q.shape[-1])
    without = quality(trial.attend(compensated=False), truth)
    with_rest = quality(trial.attend(), truth) if trial.method.compensate is not None else without
    rows = []
    for number, name in enumerate(names):
        row = head | {
            "head": name, "density": spent.density, "tile_density": spent.tile_density,
            "mass": float(with_rest.mass[number]), "output_error": float(with_rest.output_error[number]),
            "dropped_error": float(without.output_error[number]),
        }  # fmt: skip
        if "oracle_mass" in row:
            row["oracle_mass"] = float(row["oracle_mass"][number])
        if trial.method.compensate is not None:
            row |= {"rho": float(with_rest.rho[number]), "rho_error": float(with_rest.rho_error[number])}
        rows.append(row)
    return rows


@torch.no_grad()
def study(name: str, names: Sequence[str], inputs: Inputs, small: bool) -> list[Row]:
    """All methods and recipes on one set of inputs."""
    truth = dense(inputs.q, inputs.k, inputs.v, inputs.scale)
    rows = []
    for method in methods(small):
        head = {"model": name, "recipe": method.name, "planning_seconds": plan_seconds(method, inputs)}
        for facts, trial in at_budgets(method, inputs, truth):
            rows += judged(trial, truth, names, head | facts)
        print(f"{name}: {method.name}", file=sys.stderr, flush=True)
    for recipe, policy in recipes():
        head = {"model": name, "recipe": recipe}
        only = policy.patterns[0]
        try:
            if len(policy.patterns) == 1 and not isinstance(only.score, Static) and not only.score.start().needs_lse:
                method = Method(recipe, only.layout, only.score, policy.compensate, policy.block_m, policy.block_n)
                head["planning_seconds"] = plan_seconds(method, inputs)
                for facts, trial in at_budgets(method, inputs, truth):
                    rows += judged(trial, truth, names, head | facts)
            trial = as_it_is(recipe, policy, inputs, truth)
            rows += judged(trial, truth, names, head | {"budget": "own"})
        except HastenError as error:
            rows.append(head | {"note": str(error)})
        print(f"{name}: {recipe}", file=sys.stderr, flush=True)
    return rows


def sharpness() -> list[Row]:
    """The same clustered heads from flat to sharp: k-means at 10 %, means over heads and seeds."""
    rows = []
    for sharp in (4.0, 6.0, 8.0, 10.0, 14.0, 20.0):
        kinds = {name: replace(HEADS[name], sharpness=sharp) for name in CLUSTERED}
        found = []
        for seed in SEEDS:
            q, k, v = heads(GRID, 64, kinds, seed=seed)
            method = Method("", KMeans(first=PASSES), Centroid(variance=True), Compensate(order=2))
            trial = Trial(method, Inputs(q, k, v, Tokens((video(*GRID),))))
            trial.choose(0.1)
            found += judged(trial, dense(q, k, v, trial.inputs.scale), CLUSTERED, {})
        means = {
            key: statistics.mean(row[key] for row in found)
            for key in ("mass", "dropped_error", "output_error", "rho_error")
        }
        rows.append({"sharpness": sharp} | means | {"ratio": means["output_error"] / means["dropped_error"]})
    return rows


def bars(rows: Sequence[Row]) -> list[Row]:
    """The three questions of the study, answered on synthetic heads at equal density."""
    measured = [row for row in rows if row["model"].startswith("synthetic") and row.get("budget") == "tokens"]

    def chosen(recipe: str, density: float, kinds: Sequence[str]) -> list[Row]:
        return [r for r in measured if r["recipe"] == recipe and r["asked"] == density and r["head"] in kinds]

    sharp = chosen("k-means, centroid", 0.1, CLUSTERED)
    ratio = sum(row["output_error"] for row in sharp) / sum(row["dropped_error"] for row in sharp)
    worst = max(row["output_error"] / row["dropped_error"] for row in sharp)
    rho = max(row["rho_error"] for row in sharp)
    svg2 = chosen("svg2", 0.2, tuple(HEADS)) or chosen("k-means, centroid", 0.2, tuple(HEADS))
    share = min(row["mass"] / row["oracle_mass"] for row in svg2)
    return [
        {"bar": "k-means and compensation at 10 %: at most a tenth of the drop-only error on clustered heads",
         "met": ratio <= 0.1,
         "detail": f"{ratio:.3f} over heads and seeds; {worst:.3f} on the one where it helps least"},
        {"bar": "rho within 0.01 of the truth there", "met": rho <= 0.01, "detail": f"largest mean distance {rho:.4f}"},
        {"bar": "SVG2 at 20 %: at least 95 % of the oracle's mass", "met": share >= 0.95,
         "detail": f"least share {share:.3f} over all heads"},
    ]  # fmt: skip


def averaged(rows: Sequence[Row], by: str | None = None) -> list[Row]:
    """One line per model, method, budget and density (and head, with by="head"): means over seeds, steps, heads."""
    keys = (
        "density",
        "tile_density",
        "mass",
        "oracle_mass",
        "output_error",
        "dropped_error",
        "rho",
        "rho_error",
        "planning_seconds",
    )
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "note" not in row:
            name = row["model"].partition(",")[0]
            groups.setdefault((name, row["recipe"], row["budget"], row.get("asked"), row.get(by or "")), []).append(row)
    lines = []
    for (model, recipe, budget, asked, head), group in groups.items():
        line = {"model": model, "recipe": recipe, "budget": budget, "asked": asked, "n": len(group)}
        line |= {by: head} if by else {}
        for key in keys:
            values = [row[key] for row in group if row.get(key) is not None]
            if values:
                line[key] = statistics.mean(values)
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["synthetic", *RECORDED]
    parser.add_argument("--inputs", nargs="+", default=known, choices=known)
    parser.add_argument("--folder", default=RESULTS, type=Path, help="gets one attention-quality-INPUT.json each")
    parser.add_argument("--jobs", default=1, type=int, help="processes that share the seeds, or steps and layers")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # forks beside other threads hang
    for source in arguments.inputs:
        answer(source, arguments.folder / f"attention-quality-{source}.json", arguments.jobs)


def answer(source: str, file: Path, jobs: int) -> None:
    """Study one input, print the means, write every row."""
    streams = Streams("attention quality", str(file))
    with streams.open(), torch.no_grad():
        given = list(synthetic() if source == "synthetic" else recorded(source))
        calls = [(name, names, inputs, source == "tiny-video") for name, names, inputs in given]
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            rows = [row for part in pool.starmap(study, calls, chunksize=1) for row in part]
        shown = averaged(rows)
        streams.table(shown, {key: key.replace("_", " ") for key in shown[0]} | {"rho_error": "rho error"})
        answers, sweep = (bars(rows), sharpness()) if source == "synthetic" else ([], [])
        if answers:
            streams.table(sweep, {key: key.replace("_", " ") for key in sweep[0]})
            streams.table(answers, {"bar": "bar", "met": "met", "detail": "numbers"})
        kept = averaged(rows, "head") + [row for row in rows if "note" in row]
        streams.finish([_short(row) for row in kept], bars=answers, sharpness=[_short(row) for row in sweep])


def _short(row: Row) -> Row:
    """Five digits are more than mean anything, and there are thousands of rows."""
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}


if __name__ == "__main__":
    main()
