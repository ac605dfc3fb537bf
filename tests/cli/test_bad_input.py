"""Every bad input: one clear sentence with the fix, the right exit code, nothing left behind."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROMPT = ("--prompt", "a seven moving left")


def left_behind(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tiny-vdeo", *PROMPT], ["tiny-vdeo", "no bundled model"]),
        (["./nowhere", *PROMPT], ["./nowhere", "no folder"]),
        (["WAN", "--prompts", "missing.txt"], ["missing.txt", "No such file", "one prompt a line"]),
        (["WAN"], ["No prompt", "--prompt TEXT"]),
        (["WAN", "--prompt", " "], ["Prompt 1 is empty"]),
        (["WAN", "--prompt", "a" * 5000], ["5000 characters", "4000"]),
        (["WAN", *PROMPT, "--recipe", "balancd"], ["balancd", "Did you mean 'balanced'?"]),
        (["WAN", *PROMPT, "--recipe", "none.yaml"], ["none.yaml", "No such file"]),
        (["WAN", *PROMPT, "--set", "reuse.rule.shar=0.5"], ["reuse.rule.shar", "Did you mean 'share'?"]),
        (["WAN", *PROMPT, "--set", "nonsense"], ["nonsense", "KEY=VALUE"]),
        (["WAN", *PROMPT, "--height", "40"], ["divisible by 16", "40", "32", "48"]),
        (["WAN", *PROMPT, "--height", "40", "--width", "100"], ["40 x 100", "32 x 96 or 48 x 112"]),
        (["WAN", *PROMPT, "--frames", "6"], ["multiple of 4", "5 or 9"]),
        (["WAN", *PROMPT, "--height", "-16"], ["height", "between 1 and", "-16"]),
        (["WAN", *PROMPT, "--height", "1600000"], ["height", "8,192"]),
        (["WAN", *PROMPT, "--height", "8192", "--width", "8192", "--frames", "8001"], ["pixels", "smaller"]),
        (["WAN", *PROMPT, "--steps", "0"], ["num_inference_steps", "between 1"]),
        (["WAN", *PROMPT, "--steps", "100000"], ["num_inference_steps", "100,000"]),
        (["WAN", *PROMPT, "--guidance", "nan"], ["guidance_scale", "finite"]),
        (["WAN", *PROMPT, "--seed", "-1"], ["seed", "-1"]),
        (["WAN", *PROMPT, "--output", "x.avi"], [".avi", ".mp4"]),
        (["WAN", *PROMPT, *PROMPT, "--output", "x.mp4"], ["2 prompts", "folder"]),
        (["PIXART", *PROMPT, "--output", "x.mp4"], ["images", ".png"]),
        (["PIXART", *PROMPT, "--frames", "5"], ["num_frames", "does not apply"]),
        (["WAN", *PROMPT, "--report", "x.pdf"], ["x.pdf", ".html"]),
        (["WAN", *PROMPT, "--device", "cuda:99"], ["cuda:99", "cpu"]),
        (["WAN", *PROMPT, "--device", "warp"], ["warp", "cpu"]),
        (["WAN", *PROMPT, "--dtype", "float23"], ["float23", "Did you mean"]),
        (["WAN", *PROMPT, "--offload", "model", "--device", "cpu"], ["accelerator"]),
        (["WAN", *PROMPT, "--offload", "everything"], ["everything", "group"]),
        (["WAN", *PROMPT, "--lora", "lora.bin"], ["no LoRA", "lora.bin"]),
        (["WAN", *PROMPT, "--call", "latents=1"], ["latents"]),
        (["WAN", *PROMPT, "--call", "guidence_scale=1"], ["Did you mean 'guidance_scale'?"]),
        (["WAN", *PROMPT, "--call", "max_new_tokens=4"], ["It takes", "num_frames"]),
        (["WAN", *PROMPT, "--fps", "0"], ["--fps"]),
        (["WAN", *PROMPT, "--promt", "x"], ["--promt"]),
    ],
)
def test_wrong_usage(hasten: Any, wan: Path, pixart: Path, args: list[str], words: list[str]) -> None:
    ran = hasten("generate", *({"WAN": wan, "PIXART": pixart}.get(arg, arg) for arg in args))
    assert ran.code == 2
    for word in words:
        assert word in ran.sentence
    assert ran.out == ""
    assert left_behind(Path.cwd()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# only a comment\n\n", ["has no prompts"]),
        ('{"prompt": "a", "sed": 3}\n', ["line 1", "sed"]),
        ('a\n{"prompt": 3}\n', ["line 2", "must be text"]),
        ('{"prompt": "a"\n', ["line 1", "JSON"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
    ],
)
def test_prompts_file(hasten: Any, wan: Path, tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    ran = hasten("generate", wan, "--prompts", file)
    assert ran.code == 2
    assert all(word in ran.sentence for word in words)


def test_unknown_recipe_key(hasten: Any, wan: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\nreuse:\n  kind: network\n  rul: {}\n")
    ran = hasten("generate", wan, *PROMPT, "--recipe", file)
    assert ran.code == 2
    assert "reuse.rul" in ran.sentence
    assert "Did you mean 'rule'?" in ran.sentence


@pytest.mark.parametrize("folder", ["/proc/hasten", "FILE/below"])
def test_unwritable_folder(hasten: Any, wan: Path, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("mine")
    place = folder.replace("FILE", str(tmp_path / "file"))
    for option in ("--output", "--report", "--json"):
        target = place if option == "--output" else f"{place}/r.json"
        ran = hasten("generate", wan, *PROMPT, option, target)
        assert ran.code == 1, option
        assert "Name another folder" in ran.sentence
        assert place in ran.sentence
        assert left_behind(Path.cwd()) == []
    assert (tmp_path / "file").read_text() == "mine"


def test_full_disk(hasten: Any, wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hasten.atomic._sync", full)
    ran = hasten("generate", wan, *PROMPT, "--output", "out")
    assert ran.code == 1
    assert "disk is full" in ran.sentence
    assert left_behind(Path.cwd()) == []


def _pickled(folder: Path, wan: Path) -> Path:
    shutil.copytree(wan, folder)
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.unlink()
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(_bomb(folder))
    return folder


class _Bomb:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (self.mark,))


def _bomb(folder: Path) -> bytes:
    return pickle.dumps(_Bomb(str(folder / "exploded")))


def test_pickle_in_a_folder(hasten: Any, wan: Path, tmp_path: Path) -> None:
    folder = _pickled(tmp_path / "pickled", wan)
    ran = hasten("generate", folder, *PROMPT)
    assert ran.code == 2
    assert "pickle" in ran.sentence
    assert "save_pretrained" in ran.sentence
    assert not (folder / "exploded").exists()


def test_pickle_called_safetensors(hasten: Any, wan: Path, tmp_path: Path) -> None:
    folder = tmp_path / "disguised"
    shutil.copytree(wan, folder)
    next((folder / "transformer").glob("*.safetensors")).write_bytes(_bomb(folder))
    ran = hasten("generate", folder, *PROMPT)
    assert ran.code == 2
    assert "cannot be loaded" in ran.sentence
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m.ckpt", ["pickle", "safetensors"]),
        ("m.pt", ["pickle"]),
        ("m.safetensors", ["single-file", "from_single_file"]),
        ("m.gguf", ["gguf", "GGUFQuantizationConfig"]),
        ("m.txt", ["is a file"]),
    ],
)
def test_single_files(hasten: Any, tmp_path: Path, name: str, words: list[str]) -> None:
    (tmp_path / name).write_bytes(b"x")
    ran = hasten("generate", tmp_path / name, *PROMPT)
    assert ran.code == 2
    assert all(word in ran.sentence for word in words)


def test_folders_that_are_no_pipeline(hasten: Any, wan: Path, tmp_path: Path) -> None:
    assert "model_index.json" in hasten("generate", tmp_path, *PROMPT).sentence
    assert "folder above" in hasten("generate", wan / "transformer", *PROMPT).sentence
    (tmp_path / "model_index.json").write_text('{"_class_name": ["pipeline", "Mine"]}')
    assert "code of its own" in hasten("generate", tmp_path, *PROMPT).sentence
    (tmp_path / "model_index.json").write_text("{")
    assert "cannot be read" in hasten("generate", tmp_path, *PROMPT).sentence


@pytest.mark.long
def test_hub_model_without_network(hasten: Any) -> None:
    ran = hasten("generate", "nobody/nothing-at-all", *PROMPT)
    assert ran.code == 2
    assert "no folder" in ran.sentence
    assert "hub" in ran.sentence


@pytest.mark.parametrize(
    "args",
    [
        ["compare", "tiny-vdeo", *PROMPT],
        ["compare", "WAN", *PROMPT, "--recipe", "balancd"],
        ["compare", "WAN", *PROMPT, "--height", "40"],
        ["compare", "WAN"],
        ["demo", "--model", "tiny-vdeo"],
        ["recipes", "balancd"],
        ["doctor", "--model", "tiny-vdeo"],
        ["bench", "overhead", "tiny-vdeo"],
        ["bench", "recipes", "tiny-vdeo"],
        ["train", "pretrain", "--config", "no-such", "--out", "x"],
        ["train", "pretrain", "--config", "smoke-video", "--out", "x", "--data", "nowhere"],
        ["train", "pretrain", "--config", "smoke-video", "--out", "x", "--set", "denoiser.stps=1"],
        ["train", "pretrain", "--config", "smoke-video", "--out", "x", "--resume"],
        ["train", "pretrain", "--config", "smoke-text", "--out", "x", "--data", "nowhere"],
        ["train", "pretrain", "--config", "smoke-text", "--out", "x", "--set", "training.stps=1"],
        ["train", "pretrain", "--config", "smoke-text", "--out", "x", "--set", "kind=txt"],
        ["nonsense"],
    ],
)
def test_other_commands(hasten: Any, wan: Path, args: list[str]) -> None:
    ran = hasten(*(wan if arg == "WAN" else arg for arg in args))
    assert ran.code == 2
    assert ran.sentence
    assert left_behind(Path.cwd()) == []


def test_traceback_on_request(hasten: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_TRACEBACK", "1")
    ran = hasten("recipes", "balancd")
    assert ran.code == 2
    assert "Traceback" in ran.err
