"""`hasten profile` writes recipes that `hasten generate` takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from hasten.recipe import read
from tests.cli.conftest import Ran


def test_profile_then_generate(hasten: Callable[..., Ran], wan: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "p.yaml", tmp_path / "p.json"
    sizes = ["--steps", 6, "--prompt", "a seven", "--prompt", "a cat"]
    ran = hasten("profile", "--model", wan, "--out", out, "--json", told, *sizes)
    assert ran.code == 0, ran.err
    written = json.loads(told.read_text())
    names = ["profiling-dit-profiled", "teacache-profiled", "magcache-profiled"]
    assert [row["recipe"] for row in written["rows"]] == names
    assert len(written["profile"]["change"]) == 4 and len(written["profile"]["ratios"]) == 6
    for row in written["rows"]:
        assert read(Path(row["file"])).name == row["recipe"]
    ran = hasten("generate", wan, "--prompt", "a seven", "--recipe", out, "--steps", 6, "--output", tmp_path / "o.gif")
    assert ran.code == 0, ran.err


def test_wrong_usage_is_said_before_any_work(hasten: Callable[..., Ran]) -> None:
    assert "name a .yaml file" in hasten("profile", "--out", "p.json").sentence
    ran = hasten("profile", "--model", "no-such-model", "--out", "p.yaml")
    assert ran.code == 2 and ran.sentence
