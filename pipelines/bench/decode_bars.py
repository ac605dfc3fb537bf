"""Which bars of the decoding benchmark are met: arithmetic on its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.pipelines.bench.bars import Bar
from hasten.pipelines.bench.decode_ways import EVERY, PACED

Row = Mapping[str, Any]

NEVER_BELOW = 0.97
SHARED_FASTER = 3.0
SHARED_EXACT = 1e-4
"""Largest difference of attention outputs of about unit size that rounding of float32 explains."""

FAMILIES = {"text": "drafts from texts", "model": "drafts by a smaller network"}


def bars(rows: Sequence[Row], clock: str = "speedup_processor") -> list[Bar]:
    """All bars on the rows of one model. clock: which ratio the speed bar reads: "speedup" (wall) where a GPU computes."""
    drafts = [row for row in rows if row.get("part", "drafts") == "drafts" and row.get("n")]
    works = dict.fromkeys(str(row["workload"]) for row in drafts if not row.get("adverse"))
    return [
        *(_more_accepted(drafts, work, mode, family) for work in works for mode in ("greedy", "sampled") for family in FAMILIES
          if any(_peer(row) and _at(row, work, mode) for row in drafts)),
        _never_slower(drafts, clock),
        _exact(drafts),
        _caches([row for row in rows if row.get("part") == "caches"]),
        _shared([row for row in rows if row.get("part") == "shared"]),
    ]  # fmt: skip


def _peer(row: Row) -> bool:
    return str(row.get("control", "")).startswith("peer:")


def _at(row: Row, work: str, mode: str) -> bool:
    return bool(row["workload"] == work and row["mode"] == mode and row["batch"] == 1)


def _more_accepted(rows: Sequence[Row], work: str, mode: str, family: str) -> Bar:
    """Against the best setting of transformers, with no more drafts in a round than it may have, on as many texts."""
    name = f"{work}, {mode}: more tokens per forward than transformers' best, {FAMILIES[family]}, as many or fewer allowed"
    here = [row for row in rows if _at(row, work, mode) and row.get("family") == family]
    peers, ours = [row for row in here if _peer(row)], [row for row in here if not _peer(row) and row.get("drafts_when") == EVERY]
    if not peers or not ours:
        return Bar(name, None, "no peer was measured" if not peers else "no recipe of ours was measured")
    both = {row["n"] for row in peers} & {row["n"] for row in ours}
    if not both:
        return Bar(name, None, "peers and recipes of ours were measured on other numbers of texts")
    peers, ours = ([row for row in side if row["n"] == max(both)] for side in (peers, ours))
    theirs = max(peers, key=lambda row: float(row["tokens_per_forward"]))
    fair = [row for row in ours if row["allowed"] <= theirs["allowed"]]
    if not fair:
        return Bar(name, None, f"all of ours may draft more than its {theirs['allowed']}")
    best = max(fair, key=lambda row: float(row["tokens_per_forward"]))
    said = " against ".join(f"{row['recipe']} {row['tokens_per_forward']:.2f} of {row['allowed']}" for row in (best, theirs))
    return Bar(name, best["tokens_per_forward"] > theirs["tokens_per_forward"], f"{said}, on {max(both)} texts")


def _never_slower(rows: Sequence[Row], clock: str) -> Bar:
    """The slowest of all rows whose pace may leave drafts out, on the adverse prompts, too."""
    name = f"never below {NEVER_BELOW}x of plain decoding, drafting where it pays"
    paced = [row for row in rows if row.get("drafts_when") == PACED and row.get(clock) is not None]
    if not paced:
        return Bar(name, None, "no row")
    worst = min(paced, key=lambda row: float(row[clock]))
    below = sum(row[clock] < NEVER_BELOW for row in paced)
    said = f"slowest {worst[clock]:.2f}x: {worst['recipe']}, {worst['workload']}, batch {worst['batch']}, {worst['mode']}; {below} of {len(paced)} below"
    return Bar(name, not below, said)


def _exact(rows: Sequence[Row]) -> Bar:
    name = "greedy texts are plain decoding's, token for token"
    ours = [row for row in rows if row.get("drafts_when") and not _peer(row) and row.get("exact_match") is not None]
    if not ours:
        return Bar(name, None, "no row")
    other = [row for row in ours if row["exact_match"] < 1]
    if not other:
        return Bar(name, True, f"{sum(row['n'] for row in ours)} texts in {len(ours)} rows")
    worst = min(other, key=lambda row: float(row["exact_match"]))
    where = f"{worst['recipe']}, {worst['workload']}, batch {worst['batch']}"
    return Bar(name, False, f"{len(other)} of {len(ours)} rows differ; most {where}: {worst['exact_match']:.0%} the same; {worst.get('exactness', '')}")


def _caches(rows: Sequence[Row]) -> Bar:
    name = "perplexity, needles and bytes of each cache policy at 10, 25 and 50 %"
    if not rows:
        return Bar(name, None, "not measured")
    budgets: dict[str, set[float]] = {}
    for row in rows:
        if row.get("budget") is not None:
            budgets.setdefault(str(row["recipe"]), set()).add(float(row["budget"]))
    lacking = [recipe for recipe, shares in budgets.items() if not {0.1, 0.25, 0.5} <= shares]
    full = next((row for row in rows if row.get("control") == "full"), None)
    finds = "" if full is None or full.get("finds_needles") else "; needles: letters of list tasks, for the model finds no others"
    return Bar(name, bool(budgets) and not lacking, f"{len(budgets)} policies{finds}" + (f"; incomplete: {', '.join(lacking)}" if lacking else ""))


def _shared(rows: Sequence[Row]) -> Bar:
    name = f"a prefix of 4k tokens shared by 16 rows: exact, and {SHARED_FASTER:g}x as fast as read by each"
    fair = [row for row in rows if row.get("prefix", 0) >= 4096 and row.get("batch") == 16]
    if not fair:
        return Bar(name, None, "not measured")
    slowest = min(fair, key=lambda row: float(row["speedup"]))
    error = max(float(row["largest_difference"]) for row in fair)
    return Bar(name, slowest["speedup"] >= SHARED_FASTER and error < SHARED_EXACT, f"{slowest['speedup']:.1f}x, largest difference {error:.1e}")
