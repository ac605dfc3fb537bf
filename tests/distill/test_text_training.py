"""Training text models as a whole: it resumes bit-identically, and its results are ordinary."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hasten.distill.loop.state import claimed
from hasten.distill.pretrain.text_bundle import bundle_text
from hasten.distill.pretrain.text_config import load_text_config
from hasten.distill.pretrain.texts import pretrain_text
from hasten.errors import ModelError, ResumeError, UsageError
from hasten.pipelines import tiny_models
from tests.text_training import KINDS, config, written


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("sources"))


def train(out: Path, sources: Path, kind: str = "full", **settings: Any) -> Path:
    return pretrain_text(config(kind), out=out, data=str(sources), progress=False, **settings)


@pytest.fixture(scope="module", params=list(KINDS))
def trained(request: Any, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out: Path = tmp_path_factory.mktemp(request.param)
    assert train(out, sources, request.param) == out / "model"
    return request.param, out


def test_result_loads_with_transformers_alone(trained: tuple[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind, out = trained
    model = AutoModelForCausalLM.from_pretrained(out / "model", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(out / "model", local_files_only=True)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    says = model.config.hasten_diffusion
    assert says["kind"] == ("full" if kind == "shifted" else kind) and says["shifted"] == (kind == "shifted")
    assert says.get("block") == (8 if kind == "block" else None)
    assert model.config.mask_token_id == tokenizer.mask_token_id == 2
    assert model.config.eos_token_id == tokenizer.eos_token_id == 1
    stored = load_file(out / "model" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert tokenizer.model_max_length == 64
    ours, same = tiny_models.text(out / "model")
    assert torch.equal(ours.lm_head.weight, model.lm_head.weight)
    assert same("a b").input_ids == tokenizer("a b").input_ids


def test_log_tells_the_parts(trained: tuple[str, Path]) -> None:
    rows = [json.loads(line) for line in (trained[1] / "checkpoints" / "text" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    assert all(math.isclose(row["loss"], (row["tasks"] + row["code"]) / 2, abs_tol=1e-3) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_interrupted_training_continues_bit_identically(
    trained: tuple[str, Path], sources: Path, tmp_path: Path
) -> None:
    kind, whole = trained
    assert train(tmp_path, sources, kind, stop_after=3) == tmp_path / "latest"
    with (tmp_path / "checkpoints" / "text" / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')  # what a kill in the next steps leaves behind
    train(tmp_path, sources, kind, resume=True)
    assert_same(whole, tmp_path)


def assert_same(one: Path, two: Path) -> None:
    for name in ("checkpoints/text/latest/student/weights", "checkpoints/text/latest/student/optimizer", "model/model"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (one, two))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    logs = [(folder / "checkpoints" / "text" / "log.jsonl").read_text().splitlines() for folder in (one, two)]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in logs]
    assert losses[0] == losses[1]


KILLED = """
import sys, torch
from pathlib import Path
from hasten.distill.pretrain.text_config import load_text_config
from hasten.distill.pretrain.texts import pretrain_text

torch.set_num_threads(1)
out, data, how = sys.argv[1:]
config = load_text_config("smoke-text", {"training.steps": 60})
pretrain_text(config, out=Path(out), data=data, resume=how == "resume", checkpoint_seconds=0.0, progress=False)
"""


def test_a_killed_training_continues_bit_identically(sources: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    def start(out: Path, how: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", KILLED, str(out), str(sources), how])

    process = start(parts, "start")
    until = time.monotonic() + 120
    while not (parts / "latest" / "config.json").is_file() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed = json.loads((parts / "checkpoints" / "text" / "latest" / "state.json").read_text())["step"]
    assert 0 < killed < 60, "killed too late to show anything"
    settings = {"training.steps": 60}
    for out, resume in ((whole, False), (parts, True)):
        c = load_text_config("smoke-text", settings)
        pretrain_text(c, out=out, data=str(sources), resume=resume, progress=False)
    assert_same(whole, parts)


def test_resume_refuses_another_configuration_but_not_more_steps(sources: Path, tmp_path: Path) -> None:
    train(tmp_path, sources, stop_after=2)
    with pytest.raises(UsageError, match="already holds a training"):
        train(tmp_path, sources)
    with pytest.raises(ResumeError, match=r"only training\.steps may change, but tasks\.batch was 4, now 5"):
        pretrain_text(config(**{"tasks.batch": 5}), out=tmp_path, data=str(sources), resume=True, progress=False)
    longer = config(**{"training.steps": 8})
    pretrain_text(longer, out=tmp_path, data=str(sources), resume=True, progress=False)
    assert json.loads((tmp_path / "model" / "training.json").read_text())["step"] == 8
    with pytest.raises(ResumeError, match="no such folder"):
        train(tmp_path / "elsewhere", sources, resume=True)
    with pytest.raises(UsageError, match="There is no data folder"):
        pretrain_text(config(), out=tmp_path / "x", data=str(tmp_path / "nowhere"))
    assert not (tmp_path / "x").exists()


def test_two_trainings_in_one_folder_are_refused(sources: Path, tmp_path: Path) -> None:
    train(tmp_path, sources, stop_after=2)
    before = (tmp_path / "checkpoints" / "text" / "log.jsonl").read_text()
    with (
        claimed(tmp_path, json.loads((tmp_path / "config.json").read_text()), True, ()),
        pytest.raises(UsageError, match="Another process is training"),
    ):
        train(tmp_path, sources, resume=True)
    assert (tmp_path / "checkpoints" / "text" / "log.jsonl").read_text() == before
    train(tmp_path, sources, resume=True)


def test_what_is_not_learned_from_is_not_read(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    pretrain_text(config(**{"code": None, "training.steps": 1}), out=tmp_path / "out", data=str(empty), progress=False)
    row = json.loads((tmp_path / "out" / "checkpoints" / "text" / "log.jsonl").read_text())
    assert "code" not in row and not (tmp_path / "out" / "code.safetensors").exists()


def test_bundle_writes_card_and_curve(trained: tuple[str, Path], tmp_path: Path) -> None:
    kind, out = trained
    card = bundle_text(out, tmp_path / "smoke-text")
    assert card["settings"] == config(kind).model_dump(mode="json", exclude={"name", "kind"})
    assert card["kind"] == "text" and card["steps"] == {"text": 6} and card["class"] == "LlamaForCausalLM"
    assert set(card["sha256"]) == {"model.safetensors"} and card["data"]["code"]["tokens"]["train"] > 0
    assert not [f for f in (tmp_path / "smoke-text").glob("*.json") if str(out) in f.read_text()]
    assert json.loads((tmp_path / "smoke-text" / "loss.json").read_text())["text"]
    assert not (tmp_path / "smoke-text" / "training.json").exists()
    with pytest.raises(UsageError, match="No model in"):
        bundle_text(out, tmp_path / "x", source="nowhere")


# -- bundled ----------------------------------------------------------------------------------------------------
def test_an_unknown_text_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no bundled text model"):
        tiny_models.text("tiny-dlm")
    with pytest.raises(ModelError, match="no bundled text model"):
        tiny_models.text(tmp_path)
    with pytest.raises(ModelError, match="no bundled text model"):
        tiny_models.text("tiny-image")


def test_a_bundled_text_model_is_opened_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: tuple[str, Path]
) -> None:
    kind, out = trained
    bundle_text(out, tmp_path / "smoke-text")
    monkeypatch.setattr(tiny_models, "_BUNDLED", tmp_path)
    opened = "TextGenerationPipeline" if kind == "causal" else "TextDiffusionPipeline"
    assert type(tiny_models.load("smoke-text")).__name__ == opened
    model, _ = tiny_models.text("smoke-text", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training and all(tiny_models.verify("smoke-text").values())

