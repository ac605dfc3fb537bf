"""`hasten export serve`, `hasten bench decode` and `hasten tune --budget lossless`, as they are typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.cli.bench_decode import Result
from hasten.cli.output import Output
from hasten.pipelines import tiny_models
from hasten.pipelines.bench.decode import Bench
from hasten.pipelines.bench.decode_ways import way
from hasten.pipelines.tune import decode_run
from tests.cli.conftest import Ran

Run = Callable[..., Ran]


def test_export_to_both(hasten: Run) -> None:
    ran = hasten("export", "serve", "--model", "owner/name", "--recipe", "look-up:width=1", "--to", "vllm", "--json", "-")
    assert ran.code == 0 and ran.json["config"]["speculative_config"]["method"] == "ngram"
    assert ran.json["argv"][:3] == ["vllm", "serve", "owner/name"]
    ran = hasten("export", "serve", "--model", "tiny-lm", "--recipe", "look-up", "--to", "sglang")
    assert ran.code == 0 and "--speculative-algorithm NGRAM" in ran.out and "tiny-lm" in ran.out
    assert "one trie of all requests" in ran.err


def test_export_refuses_in_one_sentence(hasten: Run) -> None:
    ran = hasten("export", "serve", "--model", "owner/name", "--recipe", "look-up", "--to", "vllm")
    assert ran.code == 1 and "vLLM verifies chains" in ran.sentence
    ran = hasten("export", "serve", "--model", "owner/name", "--recipe", "h2o", "--to", "sglang")
    assert ran.code == 1 and "leaves tokens out of the cache" in ran.sentence
    assert hasten("export", "serve", "--model", "owner/name", "--to", "vllm").code == 2
    ran = hasten("export", "serve", "--model", "tiny-lm", "--heads", "x", "--heads-to", "y", "--to", "sglang")
    assert ran.code == 1 and "no Medusa" in ran.sentence


def test_bench_of_drafts(hasten: Run) -> None:
    ran = hasten(
        "bench", "decode", "--quick", "--part", "drafts", "--workload", "repetitive", "--mode", "greedy", "--recipe", "look-up", "--json", "-",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    rows = ran.json["rows"]
    assert {(row["part"], row["batch"]) for row in rows} == {("drafts", 1), ("drafts", 2)}
    assert all(row.get("exact_match") == 1.0 for row in rows if row.get("n"))
    assert any("token for token" in bar["bar"] and bar["met"] for bar in ran.json["bars"])
    assert any(bar["verdict"] == "not measured" for bar in ran.json["bars"])


@pytest.mark.long
def test_bench_goes_on_in_a_file(hasten: Run) -> None:
    """Pieces of one table: rows of other cells and of other numbers of texts stay, the same are replaced; one row a line."""
    piece = ("bench", "decode", "--new", 8, "--no-peers", "--part", "drafts", "--workload", "repetitive", "--batch", 1, "--recipe", "look-up")
    assert hasten(*piece, "--mode", "greedy", "--count", 1, "--repeats", 1, "--onto", "rows.json").code == 0
    assert hasten(*piece, "--mode", "sampled", "--count", 2, "--repeats", 2, "--onto", "rows.json").code == 0
    ran = hasten(*piece, "--mode", "greedy", "--count", 3, "--repeats", 0, "--onto", "rows.json", "--json", "-")
    rows = ran.json["rows"]
    assert [(row["mode"], row["recipe"], row.get("drafts_when"), row["n"], row["repeats"]) for row in rows] == [
        ("greedy", "plain", None, 1, 1), ("greedy", "look-up", "every round", 1, 1), ("greedy", "look-up", "goodput", 1, 1),
        ("greedy", "plain", None, 3, 0), ("greedy", "look-up", "every round", 3, 0),
        ("sampled", "plain", None, 2, 2), ("sampled", "look-up", "every round", 2, 2), ("sampled", "look-up", "goodput", 2, 2),
    ]  # fmt: skip
    assert not any(value is None for row in rows for value in row.values())
    before = Path("rows.json").read_text()
    assert sum(line.startswith('  {"part": "drafts"') for line in before.splitlines()) == 6, "with --json elsewhere the file is only read"
    again = hasten(*piece, "--mode", "greedy", "--count", 2, "--repeats", 1, "--onto", "rows.json")
    assert again.code == 0 and Path("rows.json").read_text().count('"n": 2') == 6
    other = hasten("bench", "decode", "--new", 9, "--onto", "rows.json")
    assert other.code == 2 and "new 8 there, 9 here" in other.sentence


@pytest.mark.parametrize("target", ["rows.json", "-"])
def test_rows_are_kept_as_they_come(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that breaks off leaves a whole file; standard output gets one document, at the end."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_models.text("tiny-lm")
    result = Result(Bench(model, tokenizer, "tiny-lm"), Output("bench decode", target), 1, [])
    row = {"part": "drafts", "model": "tiny-lm", "recipe": "plain", "workload": "code", "batch": 1, "mode": "greedy", "n": 1, "repeats": 0}
    result.add([row])
    result.add([row | {"recipe": "look-up"}])
    assert capsys.readouterr().out == "" and Path("rows.json").exists() == (target != "-")
    if target != "-":
        assert [each["recipe"] for each in json.loads(Path(target).read_text())["rows"]] == ["plain", "look-up"]


@pytest.mark.long
def test_bench_of_caches_and_prefixes(hasten: Run) -> None:
    ran = hasten("bench", "decode", "--quick", "--part", "caches", "--part", "shared", "--json", "-")
    assert ran.code == 0, ran.err
    rows = ran.json["rows"]
    assert [(row["part"], row["recipe"]) for row in rows] == [
        ("caches", "full"), ("caches", "streaming-llm"), ("caches", "int8-kv"), ("shared", "hydragen"),
    ]  # fmt: skip
    assert rows[1]["bytes_held"] < rows[0]["bytes_held"] and rows[0]["control"] == "full"
    assert rows[3]["largest_difference"] < 1e-4


def test_bench_decode_says_what_is_misspelt(hasten: Run) -> None:
    ran = hasten("bench", "decode", "--recipe", "look-upp")
    assert ran.code == 2 and "look-up" in ran.sentence


@pytest.mark.long
def test_tune_lossless(hasten: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(decode_run, "every", lambda: [way("look-up")])
    monkeypatch.setattr(decode_run, "SIZES", ())
    Path("prompts.txt").write_text("".join(f"copy: a b c {each} = a b c {each}\ncopy: a b c {each} =\n" for each in "defg"))
    args = ["tune", "--model", "tiny-lm", "--budget", "lossless", "--prompts", "prompts.txt", "--call", "max_new_tokens=8"]
    ran = hasten(*args, "--no-keep", "--json", "-")
    assert ran.code in (0, 1), ran.err  # on a loaded machine plain decoding may be the fastest
    assert ran.json["budget"] == "lossless" and ran.json["rows"][0]["n"] == 4
    assert (ran.json["recipe"] is not None) == Path("recipe.yaml").exists() == (ran.code == 0)


def test_tune_lossless_and_what_has_no_meaning(hasten: Run) -> None:
    ran = hasten("tune", "--model", "tiny-lm", "--budget", "lossless", "--steps", 5)
    assert ran.code == 2 and "--steps has no meaning" in ran.sentence
    ran = hasten("tune", "--model", "tiny-lm", "--budget", "lossless", "--call", "guidance=2")
    assert ran.code == 2 and "guidance" in ran.sentence
    ran = hasten("tune", "--model", "tiny-video")
    assert ran.code == 2 and "--prompts FILE" in ran.sentence
