"""`hasten generate --search` on real pipelines with random weights: the best candidate is written, and what it cost is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from hasten.pipelines.media import read_metadata
from hasten.pipelines.verifiers import local_verifier, sharpness
from tests.hosts import PIXART_CALL, WAN_CALL

PROMPT = ("--prompt", "a seven")
SHARP = ("--verifier", "sharpness")


def picture(name: str) -> Any:
    return numpy.asarray(Image.open(name))


def test_the_best_of_three_seeds_is_what_its_seed_gives_alone(hasten: Any, pixart: Path) -> None:
    """Also with a cache: one candidate at a time, so no candidate shares a decision with another."""
    with_cache = ("generate", pixart, *PROMPT, "--recipe", "every-other")
    ran = hasten(*with_cache, "--seed", 4, "--search", "random", "--candidates", 3, *SHARP, "--output", "best.png", "--json", "-")
    assert ran.code == 0, ran.err
    [row] = ran.json["rows"]
    search = row["search"]
    assert [one["seed"] for one in search["candidates"]] == [4, 5, 6]
    assert search["score"] == max(one["score"] for one in search["candidates"])
    steps = PIXART_CALL["num_inference_steps"]
    assert (search["steps"], search["nfe"], search["runs"]) == (3 * steps, 3 * steps / 2, 3)
    assert row["nfe"] == search["nfe"], "the cost is that of the whole search"
    assert "Searched random over 3 candidates by sharpness" in ran.err

    facts = read_metadata("best.png")
    assert facts["seed"] == search["candidates"][search["best"]]["seed"]
    assert facts["search"]["score"] == pytest.approx(search["score"])
    assert hasten(*with_cache, "--seed", facts["seed"], "--output", "alone.png").code == 0
    assert numpy.array_equal(picture("best.png"), picture("alone.png"))


@pytest.mark.parametrize("how", ["zero-order", "paths"])
def test_other_searches_of_a_clip(hasten: Any, wan: Path, how: str) -> None:
    more = ("--recipe", "plain") if how == "zero-order" else ()
    ran = hasten("generate", wan, *PROMPT, "--search", how, "--candidates", 4, *SHARP, *more,
                 "--output", "x.mp4", "--json", "x.json", "--report", "x.txt")  # fmt: skip
    assert ran.code == 0, ran.err
    [row] = json.loads(Path("x.json").read_text())["rows"]
    search = row["search"]
    assert search["how"] == how and search["steps"] <= 4 * WAN_CALL["num_inference_steps"]
    assert all(one["parent"] is not None for one in search["candidates"][1:]) or how == "paths"
    ends = [one for one in search["candidates"] if one["level"] == 1]
    assert search["score"] == max(one["score"] for one in ends)
    assert read_metadata("x.mp4")["seed"] == 0, "a noise that no seed draws alone has the seed of the search"
    assert f"searched:   {how} over {len(search['candidates'])} candidates by sharpness" in Path("x.txt").read_text()
    assert "best" in ran.out and f"{search['nfe']:.4g} evaluations" in ran.out


def test_a_verifier_of_ones_own(hasten: Any, pixart: Path) -> None:
    Path("mine.py").write_text("def dark(frames, prompt):\n    assert prompt == 'a seven'\n    return -float(frames.mean())\n")
    ran = hasten("generate", pixart, *PROMPT, "--search", "random", "--candidates", 2, "--verifier", "mine.py:dark", "--output", "x.png", "--json", "-")
    assert ran.code == 0, ran.err
    search = ran.json["rows"][0]["search"]
    assert search["verifier"] == "mine.py:dark" and all(one["score"] < 0 for one in search["candidates"])
    assert local_verifier("hasten.pipelines.verifiers:sharpness") is sharpness


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--search", "rando", *SHARP), "There is no search 'rando'"),
        (("--search", "random"), "Say who chooses: --verifier sharpness"),
        (SHARP, "none are searched. Add --search random"),
        (("--search", "random", "--verifier", "sharp"), "There is no verifier 'sharp'; allowed: digits, sharpness"),
        (("--search", "random", "--verifier", "nowhere_at_all:f"), "Cannot import nowhere_at_all"),
        (("--search", "random", "--verifier", "missing.py:f"), "Cannot import missing.py"),
        (("--search", "random", "--verifier", "json:nothing"), "json has no function 'nothing'"),
        (("--search", "zero-order", "--candidates", "1", *SHARP), "at least 12 evaluations, got a budget of 6"),
        (("--search", "paths", "--recipe", "balanced", *SHARP), "walks with a solver of its own"),
    ],
)
def test_mistakes_cost_nothing(hasten: Any, pixart: Path, options: tuple[str, ...], sentence: str) -> None:
    ran = hasten("generate", pixart, *PROMPT, *options, "--output", "out/x.png")
    assert ran.code == 2 and sentence in ran.sentence
    assert not Path("out").exists()


def test_the_judge_reads_prompts_that_name_a_digit(hasten: Any, pixart: Path) -> None:
    ran = hasten("generate", pixart, "--prompt", "a cat", "--search", "random", "--verifier", "digits")
    assert ran.code == 2 and "'a cat' names no digit" in ran.sentence


@pytest.mark.parametrize("model", ["tiny-dllm", "tiny-mask"])
def test_texts_and_codes_have_no_starting_noise(hasten: Any, model: str) -> None:
    ran = hasten("generate", model, *PROMPT, "--search", "random")
    assert ran.code == 2 and "search" in ran.sentence
