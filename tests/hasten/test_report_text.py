"""The report on a language model: sums, sentences, warnings, and a page that is safe."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from hasten.recipe import Recipe
from hasten.report_text import TextReport, together
from hasten.trace import Reading, Trace

NASTY = "<script>alert(1)</script>\"'&"


def reading(layer: int = 0, phase: str = "prompt", **values: Any) -> Reading:
    return Reading(f"model.layers.{layer}.self_attn", layer, phase, **values)


def report(*rows: Reading, acts: tuple[str, ...] = ("prompt",), **more: Any) -> TextReport:
    return TextReport(Trace(readings=list(rows)), Recipe(name="some"), "Llama", acts, **more)


SPARSE = {"sparse": 2, "dense": 1, "read": 30.0, "all": 100.0, "rest": 50.0}


def test_shares() -> None:
    row = reading(**SPARSE)
    assert (row.calls, row.of_sparse, row.density, row.saves_nothing) == (3, 0.3, pytest.approx(80 / 150), False)
    dense = reading(dense=4, rest=10.0)
    assert (dense.of_sparse, dense.density, dense.saves_nothing) == (None, 1.0, False)
    wasteful = reading(sparse=1, read=120.0, all=100.0)
    assert (wasteful.of_sparse, wasteful.density, wasteful.saves_nothing) == (1.0, 1.0, True)
    assert reading().density == 1.0


def test_rows_add_up() -> None:
    rows = [
        reading(0, **SPARSE, recall=0.9, lowest=0.8), reading(1, sparse=6, read=10.0, all=100.0, recall=0.5, lowest=0.4),
        reading(2, "cache", dense=7, rest=5.0),
    ]  # fmt: skip
    whole = together(rows)
    assert (whole.sparse, whole.dense, whole.read, whole.all, whole.rest) == (8, 8, 40.0, 200.0, 55.0)
    assert whole.recall == pytest.approx((2 * 0.9 + 6 * 0.5) / 8) and whole.lowest == 0.4
    assert whole.phase == "" and together(rows[:2]).phase == "prompt"
    assert together(rows[2:]).recall is None
    found = report(*rows)
    assert set(found.phases) == {"prompt", "cache"} and found.computed_fraction == whole.density
    assert report().computed_fraction == 1.0 and report().attention is None


def test_text_says_what_was_read() -> None:
    text = str(report(reading(0, **SPARSE), reading(2, dense=3, rest=150.0), reading(0, "cache", dense=9, rest=9.0)))
    assert text.startswith("hasten report: some, Llama\n") and "WARNING" not in text
    assert "prompts     2 of 6 calls sparse; they read 30.0% of their pairs, all together 76.7%; how much" in text
    assert "new tokens  dense in all of 9 calls" in text
    assert "  prompts     5 #\n" in text, "layers 0 to 2: half, none, everything"
    known = str(report(reading(sparse=1, read=1.0, all=4.0, recall=0.95, lowest=0.9)))
    assert "95.0% of the mass by estimate, at least 90.0%" in known and "all together" not in known


def test_parts_that_did_nothing_are_warnings() -> None:
    assert "never ran" in report().warnings[0]
    idle = report(reading(dense=5, rest=1.0), acts=("prompt", "cache"), idle={"prompt": "all were short"}).warnings
    assert idle == [
        "The recipe's part for prompts did nothing: all 5 calls were dense; all were short.",
        "The recipe's part for new tokens did nothing: there were none.",
    ]
    assert "left out nothing" in report(reading(sparse=1, read=5.0, all=5.0)).warnings[0]
    assert "NaN" in report(reading(sparse=1, read=1.0, all=5.0, recall=math.nan)).warnings[0]
    assert report(reading(dense=5, rest=1.0), acts=()).warnings == [], "nothing was asked for"
    noted = report(reading(**SPARSE))
    noted.trace.note("Mind this.")
    assert noted.warnings == ["Mind this."] == noted.notes


def test_json_is_strict() -> None:
    data = json.loads(report(reading(**SPARSE, recall=math.nan), extras={"seed": 3}).to_json())
    assert data["rows"][0]["recall"] is None and data["rows"][0]["of_sparse"] == 0.3 and data["extras"] == {"seed": 3}
    assert data["phases"]["prompt"]["density"] == pytest.approx(80 / 150) and "layer" not in data["phases"]["prompt"]
    assert data["versions"]["hasten"]


def test_page_is_escaped_and_whole() -> None:
    rows = [Reading(NASTY, layer, phase, **SPARSE) for layer in range(40) for phase in ("prompt", "cache")]
    found = TextReport(
        Trace(readings=rows, notes=[NASTY]), Recipe(name=NASTY, paper=NASTY), NASTY, ("prompt",), extras={NASTY: NASTY}
    )
    page = found.to_html()
    assert NASTY not in page and "&lt;script&gt;" in page and page.count("<script>") == 1
    assert page.count("<rect") >= 2 * 40 and "Layer by layer" in page and page.rstrip().endswith("</html>")
