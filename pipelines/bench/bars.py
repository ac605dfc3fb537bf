"""What a table of a cache benchmark answers: how fast at which similarity, and which of the bars are met.

Everything here is arithmetic on rows with the keys of the design. Settings of one method form a family (what stands
before " @ " in `recipe`), and within a family the speed-up at a PSNR is interpolated: linear in dB against the
logarithm of the speed-up. Nothing is interpolated between families, and nothing is extrapolated.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Row = Mapping[str, Any]

PSNRS = (30.0, 35.0, 40.0)
FASTER_THAN_PEERS = 1.15
ABOVE_CONTROL_DB = 2.0
OF_ORACLE = 0.9
TOLERANCE_MET = 0.95
SETTING = " @ "


@dataclass(frozen=True, slots=True)
class Point:
    """One row on the curve. psnr: median in dB, infinite where every output was identical."""

    speedup: float
    psnr: float


@dataclass(frozen=True, slots=True)
class Bar:
    """One question of the benchmark. met is None when the rows cannot answer it; `detail` says why, or the numbers."""

    bar: str
    met: bool | None
    detail: str

    @property
    def verdict(self) -> str:
        return "not measured" if self.met is None else "yes" if self.met else "no"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def family(row: Row) -> str:
    """The method without its setting; fewer steps of one solver are a family too."""
    name = str(row["recipe"])
    if row.get("control") == "oracle":
        return oracle_name(name.partition(SETTING)[0])
    return name.partition(" ")[0] if row.get("control") == "fewer_steps" else name.partition(SETTING)[0]


def points(rows: Iterable[Row]) -> list[Point]:
    """The rows that were measured, by rising speed-up; refused and crashed ones have no point."""
    found = []
    for row in rows:
        psnr = math.inf if row.get("exact_match") else row.get("psnr_median")
        if row.get("speedup") is not None and psnr is not None:
            found.append(Point(float(row["speedup"]), float(psnr)))
    return sorted(found, key=lambda point: (point.speedup, point.psnr))


def curves(rows: Iterable[Row]) -> dict[str, list[Point]]:
    """Family -> its points. Families without any point are left out."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(family(row), []).append(row)
    return {name: found for name, members in grouped.items() if (found := points(members))}


def speedup_at(curve: Sequence[Point], psnr: float) -> float | None:
    """The largest speed-up of a family at a PSNR of at least `psnr` dB; None where it is never reached."""
    reached = [point.speedup for point in curve if point.psnr >= psnr]
    for slower, faster in itertools.pairwise(curve):
        if math.isfinite(slower.psnr) and slower.psnr >= psnr > faster.psnr:
            reached.append(_between(slower, faster, (slower.psnr - psnr) / (slower.psnr - faster.psnr)))
    return max(reached, default=None)


def psnr_at(curve: Sequence[Point], speedup: float) -> float | None:
    """The best PSNR in dB of a family at a speed-up of at least `speedup`; None where it is never so fast."""
    reached = [point.psnr for point in curve if point.speedup >= speedup]
    for slower, faster in itertools.pairwise(curve):
        if (
            slower.speedup < speedup < faster.speedup
            and math.isfinite(slower.psnr)
            and math.isfinite(faster.psnr)
        ):
            share = math.log(speedup / slower.speedup) / math.log(faster.speedup / slower.speedup)
            reached.append(slower.psnr + share * (faster.psnr - slower.psnr))
    return max(reached, default=None)


def _between(slower: Point, faster: Point, share: float) -> float:
    return float(slower.speedup * (faster.speedup / slower.speedup) ** share)


def best(
    curves: Mapping[str, Sequence[Point]], value: Callable[[Sequence[Point]], float | None]
) -> tuple[str, float] | None:
    """The family with the largest value, and the value; the first of equals; None where no family has one."""
    known = [(name, found) for name, curve in curves.items() if (found := value(curve)) is not None]
    return max(known, key=lambda pair: pair[1], default=None)


def bars(
    rows: Sequence[Row],
    ours: str = "auto",
    outcomes: Mapping[str, Sequence[Mapping[str, float | None]]] | None = None,
) -> list[Bar]:
    """All bars of the cache benchmark, for the family `ours`.

    outcomes: recipe -> its single runs with `psnr` (None: identical) and `latent_error`, for the tolerance.
    """
    mine = [row for row in rows if not row.get("control") and family(row) == ours]
    found = [against_peers(rows, mine, psnr) for psnr in PSNRS]
    return [
        *found,
        against_fewer_steps(rows, mine),
        against_oracle(rows, mine),
        tolerance(mine, outcomes or {}),
    ]


def against_peers(rows: Sequence[Row], mine: Sequence[Row], psnr: float) -> Bar:
    """The largest speed-up at `psnr` dB against that of the best peer."""
    question = f"{FASTER_THAN_PEERS} x the best peer's speed-up at {psnr:g} dB"
    peers = curves(row for row in rows if str(row.get("control") or "").startswith("peer:"))
    if not points(mine):
        return Bar(question, None, "no row of ours")
    if not peers:
        return Bar(question, None, "no peer was measured")
    own, other = speedup_at(points(mine), psnr), best(peers, lambda curve: speedup_at(curve, psnr))
    if own is None:
        theirs = "no peer reaches it either" if other is None else f"{other[0]} {other[1]:.2f}x"
        return Bar(question, False, f"ours never reaches {psnr:g} dB; {theirs}")
    if other is None:
        return Bar(question, True, f"ours {own:.2f}x; no peer reaches {psnr:g} dB")
    ratio = own / other[1]
    return Bar(
        question,
        ratio >= FASTER_THAN_PEERS,
        f"ours {own:.2f}x, {other[0]} {other[1]:.2f}x: ratio {ratio:.2f}",
    )


def against_fewer_steps(rows: Sequence[Row], mine: Sequence[Row]) -> Bar:
    """The smallest lead over the best solver with fewer steps at the same time, over all settings of ours."""
    question = f"{ABOVE_CONTROL_DB:g} dB above fewer steps at equal time"
    controls = curves(row for row in rows if row.get("control") == "fewer_steps")
    if not points(mine) or not controls:
        return Bar(question, None, "no row of ours" if not points(mine) else "no control was measured")
    leads = []
    for point in points(mine):
        other = best(controls, lambda curve, speed=point.speedup: psnr_at(curve, speed))  # type: ignore[misc]
        lead = math.inf if other is None or math.isinf(point.psnr) else point.psnr - other[1]
        rival = "no control is so fast" if other is None else f"{other[0]} {other[1]:.1f} dB"
        leads.append((lead, f"ours {point.psnr:.1f} dB at {point.speedup:.2f}x, {rival}"))
    lead, numbers = min(leads)
    return Bar(question, lead >= ABOVE_CONTROL_DB, f"least lead {lead:.1f} dB: {numbers}")


def against_oracle(rows: Sequence[Row], mine: Sequence[Row]) -> Bar:
    """The smallest share of the oracle's PSNR, over the settings of ours that have an oracle row."""
    question = f"{OF_ORACLE:.0%} of the oracle's PSNR at equal computed steps"
    oracles = {str(row["recipe"]): row for row in rows if row.get("control") == "oracle"}
    shares = []
    for row in mine:
        oracle = oracles.get(oracle_name(str(row["recipe"])))
        own, limit = points([row]), points([oracle] if oracle else [])
        if own and limit:
            share = 1.0 if math.isinf(own[0].psnr) else own[0].psnr / limit[0].psnr
            shares.append((share, f"{row['recipe']} {own[0].psnr:.1f} of {limit[0].psnr:.1f} dB"))
    if not shares:
        return Bar(question, None, "no oracle row of ours")
    share, numbers = min(shares)
    return Bar(question, share >= OF_ORACLE, f"least share {share:.0%}: {numbers}")


def tolerance(mine: Sequence[Row], outcomes: Mapping[str, Sequence[Mapping[str, float | None]]]) -> Bar:
    """The smallest share of runs within the tolerance that the setting names (`psnr=30`, `latent_error=0.02`)."""
    question = f"a named tolerance met on {TOLERANCE_MET:.0%} of the runs"
    shares = []
    for name in (str(row["recipe"]) for row in mine):
        named, runs = named_tolerance(name), outcomes.get(name)
        if named is not None and runs:
            shares.append(
                (statistics.fmean(within(run, *named) for run in runs), f"{name}, {len(runs)} runs")
            )
    if not shares:
        return Bar(question, None, "no setting of ours names a tolerance")
    share, numbers = min(shares)
    return Bar(question, share >= TOLERANCE_MET, f"least share {share:.0%}: {numbers}")


def named_tolerance(recipe: str) -> tuple[str, float] | None:
    """("psnr", 30.0) of "auto @ budget.psnr=30"; None where the setting names no tolerance."""
    for setting in recipe.partition(SETTING)[2].split(", "):
        key, equals, value = setting.partition("=")
        name = key.rpartition(".")[2]
        if equals and name in ("psnr", "latent_error"):
            return name, float(value)
    return None


def within(run: Mapping[str, float | None], metric: str, limit: float) -> bool:
    """Whether one run keeps the tolerance: a PSNR of at least, an error of at most the limit."""
    value = run[metric]
    if metric == "psnr":
        return value is None or value >= limit
    return value is not None and value <= limit


def oracle_name(recipe: str) -> str:
    """The row of the best schedules with as many computed steps as `recipe` took."""
    return f"{recipe}, oracle schedule"
