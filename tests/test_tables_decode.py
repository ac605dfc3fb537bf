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
    rows = [
        common | {"recipe": "plain", "tokens_per_forward": 1.0, "drafts": 0.0, "speedup_processor": 1.0, "speedup": 1.0, "exact_match": 1.0},
        common | {"recipe": "look-up", "drafts_when": "goodput", "tokens_per_forward": 2.346, "drafts": 5.25, "speedup_processor": 1.52,
                  "speedup": 1.5, "exact_match": 1.0},
        common | {"recipe": "prompt look-up, 10 tokens", "control": "peer:transformers prompt look-up", "tokens_per_forward": 2.0},
        {key: common[key] for key in ("part", "model", "workload", "batch", "mode")} | {"recipe": "medusa", "note": "no heads"},
        {"part": "shared", "recipe": "hydragen", "speedup": 4.0},
    ]  # fmt: skip
    bars = [{"bar": "faster", "met": True, "detail": "2x"}, {"bar": "exact", "met": None, "detail": "no row"}]
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "decode.json").write_text(json.dumps({"hardware": {"threads": 1}, "rows": rows, "bars": bars}))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    text = decode.decode()
    assert "### `tiny-lm`, code, greedy, 1 at once\n16 texts; cpu: 1 threads" in text
    assert "| `look-up` | goodput | 2.35 | 5.2 | 1.52x | 1.50x | 100 % |" in text
    assert text.index("`look-up`") < text.index("prompt look-up, 10 tokens |  | 2.00") < text.index("| plain |")
    assert "- `medusa`: no heads" in text and "hydragen" not in text
    assert "| `tiny-lm` | faster | **yes**: 2x |" in decode.bars() and "not measured yet: no row" in decode.bars()
