"""`hasten bench cache`: a table, the bars, JSON and the curve beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from hasten.report_curve import draw_curves


def test_cache_writes_rows_bars_and_the_curve(hasten: Any, pixart: Path) -> None:
    ran = hasten(
        "bench", "cache", "--model", pixart, "--prompts", 2, "--seeds", 1, "--presets", "every-other",
        "--presets", "easycache:limit=0.5", "--ours", "every-other", "--no-peers", "--json", "made/cache.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    document = json.loads(Path("made/cache.json").read_text())
    assert document["command"] == "bench cache" and len(document["prompts"]) == 2 and document["seeds"] == [0]
    recipes = [row["recipe"] for row in document["rows"]]
    assert recipes[:4] == ["plain", "plain, another seed", "every-other", "easycache @ limit=0.5"]
    assert [bar["met"] for bar in document["bars"]][:3] == [None] * 3, "no peer was measured"
    assert document["bars"][3]["met"] in (True, False)
    assert len(document["outcomes"]["every-other"]) == 2
    assert "not measured" in ran.out and "2 dB above fewer steps" in ran.out
    drawn = ElementTree.fromstring(Path("made/cache.svg").read_text())
    titles = [element.text or "" for element in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert any(title.startswith("every-other: ") for title in titles)
    assert any(title.startswith("unipc: ") for title in titles)


def test_cache_refuses_before_any_work(hasten: Any, pixart: Path) -> None:
    ran = hasten("bench", "cache", "--model", pixart, "--presets", "every-othr")
    assert ran.code == 2 and "every-other" in ran.sentence
    ran = hasten("bench", "cache", "--model", pixart, "--presets", "easycache:0.5")
    assert ran.code == 2 and "limit=0.05" in ran.sentence
    assert hasten("bench", "cache", "--model", pixart, "--prompts", 17).code == 2


def test_curves_are_drawn_where_their_numbers_are() -> None:
    curves = {
        "b <1>": [(2.0, 40.0), (1.0, 60.0)],
        "ours": [(4.0, 50.0)],
        "identical": [(1.0, float("inf"))],
    }
    drawn = ElementTree.fromstring(draw_curves("a & b", curves, ["ours"]))
    space = "{http://www.w3.org/2000/svg}"
    found = {c[0].text: (float(c.get("cx", 0)), float(c.get("cy", 0))) for c in drawn.iter(f"{space}circle")}
    assert set(found) == {"b <1>: 2.00x, 40.0 dB", "b <1>: 1.00x, 60.0 dB", "ours: 4.00x, 50.0 dB"}
    slow, middle, fast = (
        found[name] for name in ("b <1>: 1.00x, 60.0 dB", "b <1>: 2.00x, 40.0 dB", "ours: 4.00x, 50.0 dB")
    )
    assert abs((slow[0] + fast[0]) / 2 - middle[0]) < 0.2, "the speed-up is logarithmic"
    assert abs((slow[1] + middle[1]) / 2 - fast[1]) < 0.2 and slow[1] < middle[1], (
        "dB are linear, more is higher"
    )
    lines = [line.get("class") for line in drawn.iter(f"{space}polyline")]
    assert lines == ["line first", "line"]
    assert ElementTree.fromstring(draw_curves("nothing", {})) is not None
