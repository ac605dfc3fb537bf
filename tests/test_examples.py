"""The examples run, with few steps, and do what they say."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generate_video(tmp_path: Path) -> None:
    file = example("generate_video").main(tmp_path, steps=10)
    assert file.suffix == ".mp4" and file.stat().st_size > 0
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = example("image").main(tmp_path, steps=10)
    assert file.suffix == ".png" and file.stat().st_size > 0
    assert "linear-ag" in capsys.readouterr().out


def test_compare() -> None:
    rows = {row["recipe"]: row for row in example("compare").main(["plain", "every-other"], steps=10)}
    assert math.isinf(rows["plain"]["psnr"])
    assert rows["every-other"]["nfe"] == 0.5 * rows["plain"]["nfe"]


def test_own_pipeline() -> None:
    report = example("own_pipeline").main(steps=12)
    assert 0 < report.computed_fraction < 1


def test_every_example_is_tested() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for file in (ROOT / "examples").glob("*.py"):
        assert f'example("{file.stem}")' in source, f"{file.name} has no test"
