"""The tables of `hasten bench decode`: bars, rows by falling tokens per forward, and what was refused, once for each reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from doc_tables import decode, results


def test_nothing_measured_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert decode.decode() == decode.bars() == "Not measured yet.\n"


def test_rows_and_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"part": "drafts", "model": "tiny-lm", "workload": "code", "batch": 1, "mode": "greedy", "n": 16}
    noise = common | {"workload": "noise", "adverse": True}
    four = common | {"batch": 4, "n": 8}
    look_up = {"recipe": "look-up", "tokens_per_forward": 2.346, "drafts": 5.25, "speedup_processor": 1.52}
    peer = {"recipe": "prompt look-up, 10 tokens", "control": "peer:transformers prompt look-up", "tokens_per_forward": 2.0, "drafts": 9.0}
    rows = [
        common | {"recipe": "plain", "tokens_per_forward": 1.0, "drafts": 0.0, "speedup_processor": 1.0},
        common | look_up | {"drafts_when": "every round"},
        common | look_up | {"drafts_when": "goodput", "tokens_per_forward": 1.9, "speedup_processor": 1.6},
        noise | look_up | {"drafts_when": "goodput", "speedup_processor": 0.99},
        four | look_up | {"drafts_when": "goodput", "speedup_processor": 1.1},
        common | peer | {"speedup_processor": 1.4},
        {key: four[key] for key in ("part", "model", "workload", "batch", "mode")} | peer | {"note": "not for more than one row"},
        common | {"recipe": "medusa", "student": "mine", "training": "30 steps", "drafts_when": "every round", "tokens_per_forward": 1.5, "drafts": 3.0, "n": 48},
        {"part": "shared", "recipe": "hydragen", "speedup": 4.0},
    ]
    bars = [{"bar": "faster", "met": True, "detail": "2x"}, {"bar": "exact", "met": None, "detail": "no row"}]
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "decode.json").write_text(json.dumps({"hardware": {"threads": 1}, "rows": rows, "bars": bars}))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    forwards, speeds = decode.decode().split("### Speed-ups")
    assert "drafting in every round, greedy\ntiny-lm; cpu: 1 threads" in forwards and "| recipe | code, 16 texts |" in forwards and "noise" not in forwards
    assert forwards.index("| `look-up` | 2.35 (5.2) |") < forwards.index("| prompt look-up, 10 tokens | 2.00 (9.0) |") < forwards.index("| plain |")
    assert "| `medusa` of mine | 1.50 (3.0), 48 texts |" in forwards and "- `medusa` of mine: 30 steps\n" in speeds
    assert "| recipe | code x 1, 16 texts | code x 4, 8 texts | noise x 1, 16 texts |" in speeds
    assert speeds.index("| prompt look-up, 10 tokens | 1.40x |  |  |") < speeds.index("| `look-up` | 1.60x | 1.10x | 0.99x |")
    assert "- prompt look-up, 10 tokens: not for more than one row" in speeds and "hydragen" not in speeds
    assert "| `tiny-lm` | faster | **yes**: 2x |" in decode.bars() and "not measured yet: no row" in decode.bars()


def test_of_two_rows_the_one_of_most_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that only counts tokens has no place among speed-ups; where a timed one of fewer texts is beside it, that one has."""
    few = {"part": "drafts", "model": "m", "workload": "code", "batch": 1, "mode": "greedy", "recipe": "peer", "control": "peer:x", "drafts": 1.0}
    rows = [few | {"n": 48, "tokens_per_forward": 2.5}, few | {"n": 6, "tokens_per_forward": 2.0, "speedup_processor": 1.3}]
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "decode.json").write_text(json.dumps({"hardware": {"threads": 1}, "rows": rows, "bars": []}))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    forwards, speeds = decode.decode().split("### Speed-ups")
    assert "| recipe | code, 48 texts |" in forwards and "| peer | 2.50 (1.0) |" in forwards and "2.00" not in forwards
    assert "| recipe | code x 1, 6 texts |" in speeds and "| peer | 1.30x |" in speeds
