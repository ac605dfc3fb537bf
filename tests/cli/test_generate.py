"""`hasten generate` on real pipelines with random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from hasten.cli.prompts import collect
from hasten.cli.ranks import Ranks
from hasten.pipelines import sizes
from hasten.pipelines.generate import Prompt, Request, generate, plan
from hasten.pipelines.media import read_metadata
from tests.hosts import FLUX_CALL, WAN_CALL, small_flux, small_pixart, small_unet, small_wan

PROMPT = ("--prompt", "a seven moving left")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_video_with_metadata_and_report(hasten: Any, wan: Path) -> None:
    ran = hasten(
        "generate", wan, *PROMPT, "--seed", 5, "--recipe", "every-other",
        "--output", "out/x.mp4", "--report", "out/r.html", "--json", "out/o.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert names(Path("out")) == ["o.json", "r.html", "x.mp4"]
    facts = read_metadata("out/x.mp4")
    assert facts["prompt"] == "a seven moving left"
    assert facts["seed"] == 5
    assert "every-other" in facts["recipe"]
    assert facts["steps"] == WAN_CALL["num_inference_steps"]
    [row] = json.loads(Path("out/o.json").read_text())["rows"]
    assert row["file"] == "out/x.mp4"
    assert row["computed_fraction"] < 1
    assert (row["frames"], row["height"], row["width"]) == (5, 32, 32)
    assert "<svg" in Path("out/r.html").read_text()


def test_no_metadata(hasten: Any, wan: Path) -> None:
    assert hasten("generate", wan, *PROMPT, "--output", "x.gif", "--no-metadata").code == 0
    assert read_metadata("x.gif") == {}


def test_json_on_standard_output_is_alone(hasten: Any, wan: Path) -> None:
    ran = hasten("generate", wan, *PROMPT, "--output", "x.mp4", "--json", "-")
    assert ran.code == 0
    document = ran.json
    assert document["command"] == "generate"
    assert {"hasten", "torch", "diffusers"} <= set(document["versions"])
    assert document["hardware"]["cores"] >= 1
    assert "x.mp4" in ran.err


def test_plain_is_what_the_pipeline_gives(hasten: Any, pixart: Path) -> None:
    assert (
        hasten("generate", pixart, *PROMPT, "--recipe", "plain", "--seed", 3, "--output", "x.png").code == 0
    )
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(pixart)
    call = plan(pipe, Request((Prompt("a seven moving left"),)))
    image = pipe("a seven moving left", generator=torch.Generator().manual_seed(3), **call).images[0]
    written = numpy.asarray(Image.open("x.png"))
    assert numpy.array_equal(written, numpy.rint(image * 255).astype(numpy.uint8))


@pytest.mark.long
def test_prompts_file_fills_a_folder(hasten: Any, wan: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text('# mine\na seven moving left\n{"prompt": "a three", "seed": 9}\n\n')
    ran = hasten(
        "generate", wan, "--prompts", file, "--prompt", "a one", "--output", "new/out", "--json", "-"
    )
    assert ran.code == 0, ran.err
    assert names(Path("new/out")) == ["000-0.mp4", "001-0.mp4", "002-9.mp4"]
    assert [row["prompt"] for row in ran.json["rows"]] == ["a one", "a seven moving left", "a three"]


def test_set_changes_the_recipe(hasten: Any, wan: Path) -> None:
    args = ("generate", wan, *PROMPT, "--recipe", "every-other", "--output", "x.mp4", "--json", "-")
    half = hasten(*args).json["rows"][0]["nfe"]
    third = hasten(*args, "--set", "reuse.rule.interval=3").json["rows"][0]["nfe"]
    assert third < half


def test_interrupt(hasten: Any, wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a one\na two\n")
    from hasten.pipelines import media

    real, calls = media.save, []

    def save(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(media, "save", save)
    ran = hasten("generate", wan, "--prompts", file, "--output", "out")
    assert ran.code == 130
    assert "Interrupted" in ran.err
    assert "Traceback" not in ran.err
    assert names(Path("out")) == ["000-0.mp4"]


def test_an_interrupted_pipeline_is_restored() -> None:
    from hasten.pipelines.accelerate import accelerate

    pipe = small_wan()
    pipe("a one", **WAN_CALL)  # pipelines and schedulers keep notes of a first run on themselves
    before = set(vars(pipe.transformer)) | set(vars(pipe.scheduler))

    def stop(progress: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), accelerate(pipe, "balanced") as session:
        list(generate(pipe, session, Request((Prompt("a one"),), extra=WAN_CALL), on_progress=stop))
    assert before == set(vars(pipe.transformer)) | set(vars(pipe.scheduler))


def test_progress_counts_steps_and_what_was_skipped() -> None:
    from hasten.pipelines.accelerate import accelerate

    pipe, seen = small_wan(), []
    with accelerate(pipe, "every-other") as session:
        request = Request((Prompt("a one"),), extra={**WAN_CALL, "num_inference_steps": 9})
        list(generate(pipe, session, request, on_progress=seen.append))
    assert [(p.step, p.steps) for p in seen][-1] == (9, 9)
    assert 0 < seen[-1].skipped < 1


@pytest.mark.parametrize(
    ("build", "side", "frames"),
    [(small_wan, 16, 4), (small_pixart, 16, 1), (small_unet, 8, 1), (small_flux, 2, 1)],
)
def test_sizes(build: Any, side: int, frames: int) -> None:
    pipe = build()
    assert sizes.side_multiple(pipe) == side
    assert sizes.frame_step(pipe) == frames


def test_a_size_that_is_allowed_is_the_size_that_comes_out() -> None:
    pipe = small_flux()
    call = plan(
        pipe, Request((Prompt("a one"),), height=34, width=30, extra={**FLUX_CALL, "height": 34, "width": 30})
    )
    image = pipe("a one", **call).images[0]
    assert image.shape[:2] == (34, 30)


def test_prompts_keep_their_number() -> None:
    found = collect(["a", "b"], None, 4)
    assert [(p.text, p.seed, p.index) for p in found] == [("a", 4, 0), ("b", 4, 1)]


def test_more_processes_than_prompts() -> None:
    one = collect(["a"], None, 0)
    shares = []
    for index in range(3):
        ranks = Ranks(SimpleNamespace(process_index=index, num_processes=3))
        shares.append(ranks.share(one))
    assert shares == [one, (), ()]


@pytest.mark.long
def test_two_processes_share_the_prompts(wan: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a one\na two\na three\n")
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        "-m", "hasten", "generate", str(wan), "--prompts", str(file), "--device", "cpu",
        "--output", str(out), "--json", str(tmp_path / "o.json"),
    ]  # fmt: skip
    root = Path(__file__).parents[2]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert names(out) == ["000-0.mp4", "001-0.mp4", "002-0.mp4"]
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert [row["prompt"] for row in rows] == ["a one", "a two", "a three"]
