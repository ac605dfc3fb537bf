"""Speed and similarity of recipes against the plain run, with the controls, the oracle and the peers beside them.

All runs share one process, one set of weights and, per sample, one initial noise. A sample is a prompt and a
seed; every candidate runs on every sample right after the plain run on it, so that speed-ups are ratios of
neighbours and drift of the machine cancels.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hasten.caching.network import NetworkReuse
from hasten.pipelines.accelerate import accelerate
from hasten.pipelines.bench.candidates import Candidate, fewer_steps, ours
from hasten.pipelines.bench.oracle import Recording, as_rule, record, search
from hasten.pipelines.bench.peers import few as few_peers
from hasten.pipelines.bench.shots import Column, Sample, other_seed, row_of, shoot
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.recipe import Recipe

Tell = Callable[[str], None]


def bench_recipes(
    pipe: Any,
    call: dict[str, Any],
    samples: Sequence[Sample],
    recipes: Sequence[str] | Mapping[str, Recipe] = ("balanced", "fast:student=false"),
    *,
    model: str = "",
    converged_steps: int = 200,
    with_oracle: bool = True,
    with_peers: bool = True,
    tell: Tell = lambda _: None,
) -> list[dict[str, Any]]:
    """Rows with the keys of the design: the plain run, `recipes`, both controls, the oracle and the peers.

    recipes: names, or recipes by the names they have in the table. converged_steps: plain steps of the run that stands
    for the exact solution, which every row's distance to is given.
    That run, the oracle and the peers are made for one seed per prompt (`n`, `n_converged` say so), the rest for all.
    """
    samples = sorted(samples, key=lambda sample: sample.seed)
    few = samples[: len({sample.prompt for sample in samples})]
    chosen = dict(recipes) if isinstance(recipes, Mapping) else {name: find_recipe(name) for name in recipes}
    candidates = [ours(name, recipe) for name, recipe in chosen.items()]
    tell("warm-up")
    warm = {**call, "num_inference_steps": min(6, call["num_inference_steps"])}
    shoot(pipe, samples[0], warm, ours("plain", "plain"))
    branches = _branches(pipe, call)
    budgets = sorted({round((shoot(pipe, samples[0], call, c).nfe or 0) / branches) for c in candidates[:2]})
    candidates += [fewer_steps(solver, steps) for steps in budgets for solver in ("euler", "unipc", "dpm++")]
    plain, columns = Column(ours("plain", "plain")), [Column(candidate) for candidate in candidates]
    plain.nfe = branches * call["num_inference_steps"]
    recordings = _main_phase(pipe, call, samples, plain, columns, tell)
    if with_oracle:
        columns += _oracle_phase(pipe, call, few, recordings, chosen, plain, tell)
    if with_peers:
        columns += _peer_phase(pipe, call, few, tell)
    exact = []
    for number, sample in enumerate(few):
        tell(f"converged run {number + 1}")
        exact.append(shoot(pipe, sample, {**call, "num_inference_steps": converged_steps}).frames)
    rows = [row_of(model, plain, plain, samples, exact), other_seed(model, plain, samples)]
    return rows + [row_of(model, column, plain, samples, exact) for column in columns]


def _branches(pipe: Any, call: dict[str, Any]) -> int:
    """Evaluations per step of the plain run."""
    with accelerate(pipe, "plain") as run:
        shoot(pipe, Sample("a", 0), {**call, "num_inference_steps": 2})
    evaluations: float = run.report().nfe
    return max(1, round(evaluations / 2))


def _main_phase(
    pipe: Any,
    call: dict[str, Any],
    samples: Sequence[Sample],
    plain: Column,
    columns: list[Column],
    tell: Tell,
) -> list[Recording]:
    recordings: list[Recording] = []
    for number, sample in enumerate(samples):
        tell(f"sample {number + 1} of {len(samples)}: {sample.prompt}, seed {sample.seed}")
        with record(pipe.scheduler) as recorded:
            plain.shots.append(shoot(pipe, sample, call))
        recordings += recorded
        plain.plain_seconds.append(plain.shots[-1].seconds)
        for column in columns:
            column.shots.append(shoot(pipe, sample, call, column.candidate))
            column.plain_seconds.append(plain.shots[-1].seconds)
    return recordings


def _oracle_phase(
    pipe: Any,
    call: dict[str, Any],
    samples: Sequence[Sample],
    recordings: list[Recording],
    chosen: dict[str, Recipe],
    plain: Column,
    tell: Tell,
) -> list[Column]:
    """For each schedule-based recipe: the best schedule per sample, found on that sample's own recorded run."""
    columns = []
    for name, recipe in chosen.items():
        policy = recipe.reuse
        if not isinstance(policy, NetworkReuse) or not hasattr(policy.rule, "computed"):
            continue
        tell(f"oracle of {name}")
        computed = policy.rule.computed(call["num_inference_steps"], recordings[0].times)
        column = Column(Candidate(f"{name}, oracle schedule", lambda _: None, "oracle"))  # type: ignore[arg-type,return-value]
        for sample, recording, shot in zip(samples, recordings, plain.shots, strict=False):
            best = search(policy, [recording], len(computed), starts=1, rounds=2)
            rule = as_rule(best, len(recording.times))
            own = Recipe(name=name, reuse=policy.model_copy(update={"rule": rule}))
            column.shots.append(shoot(pipe, sample, call, ours(name, own)))
            column.plain_seconds.append(shot.seconds)
        columns.append(column)
    return columns


def _peer_phase(pipe: Any, call: dict[str, Any], samples: Sequence[Sample], tell: Tell) -> list[Column]:
    """Other libraries, each enabled once and disabled again; plain runs are timed again beside them."""
    columns = [Column(candidate) for candidate in few_peers()]
    again = statistics.median(shoot(pipe, sample, call).seconds for sample in samples[:5])
    for column in columns:
        tell(column.candidate.recipe)
        shoot(pipe, samples[0], {**call, "num_inference_steps": 6}, column.candidate)
        for sample in samples:
            column.shots.append(shoot(pipe, sample, call, column.candidate))
            column.plain_seconds.append(again)
    return columns
