"""Text students against their teachers: evaluations of the network per text, and whether the texts stay right.

Masked language models write the list tasks' answers by thresholds, teacher and student alike. Causal models write their own
greedy answers, and what a student drafts counts where it is what the model itself wrote: the text is the same by
construction, so that tokens per evaluation are all there is to measure.

Shapes: B texts of up to L tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.distill.bench.drafts import drafted
from hasten.distill.text.roles import Texts
from hasten.distill.text.teach import make_texts
from hasten.errors import UsageError
from hasten.pipelines.bench import dllm
from hasten.pipelines.bench.bars import Bar
from hasten.pipelines.recipes import recipe
from hasten.pipelines.text_models.families import choose
from hasten.pipelines.text_models.loading import open_text

Row = dict[str, Any]
Told = Callable[[str], None]

ABOVE = (0.9, 0.8, 0.7)
"""Thresholds that are tried, for teacher and student."""

SEED = 77
HALF, POINTS_LOST = 2.0, 0.01


def rows(model: str, students: Sequence[Path], count: int, told: Told) -> list[Row]:
    """Rows of a bundled text model, `count` questions of each list task."""
    network, tokenizer = open_text(model, None, None, None)
    if choose(network, tokenizer).facts.block == 1:  # block after block of one token: causal
        return _drafting(model, students, count, told)
    return _masked(model, students, count, told)


def _student(folder: Path) -> Path:
    """The student of a training's folder; a student's folder itself stays what it is."""
    return folder / "student" if (folder / "student").is_dir() else folder


def opened(model: str, student: Path | None) -> dllm.Bench:
    """A masked language model, with the student's adapter merged into it."""
    from peft import PeftModel

    network, tokenizer = open_text(model, None, None, None)
    if student is not None:
        if not (student / "adapter_config.json").is_file():
            raise UsageError(f"'{student}' holds no adapter of a text diffusion model. Name the folder of a training, or its student/.")
        network = PeftModel.from_pretrained(network, str(student)).merge_and_unload().eval()
    return dllm.Bench(choose(network, tokenizer), tokenizer)


def measured(bench: dllm.Bench, work: dllm.Workload, name: str) -> Row:
    """Evaluations and right answers of one recipe, over all and by task (evaluations / share right)."""
    done = bench.generate(recipe(name), work)
    row: Row = {"recipe": name, "evaluations": statistics.mean(done.nfe)}
    if work.right is None:
        return row
    right = [check(bench.answer(text)) for check, text in zip(work.right, done.texts, strict=True)]
    row["exact_match"] = statistics.mean(right)
    for kind in dict.fromkeys(work.kinds):
        mine = [i for i, its in enumerate(work.kinds) if its == kind]
        row[kind] = [round(statistics.mean(one[i] for i in mine), 3) for one in (done.nfe, right)]
    return row


def _masked(model: str, students: Sequence[Path], count: int, told: Told) -> list[Row]:
    found: list[Row] = []
    for folder in (None, *students):
        bench = opened(model, _student(folder) if folder else None)
        work = dllm.lists(bench.tokenizer, count, seed=SEED)
        ways = [f"dparallel:above={above}" for above in ABOVE]
        for name in ways if folder else ["sequential", *ways]:
            told(f"{folder.name if folder else 'teacher'}, {name}")
            label = {"who": "student" if folder else "teacher", "name": folder.name if folder else "teacher"}
            found.append(label | measured(bench, work, name))
    return found


@torch.no_grad()
def _drafting(model: str, students: Sequence[Path], count: int, told: Told) -> list[Row]:
    network, tokenizer = open_text(model, None, None, None)
    host = choose(network, tokenizer)
    work = dllm.lists(tokenizer, count, seed=SEED)
    made = make_texts(host, tokenizer, work.prompts, work.new, recipe("sequential"))
    whole = Texts(**made.conditions.tensors)
    texts = Texts(whole.ids, whole.start, whole.over(host.facts.eos_ids))
    tokens, _ = evaluations(torch.zeros_like(texts.ids), texts)
    found: list[Row] = [{"who": "teacher", "name": "one token at a time", "tokens_per_evaluation": 1.0, "evaluations": tokens / len(texts.ids)}]
    for folder in students:
        told(folder.name)
        fresh, _ = open_text(model, None, None, None)
        _, steps = evaluations(drafted(_student(folder), fresh, texts), texts)
        found.append({
            "who": "student", "name": folder.name, "tokens_per_evaluation": tokens / steps,
            "evaluations": steps / len(texts.ids),
        })  # fmt: skip
    return found


def evaluations(drafts: Tensor, texts: Texts) -> tuple[int, int]:
    """Tokens of all texts, and the evaluations that writing them takes: each gives one token and its accepted drafts."""
    tokens = steps = 0
    for row, start, end in zip(drafts.tolist(), texts.start.tolist(), texts.end.tolist(), strict=True):
        place = start
        while place < end:
            place += 1 + row[place]
            steps += 1
        tokens += end - start
    return tokens, steps


def bars(found: Sequence[Row]) -> list[Bar]:
    """Whether a student halves its teacher's evaluations, both by the best threshold that keeps the answers."""
    name = f"half of the teacher's evaluations at exact match within {POINTS_LOST:.0%}"
    scored = [row for row in found if "exact_match" in row]
    plain = next((row for row in scored if row["who"] == "teacher"), None)
    own = [row for row in scored if row["who"] == "student"]
    if plain is None or not own:
        return []
    good = [row for row in scored if row["exact_match"] >= plain["exact_match"] - POINTS_LOST]
    teacher, student = (
        min((row for row in good if row["who"] == who), key=lambda row: float(row["evaluations"]), default=None)
        for who in ("teacher", "student")
    )
    if student is None or teacher is None:
        return [Bar(name, False, "no threshold of the student keeps the answers")]
    factor = teacher["evaluations"] / student["evaluations"]
    said = (
        f"{factor:.2f}x fewer: {student['name']} {student['evaluations']:.2f} ({student['recipe']}, {student['exact_match']:.1%}),"
        f" teacher {teacher['evaluations']:.2f} ({teacher['recipe']}, {teacher['exact_match']:.1%});"
        f" {plain['evaluations'] / student['evaluations']:.1f}x fewer than one token at a time"
    )
    return [Bar(name, factor >= HALF, said)]


