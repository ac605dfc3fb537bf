"""`hasten generate` with language models: texts on the terminal, in files and as JSON; clear words for what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.text_pipes import model, pipe, saved

PROMPT = ("--prompt", "w1 w2 w3", "--call", "max_new_tokens=6", "--device", "cpu")
RECIPE = """version: 1
name: fast
kv: {kind: dual}
commit: {kind: unmask, rule: {kind: threshold, above: 0.2}}
blocks: {kind: in-blocks, rule: {kind: fixed, size: 4}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder with a small masked language model."""
    made: Path = saved(tmp_path_factory.mktemp("models"))
    return made


def test_the_text_goes_to_the_terminal(hasten: Any, folder: Path) -> None:
    ran = hasten("generate", folder, *PROMPT)
    assert ran.code == 0, ran.err
    right = pipe().generate(prompts="w1 w2 w3", max_new_tokens=6).texts
    assert right is not None
    assert ran.out.strip() == right[0]
    assert "1.00 each" in ran.err


def test_a_recipe_file_and_json(hasten: Any, folder: Path) -> None:
    Path("fast.yaml").write_text(RECIPE)
    ran = hasten("generate", folder, *PROMPT, "--recipe", "fast.yaml", "--report", "r.html", "--json", "-")
    assert ran.code == 0, ran.err
    [row] = ran.json["rows"]
    assert row["tokens"] == 6
    assert row["of_sequential"] < 1
    assert row["tokens_per_forward"] == pytest.approx(row["tokens"] / row["nfe"])
    assert row["text"]
    assert "fast" in Path("r.html").read_text()


def test_set_changes_the_recipe(hasten: Any, folder: Path) -> None:
    Path("fast.yaml").write_text(RECIPE)
    args = ("generate", folder, *PROMPT, "--recipe", "fast.yaml", "--json", "-")
    fewer = hasten(*args, "--set", "commit.rule.above=0.01").json["rows"][0]["nfe"]
    assert fewer < hasten(*args).json["rows"][0]["nfe"]
    assert hasten(*args[:-4], "--set", "commit.rule.above=0.01").code == 2


def test_several_prompts_into_a_file(hasten: Any, folder: Path) -> None:
    Path("prompts.txt").write_text('w1 w2\n{"prompt": "w3", "seed": 4}\n' + "w5\n" * 8)
    args = ("generate", folder, "--prompts", "prompts.txt", "--call", "max_new_tokens=3", "--call", "do_sample=true", "--device", "cpu")
    ran = hasten(*args, "--output", "out/texts.jsonl")
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in Path("out/texts.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(10))
    assert rows[1]["seed"] == 4
    assert len({row["text"] for row in rows[2:]}) == 1, "one seed, one text"
    assert hasten(*args, "--output", "texts.txt").code == 2


def test_one_text_into_a_file(hasten: Any, folder: Path) -> None:
    assert hasten("generate", folder, *PROMPT, "--output", "one.txt").code == 0
    right = pipe().generate(prompts="w1 w2 w3", max_new_tokens=6).texts
    assert right is not None
    assert Path("one.txt").read_text() == right[0] + "\n"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--height", 64), "--height is for images and videos"),
        (("--negative-prompt", "x"), "--negative-prompt is for images"),
        (("--output", "x.mp4"), "texts go to a .txt or .jsonl file"),
        (("--call", "streamer=1"), "--call cannot set 'streamer'"),
        (("--call", "max_new_token=1"), "Did you mean 'max_new_tokens'"),
        (("--recipe", "balanced"), "sets reuse"),
        (("--steps", 0), "steps must be at least 1"),
        (("--call", "threshold=2"), "threshold must be from 0 to 1"),
    ],
)
def test_what_does_not_fit(hasten: Any, folder: Path, more: tuple[Any, ...], said: str) -> None:
    ran = hasten("generate", folder, *PROMPT, *more)
    assert ran.code == 2
    assert said in ran.sentence


def test_a_causal_model_is_told(hasten: Any, tmp_path: Path) -> None:
    bare = model("causal")
    bare.config.mask_token_id = None
    bare.config.hasten_diffusion = None
    bare.save_pretrained(tmp_path / "causal")
    from tests.pipelines.text_pipes import tokenizer

    tokenizer().save_pretrained(tmp_path / "causal")
    ran = hasten("generate", tmp_path / "causal", *PROMPT)
    assert ran.code == 2
    assert "none of the masked language models" in ran.sentence
