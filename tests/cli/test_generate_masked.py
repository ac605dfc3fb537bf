"""`hasten generate` with masked image models: classes as prompts, PNG files, and clear words for what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.pipelines.test_masked_images import SIDE, book, model, seeds

FEW = ("--recipe", "maskgit:steps=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small masked image model with its codebook and its usual call."""
    made = tmp_path_factory.mktemp("models") / "masked"
    model().save_pretrained(made)
    book().save(made)
    (made / "hasten.json").write_text(json.dumps({"call": {"guidance_scale": 2.0}}))
    return made


def test_a_file_for_each_prompt(hasten: Any, folder: Path) -> None:
    ran = hasten("generate", folder, "--prompt", "a bee", "--prompt", "2", "--seed", 3, *FEW, "--output", "out", "--json", "-")
    assert ran.code == 0, ran.err
    rows = ran.json["rows"]
    assert [row["file"] for row in rows] == ["out/000-3.png", "out/001-3.png"]
    assert rows[0]["nfe"] == 6 and rows[0]["computed_fraction"] == 1 and rows[0]["height"] == SIDE
    from hasten.pipelines.masked_images import MaskedImagePipeline

    pipe = MaskedImagePipeline.from_pretrained(folder)
    right = pipe([1, 2], recipe="maskgit:steps=3", guidance_scale=2.0, generator=seeds(3, 3)).images
    for row, image in zip(rows, right, strict=True):
        written = Image.open(row["file"])
        assert np.array_equal(np.asarray(written), np.asarray(image))
        assert "steps: 3" in json.loads(written.info["hasten"])["recipe"]


def test_one_file_and_less_work(hasten: Any, folder: Path) -> None:
    args = ("generate", folder, "--prompt", "0", "--output", "one.png", "--guidance", 1, "--json", "-")
    ran = hasten(*args, "--recipe", "recap-tokens:steps=6", "--set", "kv.full=0")
    assert ran.code == 0, ran.err
    [row] = ran.json["rows"]
    assert Path("one.png").is_file() and row["nfe"] == 6 and row["computed_fraction"] < 0.9


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--steps", 4), "maskgit:steps=4"),
        (("--width", 64), "--width has no meaning"),
        (("--offload", "model"), "--offload has no meaning"),
        (("--report", "r.html"), "--report has no meaning"),
        (("--call", "temprature=1"), "temperature"),
        (("--output", "x.mp4"), ".png"),
        (("--recipe", "recap"), "recap-tokens"),
        (("--recipe", "maskgit:step=3"), "steps"),
    ],
)
def test_what_does_not_fit(hasten: Any, folder: Path, args: tuple[object, ...], says: str) -> None:
    ran = hasten("generate", folder, "--prompt", "0", *args)
    assert ran.code == 2 and says in ran.sentence


def test_a_prompt_without_a_class(hasten: Any, folder: Path) -> None:
    ran = hasten("generate", folder, "--prompt", "a dog")
    assert ran.code == 2 and "ant, bee, cat" in ran.sentence
    assert not Path("hasten-output").exists()
