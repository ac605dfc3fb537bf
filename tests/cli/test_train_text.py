"""`hasten train METHOD` for language models from start to end, and what the last line says of the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.text_pipes import saved

SMALL = ("--max_train_steps", 3, "--train_batch_size", 2, "--rank", 2, "--set", "data.call.max_new_tokens=5")
LINES = "".join(f"w{number} w{2 * number + 1} w{(7 * number) % 90}\n" for number in range(12))


@pytest.mark.parametrize(
    ("method", "words", "found"),
    [
        ("ppd", "several_tokens.py", "prompt_tokens.safetensors"),
        ("first", "fewer_layers.py", "routers.safetensors"),
        ("sorted-exits", "fewer_layers.py", "exits.json"),
        ("block", "hasten_diffusion", "adapter_model.safetensors"),
    ],
)
def test_causal_models(hasten: Any, method: str, words: str, found: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", kind="causal")
    Path("prompts.txt").write_text(LINES)
    more = ("--set", "method.exits=[1]") if method == "sorted-exits" else ()
    given = ("train", method, "--model", model, "--out", "run", "--prompts", "prompts.txt", *SMALL, *more)
    ran = hasten(*given)
    assert ran.code == 0, ran.err
    assert words in ran.out + ran.err and (Path("run") / "student" / found).is_file()
    ran = hasten(*given)
    assert ran.code == 2 and "already holds a training" in ran.sentence


def test_a_filter_is_used_as_the_last_line_says(hasten: Any, tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    Path("prompts.txt").write_text(LINES)
    given = ("--model", model, "--out", "run", "--prompts", "prompts.txt", *SMALL, "--set", "method.false_commits=0.4")
    ran = hasten("train", "learn2pd", *given)
    assert ran.code == 0, ran.err
    use = next(line for line in (ran.out + ran.err).splitlines() if "--recipe" in line).split("--recipe ")[1].strip()
    ran = hasten("generate", model, "--prompt", "w1 w2", "--call", "max_new_tokens=5", "--recipe", use)
    assert ran.code == 0, ran.err


def test_a_model_of_the_other_kind_is_refused_in_words(hasten: Any, tmp_path: Path) -> None:
    ran = hasten("train", "learn2pd", "--model", saved(tmp_path / "model", kind="causal"), "--out", "run")
    assert ran.code == 2 and "write in any order" in ran.sentence
    ran = hasten("train", "sorted-exits", "--model", saved(tmp_path / "other"), "--out", "run")
    assert ran.code == 2 and "from left to right" in ran.sentence
