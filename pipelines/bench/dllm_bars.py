"""Which bars of the text diffusion benchmark are met: arithmetic on its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.pipelines.bench.bars import Bar
from hasten.pipelines.bench.dllm import FAST_DLLM, ORACLE, SEQUENTIAL

Row = Mapping[str, Any]

LESS_THAN_FAST_DLLM = 1.5
POINTS_LOST = 0.005
OF_ORACLE = 1.5


def bars(rows: Sequence[Row], ours: Sequence[str], lossless: Sequence[str]) -> list[Bar]:
    """The bars on the rows of one model and workload. ours: names of our presets. lossless: recipes whose texts must be
    those of sequential decoding."""
    by_name = {row["recipe"]: row for row in rows if "nfe" in row}
    base, fast = by_name.get(SEQUENTIAL), by_name.get(FAST_DLLM)
    quality = "exact_match" if base is not None and "exact_match" in base else "agreement"
    floor = base[quality] - POINTS_LOST if base is not None else 0.0
    good = [by_name[name] for name in ours if name in by_name and by_name[name][quality] >= floor]
    return [
        _less_work(good, fast, floor, quality),
        _near_oracle(good, by_name.get(ORACLE)),
        _exact([by_name[name] for name in lossless if name in by_name]),
    ]


def _less_work(good: list[Row], fast: Row | None, floor: float, quality: str) -> Bar:
    name = f"fewer token-layers than Fast-dLLM's dual cache + threshold, at least {LESS_THAN_FAST_DLLM}x"
    if fast is None or not good:
        return Bar(name, None if fast is None else False, f"no preset of ours keeps {quality} >= {floor:.3f}" if fast else "no row")
    best = min(good, key=lambda row: row["token_layers"])
    factor = fast["token_layers"] / best["token_layers"]
    said = f"{factor:.2f}x ({best['recipe']}; {quality} {best[quality]:.3f}, at least {floor:.3f} asked, Fast-dLLM {fast[quality]:.3f})"
    return Bar(name, factor >= LESS_THAN_FAST_DLLM, said)


def _near_oracle(good: list[Row], oracle: Row | None) -> Bar:
    name = f"evaluations within {OF_ORACLE}x of the oracle's"
    if oracle is None or not good:
        return Bar(name, None, "no row")
    best = min(good, key=lambda row: row["nfe"])
    factor = best["nfe"] / oracle["nfe"]
    return Bar(name, factor <= OF_ORACLE, f"{factor:.2f}x ({best['recipe']}: {best['nfe']:.2f}, oracle {oracle['nfe']:.2f})")


def _exact(rows: list[Row]) -> Bar:
    name = "lossless presets give the texts of sequential decoding"
    if not rows:
        return Bar(name, None, "no row")
    worst = min(rows, key=lambda row: row["agreement"])
    return Bar(name, worst["agreement"] == 1.0, f"{len(rows)} presets; least agreement {worst['agreement']:.4f} ({worst['recipe']})")
