"""Which transformer classes of diffusers can have their blocks left out, and why the others cannot.

    PYTHONPATH=. python benchmarks/conformance.py

Every class that `tests/conformance/models` builds small runs a loop that stands still, with two branches; only the
first step is computed. Writes benchmarks/results/conformance.json; docs/conformance.md shows it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers

from tests.conformance.loop import NAMES, ONCE, ONCE_BLOCKS, Loop, Result, accelerated, distance, plain
from tests.conformance.small import EXCLUDED, every

OUT = Path(__file__).resolve().parent / "results" / "conformance.json"


def loss(found: Result, expected: Result) -> float:
    """The largest relative difference of any output."""
    return max(distance(value, found.outputs[key]) for key, value in expected.outputs.items())


def row(name: str) -> dict[str, Any]:
    """One class: what of it can be left out, and what that loses on identical input."""
    expected = plain(name, Loop(still=True))
    whole, blocks = (
        accelerated(name, ONCE, Loop(still=True)),
        accelerated(name, ONCE_BLOCKS, Loop(still=True)),
    )
    assert blocks.session is not None
    told = ("always computed", "run once more")
    always = [note.partition(": ")[2] for note in blocks.session.trace.notes if any(words in note for words in told)]
    return {
        "model": name,
        "network": bool(whole.stood_in),
        "network_loss": loss(whole, expected),
        "blocks": bool(blocks.stood_in) and not blocks.refusal,
        "blocks_loss": loss(blocks, expected),
        "lists": {} if blocks.refusal else _own(blocks.session.trace.structure),
        "why": blocks.refusal.partition(": ")[2] or " ".join(always),
        "injections": sorted(every()[name].injections),
    }


def _own(structure: dict[str, int]) -> dict[str, int]:
    return {site.rpartition(".")[2]: num for site, num in structure.items()}


def main() -> None:
    rows = [row(name) for name in NAMES]
    document = {
        "command": "PYTHONPATH=. python benchmarks/conformance.py",
        "versions": {"diffusers": diffusers.__version__},
        "rows": rows,
        "excluded": dict(sorted(EXCLUDED.items())),
    }
    OUT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(
        f"{len(rows)} classes, blocks of {sum(r['blocks'] for r in rows)} can be left out; {len(EXCLUDED)} not built"
    )


if __name__ == "__main__":
    main()
