"""The tables in the README and the docs are the ones `docs/make_tables.py` makes from code and results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_tables = script("make_tables")


@pytest.mark.parametrize("page", make_tables.pages(), ids=lambda page: page.name)
def test_tables_are_up_to_date(page: Path) -> None:
    assert make_tables.stale([page]) == [], "run python docs/make_tables.py"


def test_readme_has_both_tables() -> None:
    names = [match["name"] for match in make_tables.MARK.finditer((ROOT / "README.md").read_text(encoding="utf-8"))]
    assert names == ["recipes", "results"]


def test_every_recipe_has_a_row() -> None:
    from hasten.pipelines.recipes import names

    text = make_tables.recipes_table()
    assert all(f"| `{name}` |" in text for name in names())


def test_nothing_measured_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_tables, "RESULTS", tmp_path)
    assert make_tables.results_table() == "Not measured yet.\n"
    assert "not measured yet" in make_tables.recipes_table()


def test_rows_become_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"model": "tiny-video", "recipe": "plain", "speedup": 1.0, "nfe": 100, "psnr_median": None, "n": 32},
        {"model": "tiny-video", "recipe": "balanced", "speedup": 3.9, "nfe": 24, "psnr_median": 41.23, "n": 32},
        {"model": "tiny-video", "control": "fewer_steps", "recipe": "12 steps", "speedup": 4.0, "psnr_median": 37.4},
        {"model": "tiny-video", "control": "peer:cache-dit", "speedup": 1.7, "psnr_median": 40.6},
    ]
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "recipes.json").write_text(json.dumps({"hardware": {"threads": 2}, "rows": rows}))
    monkeypatch.setattr(make_tables, "RESULTS", tmp_path)
    text = make_tables.results_table()
    assert "**`tiny-video` on cpu: 2 threads**" in text
    assert "|  | runs | speed-up | evaluations | PSNR dB, median |" in text
    assert "| `plain` | 32 | 1.00x | 100 | identical |" in text
    assert "| `balanced` | 32 | 3.90x | 24 | 41.2 |" in text
    assert "| fewer steps, best solver (12 steps) |  | 4.00x |  | 37.4 |" in text
    assert "| peer: cache-dit |  | 1.70x |  | 40.6 |" in text
    assert make_tables.measured_where()["balanced"] == ["cpu"]
