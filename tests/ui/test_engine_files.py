"""Results on the disk, settings back from their files, and files of strangers."""

from __future__ import annotations

import io
import json
import resource
import signal
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hasten
from hasten.errors import OutputError, UsageError
from hasten.ui.engine import Generate, Limits, Request, RequestError, Text, read
from hasten.ui.engine.export import command, python, yaml
from hasten.ui.engine.models import Models
from hasten.ui.engine.outputs import Outputs
from hasten.ui.engine.place import Place
from hasten.ui.engine.restore import restore
from hasten.ui.engine.trouble import Trouble

ASKED = read({
    "kind": "generate", "model": "tiny-video", "prompt": 'a seven, "moving" left: <b>slowly</b>\nand a line', "negative": "blurry", "seed": 2**60,
    "steps": 9, "guidance": 1.5, "recipe": hasten.recipe("balanced").to_yaml(),
})  # fmt: skip
ABOUT = {"prompt": "other", "seed": 1, "model": "tiny-video", "steps": 9}


@pytest.fixture
def outputs(tmp_path: Path) -> Outputs:
    place = Place(tmp_path)
    place.make()
    return Outputs(place)


def frames(count: int = 1, side: int = 32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).random((count, side, side, 3), dtype=np.float32)


def kept(outputs: Outputs, count: int, request: Request = ASKED) -> tuple[str, Path]:
    with outputs.making(request) as out:
        name = out.media("result", frames(count), fps=8, about=ABOUT)
        out.thumb(frames(count))
        out.facts = {"media": name}
    return out.id, outputs.file(out.id, name)


# --- the store ----------------------------------------------------------------------------------------------


def test_a_result_is_there_whole_or_not_at_all(outputs: Outputs) -> None:
    name, file = kept(outputs, 1)
    assert outputs.get(name)["media"] == file.name and outputs.get(name)["files"] == ["result.png", "thumb.png"]
    with pytest.raises(KeyError), outputs.making(ASKED) as out:
        out.media("result", frames(), fps=8, about=ABOUT)
        raise KeyError("something")
    assert [each["id"] for each in outputs.list()] == [name]
    assert len(list(outputs.folder.iterdir())) == 1


def test_what_a_killed_process_left_is_swept(outputs: Outputs) -> None:
    half = outputs.folder / ".0123456789abcdef.part"
    half.mkdir()
    (half / "result.mp4").write_bytes(b"half")
    kept(outputs, 1)
    assert len(outputs.list()) == 1
    outputs.sweep()
    assert not half.exists() and len(outputs.list()) == 1


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As a full disk: a file may not become larger."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("count", [1, 9])
def test_a_full_disk_leaves_nothing_and_is_said(outputs: Outputs, count: int) -> None:
    with pytest.raises(OutputError, match="disk is full") as caught, largest_file(3000), outputs.making(ASKED) as out:
        out.media("result", frames(count, 128), fps=8, about=ABOUT)
    assert not list(outputs.folder.iterdir())
    trouble = Trouble.of(caught.value, ASKED)
    assert trouble.kind == "disk" and "Free some space" in trouble.sentence and trouble.remedies[0].label == "Try again"


def test_files_are_looked_up_by_id_and_name(outputs: Outputs) -> None:
    name, file = kept(outputs, 1)
    assert outputs.file(name, "result.json").parent == file.parent
    for output, wrong in (("../outputs", "result.png"), (name, "../../jobs.sqlite"), (name, "result.svg"), ("0" * 16, "result.png"), (name, "")):
        with pytest.raises(UsageError):
            outputs.file(output, wrong)
    with pytest.raises(UsageError, match="may not have a file"), outputs.making(ASKED) as out:
        out.text("page.svg", "<svg/>")


def test_results_are_searched_and_removed(outputs: Outputs) -> None:
    first, second = kept(outputs, 1)[0], kept(outputs, 1, read({"kind": "generate", "model": "tiny-image", "prompt": "a Löwe"}))[0]
    assert [each["id"] for each in outputs.list(search="LÖWE tiny")] == [second]
    assert {each["id"] for each in outputs.list(kinds=("generate",))} == {first, second} and not outputs.list(kinds=("text",))
    assert len(outputs.list(limit=1)) == 1
    outputs.remove(first)
    assert [each["id"] for each in outputs.list()] == [second]
    with pytest.raises(UsageError):
        outputs.remove(first)


def test_pictures_are_never_resized(outputs: Outputs) -> None:
    with outputs.making(ASKED) as out:
        out.media("odd", frames(1, 37), fps=8, about=ABOUT)
        out.thumb(frames(1, 900))
    assert Image.open(outputs.file(out.id, "odd.png")).size == (37, 37)
    assert Image.open(outputs.file(out.id, "thumb.png")).size == (320, 320)


# --- settings back from files -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5])
def test_a_result_gives_its_request_back(outputs: Outputs, tmp_path: Path, count: int) -> None:
    _, file = kept(outputs, count)
    assert restore(file.read_bytes(), Limits(), tmp_path) == ASKED
    assert restore((file.parent / "result.json").read_bytes(), Limits(), tmp_path) == ASKED
    assert not list(tmp_path.glob(".upload-*"))


def test_pictures_carry_what_other_programs_read(outputs: Outputs) -> None:
    with outputs.making(ASKED) as out:
        out.media("result", frames(), fps=8, about=ABOUT | {"guidance_scale": 1.5})
    text = Image.open(outputs.file(out.id, "result.png")).text  # type: ignore[attr-defined]
    assert text["parameters"].startswith("other\nSteps: 9, CFG scale: 1.5, Seed: 1") and "hasten" in text


def test_files_of_the_command_line_are_read_too(tmp_path: Path) -> None:
    from hasten.pipelines import media

    facts = {"prompt": "a cat", "negative_prompt": None, "seed": 3, "model": "tiny-image", "recipe": hasten.recipe("fast"), "steps": 7, "guidance_scale": 2.0}
    [file] = media.save(frames(), tmp_path / "x.png", metadata=facts)
    found = restore(file.read_bytes(), Limits(), tmp_path)
    assert isinstance(found, Generate) and (found.prompt, found.seed, found.steps, found.guidance, found.width) == ("a cat", 3, 7, 2.0, 32)
    assert hasten.recipe("fast").axes == _recipe(found.recipe).axes


def _recipe(text: str) -> Any:
    from hasten.ui.engine.recipes import recipe_of

    return recipe_of(text)


def test_recipes_alone_become_requests(tmp_path: Path) -> None:
    for name, kind in (("balanced", Generate), ("text-balanced", Text)):
        found = restore(hasten.recipe(name).to_yaml().encode(), Limits(), tmp_path)
        assert isinstance(found, kind) and _recipe(found.recipe).axes == hasten.recipe(name).axes  # type: ignore[attr-defined]


def bomb(width: int, height: int) -> bytes:
    """A PNG of such a size by its header."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))


def plain_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("data", "said"), [
    (b"", "file"), (b"PK\x03\x04" + b"\x00" * 50, "archive"), (b"\x80\x04\x95", "pickle"), (b"\x1f\x8b\x08", "archive"), (b"\x00" * 100, "no text"),
    (bomb(20_000, 20_000), "pixels"), (bomb(100, 100), "damaged"), (plain_png(), "no description"), (b"GIF89a", "damaged"),
    (b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 40, "damaged"), (b"{", "broken JSON"), (b"[" * 100_000, "recipe"), (b"{}", "no description"),
    (b'{"kind": "generate", "model": "tiny-video", "prompt": "a", "path": "/etc"}', "path"), (b"a: &x [1]\nb: *x", "aliases"),
    (b"!!python/object/apply:os.system ['x']", "recipe"), (b"\xff\xfe\xfa not utf-8", "no text"), (b"x" * (600 * 1024), "at most"),
    (b"name: x\nadapter:\n  path: /etc/passwd\n", "names a file"),
])  # fmt: skip
def test_what_strangers_send_is_one_clear_error(data: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=said):
        restore(data, Limits(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_upload_may_not_be_larger_than_allowed(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="at most"):
        restore(plain_png() + b"\x00" * 1000, Limits(max_upload=500), tmp_path)


# --- exports ------------------------------------------------------------------------------------------------

EXPORTED = [
    {"kind": "generate", "model": "tiny-image", "prompt": 'a "three"\\n', "steps": 3, "seed": 5, "recipe": "balanced"},
    {"kind": "generate", "model": "tiny-image", "prompt": "a three", "steps": 3, "recipe": hasten.recipe("easycache").to_yaml()},
    {"kind": "compare", "model": "tiny-image", "prompt": "a three", "steps": 3, "recipes": ["balanced", hasten.recipe("easycache").to_yaml()]},
    {"kind": "text", "model": "tiny-dllm", "prompt": "sort: i p m d n k j . =", "recipe": "text-fast"},
    {"kind": "decode", "model": "tiny-lm", "prompt": 'a "b"\n a "b"\n a', "recipe": "look-up:every=true", "length": 8},
    {"kind": "decode", "model": "tiny-lm", "prompt": "a b a b", "recipe": hasten.recipe("dyspec").to_yaml(), "length": 8, "temperature": 0.9, "seed": 4},
]


@pytest.mark.parametrize("asked", EXPORTED, ids=lambda each: each["kind"])
def test_exported_python_runs_as_it_is(
    asked: dict[str, Any], outputs: Outputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    program = python(read(asked), Models(outputs.place), outputs)
    exec(compile(program, "exported.py", "exec"), {"__name__": "__main__"})  # noqa: S102 - what a user would run
    printed = capsys.readouterr().out
    if asked["kind"] == "generate":
        assert "hasten report: " in printed and (tmp_path / "result.png").is_file()
    if asked["kind"] == "text":
        assert " d i j k m n p" in printed
    if asked["kind"] == "decode":
        assert "hasten report: " in printed and ("as plain decoding: True" in printed) == ("temperature" not in asked)
    if asked["kind"] == "compare":
        assert printed.count("'recipe'") == 3


def test_exported_python_of_studies_and_trainings_is_python(outputs: Outputs) -> None:
    for asked in (
        {"kind": "tune", "model": "tiny-image", "prompts": ["a", "b", "c", "d"], "steps": 10},
        {"kind": "train", "method": "pairs", "model": "tiny-image", "prompts": ["it's a"], "settings": {"train.steps": 3}},
    ):
        compile(python(read(asked), Models(outputs.place), outputs), "exported.py", "exec")
    with pytest.raises(UsageError, match="nothing to export"):
        python(read({"kind": "download", "model": "tiny-image"}), Models(outputs.place), outputs)


@pytest.mark.parametrize("asked", [*EXPORTED, json.loads(ASKED.model_dump_json())], ids=lambda each: each["kind"])
def test_exported_yaml_is_a_recipe_and_gives_the_request_back(asked: dict[str, Any], outputs: Outputs, tmp_path: Path) -> None:
    text = yaml(read(asked), Models(outputs.place), outputs)
    assert restore(text.encode(), Limits(), tmp_path) == read(asked)
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    first = asked["recipes"][0] if asked["kind"] == "compare" else asked["recipe"]
    assert hasten.recipe(file).axes == _recipe(first).axes


def test_the_command_line_says_the_same(outputs: Outputs) -> None:
    import shlex

    words = shlex.split(command(ASKED, Models(outputs.place)))
    assert words[:3] == ["hasten", "generate", "tiny-video"] and words[words.index("--steps") + 1] == "9"
    assert words[words.index("--recipe") + 1] == "recipe.yaml"
