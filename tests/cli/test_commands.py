"""The other commands, and what all of them have in common."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten as package
from hasten.cli import explain
from hasten.cli.output import cell, strict
from hasten.cli.recipes import measured
from hasten.pipelines.compare import compare
from hasten.pipelines.doctor import backends
from hasten.pipelines.recipes import catalogue
from tests.hosts import PIXART_CALL, WAN_CALL, small_pixart, small_wan

COMMANDS = [
    [], ["demo"], ["generate"], ["compare"], ["recipes"], ["doctor"],
    ["train"], ["train", "pretrain"], ["bench"], ["bench", "overhead"], ["bench", "recipes"], ["bench", "cache"],
    ["bench", "attention"], ["bench", "dllm"], ["profile"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(hasten: Any, command: list[str]) -> None:
    ran = hasten(*command, "--help")
    assert ran.code == 0
    assert "Usage: hasten" in ran.out
    assert ran.err == ""


def test_help_says_what_an_option_is_without_being_named(hasten: Any) -> None:
    """Brackets in a help text are markup, and vanish."""
    words = " ".join(hasten("compare", "--help").out.replace("│", " ").split())
    assert "Default: balanced and fast." in words and "Default: the model's." in words


def test_help_loads_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys; from hasten.cli import main; main(['generate', '--help']);"
        " print([m for m in ('torch', 'diffusers', 'transformers', 'gradio') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(hasten: Any) -> None:
    assert hasten("--version").out == f"hasten {package.__version__}\n"


def test_recipes_lists_all_and_shows_one(hasten: Any, tmp_path: Path) -> None:
    listed = hasten("recipes", "--json", "-").json["rows"]
    assert [row["recipe"] for row in listed] == [entry.name for entry in catalogue()]
    shown = hasten("recipes", "easycache")
    assert shown.code == 0
    assert "EasyCache, arXiv 2507.02860" in shown.out
    text = shown.out.split("FILE:\n")[1]
    (tmp_path / "mine.yaml").write_text(text)
    assert (
        hasten("recipes", tmp_path / "mine.yaml", "--json", "-")
        .json["rows"][0]["parts"]
        .startswith("reuse: network")
    )


def test_recipes_say_what_they_act_on(hasten: Any) -> None:
    acts = {row["recipe"]: row["acts_on"] for row in hasten("recipes", "--json", "-").json["rows"]}
    assert (acts["minference"], acts["semantic"], acts["easycache"]) == ("language models", "diffusion models", "diffusion models")
    assert acts["plain"] == "any model" and acts["dual-cache"] == "text diffusion"
    assert "hasten generate" in hasten("recipes", "llada").out
    shown = hasten("recipes", "hip").out
    assert "acts on: language models" in shown and "attention: causal, prompt sparse, cache" in shown
    assert 'hasten.accelerate(model, "hip")' in shown and "hasten compare" not in shown


def test_compare_writes_videos_and_a_report(hasten: Any, wan: Path) -> None:
    ran = hasten(
        "compare", wan, "--prompt", "a one", "--recipe", "every-other", "--out", "out", "--json", "-"
    )
    assert ran.code == 0, ran.err
    plain, other = ran.json["rows"]
    assert plain["recipe"] == "plain"
    assert plain["speedup"] == 1.0
    assert other["psnr_median"] > 20
    assert other["nfe"] < plain["nfe"]
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "every-other.mp4", "plain-every-other.gif", "plain.mp4", "report.html",
    ]  # fmt: skip


def test_a_page_of_a_comparison_begins_with_plain_and_its_recipe(hasten: Any, pixart: Path) -> None:
    ran = hasten(
        "compare", pixart, "--prompt", "a one", "--recipe", "every-other", "--recipe", "easycache", "--out", "out", "--json", "-"
    )
    assert ran.code == 0, ran.err
    for page, recipe in (("report.html", "every-other"), ("report-easycache.html", "easycache")):
        text = Path("out", page).read_text(encoding="utf-8")
        assert f'aria-label="Comparison of plain and {recipe}"' in text and "data:image/png;base64" in text


def test_compare_numbers_every_prompt_and_seed(hasten: Any, pixart: Path) -> None:
    ran = hasten(
        "compare", pixart, "--prompt", "a one", "--prompt", "a two", "--seed", 1, "--seed", 2,
        "--recipe", "plain", "--out", "out", "--json", "-",
    )  # fmt: skip
    assert ran.code == 2
    assert "'plain' is always compared" in ran.sentence
    ran = hasten(
        "compare", pixart, "--prompt", "a one", "--prompt", "a two", "--seed", 1, "--seed", 2,
        "--recipe", "every-other", "--out", "out", "--json", "-",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert [row["n"] for row in ran.json["rows"]] == [4, 4]
    assert {"000-1-plain.png", "003-2-every-other.png"} <= {path.name for path in Path("out").iterdir()}


def test_compare_in_python() -> None:
    rows = compare(small_wan(), ["easycache"], ["a one"], [0, 1], **WAN_CALL)
    assert [row["recipe"] for row in rows] == ["plain", "easycache"]
    assert rows[1]["n"] == 2
    assert strict(rows) == rows


def test_compare_says_identical(hasten: Any) -> None:
    pipe = small_pixart()
    recipe = package.recipe("easycache").replace({"reuse.rule.limit": 0.0})
    with pytest.warns(UserWarning, match="skipped nothing"):
        rows = compare(pipe, [recipe], ["a one"], **PIXART_CALL)
    assert rows[1]["exact_match"] is True
    assert rows[1]["psnr_median"] is None
    assert rows[1]["latent_error"] == 0.0
    assert cell("psnr_median", rows[1]) == "identical"


def test_demo(hasten: Any, wan: Path) -> None:
    ran = hasten("demo", "--model", wan, "--out", "out", "--json", "-")
    assert ran.code == 0, ran.err
    rows = ran.json["rows"]
    assert [row["recipe"] for row in rows] == ["plain", "balanced", "fast:student=false"]
    assert {"plain.mp4", "balanced.mp4", "fast-student-false.mp4", "plain-balanced-fast-student-false.gif", "report.html"} <= {
        path.name for path in Path("out").iterdir()
    }
    assert rows[1]["skipped"].endswith(" of 12")


def test_bench_overhead(hasten: Any, wan: Path) -> None:
    ran = hasten("bench", "overhead", wan, "--repeats", 3, "--json", "-")
    assert ran.code == 0, ran.err
    assert ran.json["rows"][0]["identical"] is True


def test_doctor_on_this_machine(hasten: Any) -> None:
    ran = hasten("doctor", "--quick", "--device", "cpu", "--json", "-")
    assert ran.code == 0, ran.err
    found = {row["check"]: row["status"] for row in ran.json["rows"]}
    assert found["float32 matmul"] == found["math attention"] == found["mp4 files"] == "ok"


def test_doctor_finds_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a: real(*a) * 1.01)
    found = {c.name: c for c in backends.backends(torch.device("cpu"), quick=True)}
    assert found["math attention"].status == "failed"
    assert "against float64" in found["math attention"].detail
    assert found["float32 matmul"].status == "ok"


@pytest.mark.long
def test_doctor_on_a_model(hasten: Any, wan: Path) -> None:
    ran = hasten("doctor", "--quick", "--device", "cpu", "--model", wan, "--json", "-")
    assert ran.code == 0, ran.err
    found = {row["check"]: row for row in ran.json["rows"] if row["section"] == "model"}
    assert found["branch isolation"]["status"] == found["unchanged after all checks"]["status"] == "ok"
    assert found["injected tensors"]["status"] == "inapplicable"
    assert not any(name.startswith("recipe ") for name in found), "--quick leaves the recipes out"
    assert "n/a" in ran.err and "--compile" in ran.err and "Everything that is present is right." in ran.err


@pytest.mark.long
def test_doctor_says_what_is_wrong_with_a_model(hasten: Any, wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.pipelines.doctor.conformance.unchanged", _wrong)
    ran = hasten("doctor", "--quick", "--device", "cpu", "--model", wan)
    assert ran.code == 1
    assert "1 wrong: unchanged after all checks." in ran.out and "FAILED" in ran.out


def _wrong(model: Any) -> str:
    raise AssertionError("not bit-identical")


def test_a_wrong_name_is_said_before_anything_is_measured(hasten: Any) -> None:
    ran = hasten("doctor", "--quick", "--model", "tiny-vidio")
    assert ran.code == 2 and "Did you mean 'tiny-video'" in ran.sentence and "matmul" not in ran.out
    ran = hasten("bench", "dllm", "--quick", "--recipe", "eb-sampla")
    assert ran.code == 2 and "Did you mean 'eb-sampler'" in ran.sentence and "sequential" not in ran.err.split("error:")[0]


def test_doctor_compiles_only_models(hasten: Any) -> None:
    ran = hasten("doctor", "--compile")
    assert ran.code == 2 and "name one with --model" in ran.sentence


def test_what_was_measured_of_a_recipe() -> None:
    """Whole runs, timed; together with others where there is nothing else; and a share of right texts is no PSNR."""
    assert all(row["speedup"] and row["recipe"] == "semantic" for row in measured("semantic"))
    assert {row["recipe"] for row in measured("echo-cache")} >= {"eb-sampler+echo-cache"}
    assert not any(row["recipe"].startswith("oracle") for row in measured("dual-cache"))
    assert measured("nosuch") == []
    assert cell("psnr_median", {"exact_match": 0.99}) == "" and cell("psnr_median", {"exact_match": True}) == "identical"
    assert cell("exact_match", {"exact_match": 0.996}) == "99.6 %"


def test_strict_json() -> None:
    value = strict({"a": float("inf"), "b": [float("nan"), Path("x")], 3: (True, None)})
    assert json.loads(json.dumps(value, allow_nan=False)) == {"a": None, "b": [None, "x"], "3": [True, None]}


@pytest.mark.parametrize(
    ("error", "word", "code"),
    [
        (MemoryError(), "Out of memory", 1),
        (torch.OutOfMemoryError("CUDA"), "Out of memory", 1),
        (OSError(28, "No space left on device"), "disk is full", 1),
        (RuntimeError("kaput\nwith details"), "RuntimeError: kaput.", 1),
        (package.RefusedError("no."), "error: no.", 1),
    ],
)
def test_explanations(error: Exception, word: str, code: int) -> None:
    sentence, found = explain(error)
    assert word in sentence
    assert "\n" not in sentence
    assert found == code
