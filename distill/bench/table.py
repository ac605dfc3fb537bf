"""The rows of `hasten bench distill`, and which of its bars they meet.

Shapes: none of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hasten.atomic import atomic_write
from hasten.distill.bench.contest import Contest, Made
from hasten.distill.export.card import measured
from hasten.distill.loop import cost
from hasten.distill.network.chunks import Chunks
from hasten.distill.trained import Trained, open_trained
from hasten.errors import UsageError
from hasten.pipelines.bench.bars import Bar
from hasten.recipe import Recipe
from hasten.samplers.few_calls import FewCalls

Row = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]
Told = Callable[[str], None]

TEACHER, SOLVER, STUDENT, RECIPE = "teacher", "solver", "student", "recipe"
"""Who a row is about: the teacher by its usual steps; its pipeline by a solver of diffusers; a training's student; the same as
a recipe."""

GIVEN = ", first frame given"
"""Behind the name of a student that makes a clip of a picture."""

NEAR_1, NEAR_4 = 1.15, 1.1
RECALL_LOST, ACCURACY_LOST = 0.05, 0.02
LORA_OF_FULL = 1.15
FULL_STEPS = 50
STEPS = (FULL_STEPS, FULL_STEPS // 2)


def teacher(contest: Contest, counts: Iterable[int], told: Told) -> list[Row]:
    """The teacher with guidance, by its own solver's steps."""
    rows = []
    for steps in counts:
        told(f"teacher, {steps} steps")
        rows.append(_row(contest, contest.teacher(steps), TEACHER, "its own solver", calls=steps))
    return rows


def solvers(contest: Contest, calls: Iterable[int], guidance: Sequence[bool], told: Told) -> list[Row]:
    """Training-free sampling by as many steps as students have calls: with guidance, which evaluates the network twice
    a step, and without. A solver that cannot make so few steps is a row with the reason."""
    rows = []
    for steps in calls:
        for name in contest.solvers():
            for guided in guidance:
                told(f"{name}, {steps} steps")
                label = f"{name}{'' if guided else ', no guidance'}"
                try:
                    made = contest.solver(name, steps, guided)
                except (ValueError, IndexError, ZeroDivisionError) as error:  # diffusers' own, for one or two steps
                    rows.append({"who": SOLVER, "name": label, "calls": steps, "note": f"refused by diffusers: {error}"})
                    continue
                rows.append(_row(contest, made, SOLVER, label, calls=steps))
    return rows


def student(contest: Contest, folder: Path, calls: Iterable[int], told: Told) -> list[Row]:
    """A training's student by each number of calls."""
    trained = open_trained(folder)
    if trained.config.model != contest.model:
        raise UsageError(f"'{folder}' is a student of {trained.config.model}, and {contest.model} is measured.")
    if isinstance(trained.student, Chunks):
        return _in_chunks(contest, trained, trained.student, folder, told)
    rows = []
    for count in calls:
        told(f"{folder.name}, {count} calls")
        rows.append(_row(contest, contest.student(trained, count), STUDENT, folder.name, calls=count) | _facts(trained, folder))
    return rows


def _in_chunks(contest: Contest, trained: Trained, who: Chunks, folder: Path, told: Told) -> list[Row]:
    """A student in chunks by the calls of each chunk that it was trained for, as its keys and values are those of these calls;
    and once more on the teacher's first frames, where it was trained to make a clip of a picture."""
    spans, calls = who.spans(contest.z.shape[2]), len(who.steps.angles)
    facts = _facts(trained, folder) | _chunks(spans)
    told(f"{folder.name}, {facts['note']} ({calls})")
    rows = [_row(contest, contest.chunks(who), STUDENT, folder.name, calls) | facts]
    if getattr(trained.config.method, "given", 0) > 0:
        steps = max(contest.teachers, default=FULL_STEPS)
        given = contest.teacher(steps).x0[:, :, : spans[0][1]]
        told(f"{folder.name}{GIVEN}")
        row = _row(contest, contest.chunks(who, given), STUDENT, f"{folder.name}{GIVEN}", calls)
        rows.append(row | facts | {"note": f"{facts['note']}; the first is the teacher's of {steps} steps"})
    return rows


def _chunks(spans: Sequence[tuple[int, int]]) -> Row:
    sizes = [end - begin for begin, end in spans]
    return {"chunks": sizes, "note": f"chunks of {' + '.join(map(str, sizes))} latent frames, calls of each"}


CARD = {"name": "who", "calls": "calls", "evaluations": "evaluations", "frechet": "Frechet", "recall": "recall", "precision": "precision",
        "accuracy": "prompt accuracy", "seconds": "CPU s each"}  # fmt: skip
"""Key of a row -> heading in a model card."""


def in_card(rows: Rows, folder: Path) -> list[Row]:
    """The rows of a student's card: the teacher, and this student by what it was trained for and otherwise."""
    kept = [row for row in rows if row["who"] == TEACHER or (row["who"] == STUDENT and row["name"] in (folder.name, f"{folder.name}{GIVEN}"))]
    named = [
        {**row, "name": f"teacher, {row['calls']} steps" if row["who"] == TEACHER else row["name"].replace(folder.name, "student", 1)}
        for row in kept
    ]
    return [{heading: row[key] for key, heading in CARD.items()} for row in named]


def tell_card(rows: Rows, folder: Path) -> None:
    """Put the measured table into the card of a training's student, where it has one."""
    card = folder / "student" / "README.md"
    if card.is_file():
        atomic_write(card, measured(card.read_text(encoding="utf-8"), in_card(rows, folder)))


def as_recipe(contest: Contest, recipe: Recipe, told: Told) -> Row:
    """A student as its users have it."""
    told(recipe.name)
    made, chunks = contest.recipe(recipe), contest.chunks_of(recipe)
    assert isinstance(recipe.sampler, FewCalls)  # as the contest has checked
    return _row(contest, made, RECIPE, recipe.name, calls=recipe.sampler.calls) | ({} if chunks is None else _chunks(chunks))


def _row(contest: Contest, made: Made, who: str, name: str, calls: int) -> Row:
    return {"who": who, "name": name, "calls": calls, "count": len(made.x0)} | contest.row(made)


def _facts(trained: Trained, folder: Path) -> Row:
    """What was trained, and what it has cost with the data it was given."""
    config, steps = trained.config, trained.steps
    spent = cost.read(folder)
    data = cost.read(Path(config.data.file).parent) if config.data.file else spent
    log = (folder / "log.jsonl").read_text().splitlines()
    return {
        "method": config.method.kind, "weights": "all" if config.student.full else f"rank {config.student.rank}",
        "how": steps.how if steps is not None else "ode", "trained_for": len(steps.angles) if steps is not None else None,
        "steps": json.loads(log[-1])["step"] + 1, "batch": config.train.batch, "lr": config.train.lr,
        "begins_with": Path(config.student.start).name if config.student.start else None,
        "training_seconds": spent.get("training_seconds"), "data_seconds": data.get("data_seconds"),
        "peak_bytes": spent.get("peak_bytes"),
    }  # fmt: skip


def bars(rows: Rows) -> list[Bar]:
    """The bars, on the rows of one model."""
    return [near(rows, 1, NEAR_1), near(rows, 4, NEAR_4), ahead(rows, 1), ahead(rows, 4), ahead(rows, 4, "evaluations"), lora(rows)]


def near(rows: Rows, calls: int, factor: float) -> Bar:
    """Whether the best student of so many calls is near the teacher in all three measures."""
    name = f"best {calls}-call student within {factor}x of the teacher's Frechet distance, recall within {RECALL_LOST}, accuracy {ACCURACY_LOST}"
    full, own = _teacher(rows), _students(rows, calls)
    if full is None or not own:
        return Bar(name, None, "no row")
    best = min(own, key=lambda row: (not _keeps(row, full), row["frechet"]))
    ratio = best["frechet"] / full["frechet"]
    said = (
        f"{best['name']}: {ratio:.2f}x ({best['frechet']:.1f} of {full['frechet']:.1f}), recall {best['recall']:.3f} of"
        f" {full['recall']:.3f}, accuracy {best['accuracy']:.3f} of {full['accuracy']:.3f}"
    )
    return Bar(name, ratio <= factor and _keeps(best, full), said)


def ahead(rows: Rows, calls: int, of: Literal["calls", "evaluations"] = "calls") -> Bar:
    """Whether it is far ahead of the best solver: less than half of its Frechet distance. of: what both have as many of; a
    guided step of a solver is one call of theirs and two evaluations of the network."""
    name = f"{calls} calls: less than half of the Frechet distance of the best solver by as many {'steps' if of == 'calls' else of}"
    own = _students(rows, calls)
    plain = [row for row in rows if row["who"] == SOLVER and row.get(of) == calls and "frechet" in row]
    if not own or not plain:
        return Bar(name, None, "no row")
    best, other = (min(each, key=lambda row: row["frechet"]) for each in (own, plain))
    said = f"{best['name']} {best['frechet']:.1f}, {other['name']} {other['frechet']:.1f}"
    return Bar(name, best["frechet"] < other["frechet"] / 2, said)


def lora(rows: Rows) -> Bar:
    """The same method at the same calls, as an adapter and as a whole network."""
    name = f"an adapter within {LORA_OF_FULL}x of training all weights"
    whole = {(row["method"], row["calls"]): row for row in rows if row.get("weights") == "all" and row["calls"] == row["trained_for"]}
    pairs = [
        (row, whole[key])
        for row in rows
        if row.get("weights", "all") != "all" and (key := (row["method"], row["calls"])) in whole and row["calls"] == row["trained_for"]
    ]
    if not pairs:
        return Bar(name, None, "no method was trained both ways")
    told = [f"{a['name']} {a['frechet']:.1f}, {b['name']} {b['frechet']:.1f}: {a['frechet'] / b['frechet']:.2f}x" for a, b in pairs]
    return Bar(name, all(a["frechet"] <= LORA_OF_FULL * b["frechet"] for a, b in pairs), "; ".join(told))


def _teacher(rows: Rows) -> Mapping[str, Any] | None:
    return next((row for row in rows if row["who"] == TEACHER and row["calls"] == FULL_STEPS), None)


def _students(rows: Rows, calls: int) -> list[Mapping[str, Any]]:
    """Without those in chunks: their calls are of a chunk, and they take more evaluations."""
    return [row for row in rows if row["who"] in (STUDENT, RECIPE) and row["calls"] == calls and "chunks" not in row]


def _keeps(row: Mapping[str, Any], full: Mapping[str, Any]) -> bool:
    return bool(row["recall"] >= full["recall"] - RECALL_LOST and row["accuracy"] >= full["accuracy"] - ACCURACY_LOST)
