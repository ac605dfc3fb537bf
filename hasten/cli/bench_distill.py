"""`hasten bench distill`: teacher, training-free solvers and students on the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.cli.output import JsonOption, Output, hardware, versions

COLUMNS = {
    "who": "who",
    "name": "name",
    "method": "method",
    "weights": "weights",
    "calls": "calls",
    "evaluations": "evaluations",
    "frechet": "Frechet",
    "sliced": "sliced W2",
    "recall": "recall",
    "precision": "precision",
    "accuracy": "accuracy",
    "seconds": "s/sample",
    "training_seconds": "training s",
    "peak_bytes": "peak",
    "note": "note",
}
"""Row key -> heading; see docs/distill-bench.md for what they mean."""

TEXT_COLUMNS = {
    "who": "who",
    "name": "name",
    "recipe": "recipe",
    "evaluations": "evaluations",
    "tokens_per_evaluation": "tokens each",
    "exact_match": "exact",
    "insert": "insert",
    "shuffle": "shuffle",
}


def distill(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A bundled model: of digits, or of texts.")] = "tiny-image",
    student: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Of a training (hasten train). May be repeated. Default: bundled students only."),
    ] = None,
    calls: Annotated[list[int] | None, typer.Option(metavar="K", help="May be repeated. Default: 1, 2, 4, 8.", min=1)] = None,
    teacher: Annotated[
        list[int] | None, typer.Option(metavar="K", help="Steps of the teacher; may be repeated. Default: 50 and 25.", min=1)
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", help="Samples of everybody.", min=8)] = 500,
    solvers: Annotated[bool, typer.Option(help="Training-free solvers by as many steps, too.")] = True,
    quick: Annotated[bool, typer.Option(help="Fewer rows on at most 100 samples: about a minute.")] = False,
    onto: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What --json of an earlier run wrote: its rows stay, and only the others are measured.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Students against their teacher: Frechet distance, variety, prompt accuracy and time, by number of calls; of texts, the
    evaluations that they take and whether they stay right."""
    output = Output("bench distill", json)
    with output.open():
        if _writes_texts(model):
            _texts(output, model, student or [], min(count, 8) if quick else min(count, 32))
            return
        from hasten.distill.bench import table
        from hasten.distill.bench.contest import Contest
        from hasten.distill.bench.earlier import earlier, without
        from hasten.pipelines.students import students_of

        many = min(count, 100) if quick else count
        old = [] if onto is None else earlier(onto, model, many, versions(), hardware()["cpu"])
        had = {(row["who"], row["calls"]) for row in old}
        contest = Contest.of(model, many)
        wanted = calls or ([1, 4] if quick else [1, 2, 4, 8])
        steps = [k for k in teacher or (table.STEPS[:1] if quick else table.STEPS) if (table.TEACHER, k) not in had]
        rows: list[dict[str, Any]] = table.teacher(contest, steps, output.note)
        others = [k for k in wanted if (table.SOLVER, k) not in had] if solvers else []
        rows += table.solvers(contest, others, [True] if quick else [True, False], output.note)
        rows += [table.as_recipe(contest, recipe, output.note) for recipe in students_of(model)]
        for folder in student or []:
            rows += table.student(contest, folder, wanted, output.note)
        rows = without(old, rows) + rows
        for folder in student or []:
            table.tell_card(rows, folder)
        verdicts = [bar.to_dict() | {"verdict": bar.verdict} for bar in table.bars(rows)]
        output.table(rows, COLUMNS)
        output.say("")
        output.table(verdicts, {"bar": "bar", "verdict": "met", "detail": "numbers"})
        output.finish(rows, bars=verdicts, model=model, count=len(contest.prompts))


def _writes_texts(model: str) -> bool:
    from hasten.pipelines import tiny_models

    return model in tiny_models.names() and tiny_models.card(model)["kind"] == "text"


def _texts(output: Output, model: str, students: list[Path], count: int) -> None:
    from hasten.distill.bench import texts

    rows = texts.rows(model, students, count, output.note)
    verdicts = [bar.to_dict() | {"verdict": bar.verdict} for bar in texts.bars(rows)]
    output.table(rows, TEXT_COLUMNS)
    output.table(verdicts, {"bar": "bar", "verdict": "met", "detail": "numbers"})
    output.finish(rows, bars=verdicts, model=model, count=count)
