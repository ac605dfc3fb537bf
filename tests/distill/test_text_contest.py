"""Text students against their teachers: what is counted, and the bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.distill.bench.texts import bars, evaluations, rows
from hasten.distill.text.roles import Texts
from hasten.errors import UsageError


def test_accepted_drafts_save_evaluations() -> None:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    texts = Texts(ids, torch.tensor([2, 3]), torch.tensor([8, 6]))
    none = torch.zeros(2, 8, dtype=torch.int64)
    assert evaluations(none, texts) == (9, 9)
    drafts = none.clone()
    drafts[0, 2], drafts[0, 5], drafts[1, 3] = 2, 1, 5  # 2-4, 5-6, 7 | 3-5, whatever is drafted behind the end
    assert evaluations(drafts, texts) == (9, 4)


def test_a_teacher_alone_and_what_is_no_student(tmp_path: Path) -> None:
    (alone,) = rows("tiny-lm", [], 1, lambda text: None)
    assert alone["tokens_per_evaluation"] == 1.0 and alone["evaluations"] > 2
    with pytest.raises(UsageError, match="holds no student that drafts"):
        rows("tiny-lm", [tmp_path], 1, lambda text: None)
    with pytest.raises(UsageError, match="holds no adapter"):
        rows("tiny-dllm", [tmp_path], 1, lambda text: None)


def row(who: str, evaluations: float, right: float, recipe: str = "r") -> dict[str, Any]:
    return {"who": who, "name": who, "recipe": recipe, "evaluations": evaluations, "exact_match": right}


def test_half_the_evaluations_by_the_best_thresholds_that_keep_the_answers() -> None:
    teacher = [row("teacher", 16.0, 1.0, "sequential"), row("teacher", 2.6, 1.0), row("teacher", 1.0, 0.5)]
    (bar,) = bars([*teacher, row("student", 1.3, 0.99), row("student", 0.9, 0.98)])
    assert bar.met and "2.00x fewer" in bar.detail and "12.3x fewer than one token" in bar.detail
    (bar,) = bars([*teacher, row("student", 1.31, 1.0)])
    assert not bar.met
    (bar,) = bars([*teacher, row("student", 1.0, 0.9)])
    assert not bar.met and "no threshold" in bar.detail
    assert bars(teacher) == []
