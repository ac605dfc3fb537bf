"""`hasten generate` with causal models of image tokens: classes as prompts, drafts by recipe, and clear words for what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hasten.pipelines.decode_own.token_images import TokenImagePipeline
from hasten.pipelines.masked_codes import is_masked_image, is_token_image
from tests.pipelines.decode_own.test_token_images import SIDE, SLOTS, small

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")

DRAFTED = ("--recipe", "speculative-jacobi:window=3", "--set", "draft.row=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with its codebook and its usual call."""
    made, pipe = tmp_path_factory.mktemp("models") / "tokens", small()
    pipe.model.save_pretrained(made)
    pipe.codebook.save(made)
    (made / "hasten.json").write_text(json.dumps({"call": {"temperature": 0.5}}))
    assert is_token_image(made) and not is_masked_image(made)
    return made


def test_a_file_for_each_prompt(hasten: Any, folder: Path) -> None:
    ran = hasten("generate", folder, "--prompt", "a bee", "--prompt", "0", "--seed", 3, *DRAFTED, "--output", "out", "--json", "-")
    assert ran.code == 0, ran.err
    rows = ran.json["rows"]
    assert [row["file"] for row in rows] == ["out/000-3.png", "out/001-3.png"]
    pipe = TokenImagePipeline.from_pretrained(folder)
    for row, number in zip(rows, (1, 0), strict=True):
        right = pipe(number, recipe="speculative-jacobi:window=3,row=2", seed=3, temperature=0.5)
        written = Image.open(row["file"])
        assert np.array_equal(np.asarray(written), np.asarray(right.images[0]))
        assert "row: 2" in json.loads(written.info["hasten"])["recipe"]
        assert row["nfe"] == right.forwards and row["tokens_per_forward"] == SLOTS / right.forwards and row["height"] == SIDE


def test_token_by_token_without_a_recipe(hasten: Any, folder: Path) -> None:
    args = ("--call", "temperature=0", "--output", "one.png", "--json", "-")
    ran = hasten("generate", folder, "--prompt", "1", *args)
    assert ran.code == 0, ran.err
    [row] = ran.json["rows"]
    assert Path("one.png").is_file() and row["recipe"] == "plain" and row["nfe"] == SLOTS and row["computed_fraction"] == 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--steps", 4), "--steps has no meaning"),
        (("--guidance", 2), "--guidance has no meaning"),
        (("--width", 64), "language model of image tokens"),
        (("--set", "draft.row=2"), "speculative-jacobi:row=8"),
        (("--call", "topk=1"), "top_k"),
        (("--call", "temperature=warm"), "temperature must be a number"),
        (("--output", "x.mp4"), ".png"),
        (("--recipe", "maskgit"), "draft"),
    ],
)
def test_what_does_not_fit(hasten: Any, folder: Path, args: tuple[object, ...], says: str) -> None:
    ran = hasten("generate", folder, "--prompt", "0", *args)
    assert ran.code == 2 and says in ran.sentence, ran.err
