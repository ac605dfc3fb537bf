"""The tables in the README and the docs are the ones `docs/make_tables.py` makes from code and results."""

from __future__ import annotations

import json
from pathlib import Path

import make_tables
import pytest
from doc_tables import recipes, results, runs

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("page", make_tables.pages(), ids=lambda page: page.name)
def test_tables_are_up_to_date(page: Path) -> None:
    assert make_tables.stale([page]) == [], "run python docs/make_tables.py"


def test_readme_has_its_tables() -> None:
    names = [match["name"] for match in make_tables.MARK.finditer((ROOT / "README.md").read_text(encoding="utf-8"))]
    assert sorted(names) == ["distill-bars", "recipes", "results"]


def test_every_recipe_has_a_row() -> None:
    from hasten.pipelines.recipes import names

    text = recipes.recipes()
    assert all(f"| `{name}` |" in text for name in names())


def test_nothing_measured_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert runs.results() == "Not measured yet.\n"
    assert "not measured yet" in recipes.recipes()


def test_rows_become_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"model": "tiny-video", "control": None, "n": 32}
    rows = [
        common | {"recipe": "plain", "speedup": 1.0, "nfe": 100, "psnr_median": None, "psnr_converged": 38.04},
        common | {"recipe": "balanced", "speedup": 3.9, "nfe": 24, "psnr_median": 41.23, "psnr_converged": 37.0},
        common | {"recipe": "unipc 12 steps", "control": "fewer_steps", "speedup": 4.0, "nfe": None, "psnr_median": 37.4},
        common | {"recipe": "F1B0", "control": "peer:cache-dit", "speedup": 1.7, "psnr_median": 40.6, "n": None},
    ]
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "recipes.json").write_text(json.dumps({"hardware": {"threads": 2}, "rows": rows}))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    text = runs.results()
    assert "**`tiny-video` on cpu: 2 threads**" in text
    assert "| run | what | runs | speed-up | evaluations | PSNR dB, median | to converged, dB |" in text
    assert "| `plain` | ours | 32 | 1.00x | 100 | identical | 38.0 |" in text
    assert "| `balanced` | ours | 32 | 3.90x | 24 | 41.2 | 37.0 |" in text
    assert "| unipc 12 steps | control | 32 | 4.00x |  | 37.4 |  |" in text
    assert "| F1B0 | peer |  | 1.70x |  | 40.6 |  |" in text
    assert set(recipes.measured_where()) == {"plain", "balanced"}
