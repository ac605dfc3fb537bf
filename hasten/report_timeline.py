"""The step x block timeline as inline SVG: every evaluation a column, every block a row, every decision a cell.

Actions differ in colour *and* in a sign (none, two bars, a slash, a dot, a cross), so that it reads without colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from hasten.bands import Band
from hasten.report_style import GUTTER, canvas, column
from hasten.trace import Attended, Run

VERBS = {
    "compute": "computed", "sparse": "computed, attention sparse", "reuse": "reused", "forecast": "forecast", "skip": "skipped",
}  # fmt: skip
"""What a cell may be -> its words in the legend."""

Sparse = Mapping[tuple[int, str, int], float]
"""(step, site, block) -> share of the pairs that its sparse attention read."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A rectangle of the drawing, in pixels."""

    kind: str
    x: float
    y: float
    width: float
    height: float


def sparse_blocks(calls: Iterable[Attended], sites: Iterable[str]) -> Sparse:
    """Which blocks of `sites` attended sparsely; several calls of a block (self, cross) are averaged."""
    known, found = sorted(sites, key=len, reverse=True), dict[tuple[int, str, int], list[float]]()
    for call in calls:
        site = next((site for site in known if call.site.startswith(site + ".")), None)
        number = call.site[len(site) + 1 :].partition(".")[0] if site is not None else ""
        if site is not None and call.sparse and number.isdecimal():
            found.setdefault((call.step, site, int(number)), []).append(call.density)
    return {key: sum(shares) / len(shares) for key, shares in found.items()}


def draw_timeline(run: Run, bands: Sequence[Band], steps: int, calls: Sequence[Attended] = ()) -> str:
    """One SVG for the bands of one branch: a strip of rows per site (a row per block), a column per step.

    calls: attention of the same branch; computed blocks whose attention was sparse are drawn apart.
    """
    width, top, parts, cells = column(steps), 0, list[str](), list[Cell]()
    sparse = sparse_blocks(calls, {band.site for band in bands})
    for site in dict.fromkeys(band.site for band in bands):
        mine = [band for band in bands if band.site == site]
        num = max(band.stop for band in mine)
        row = 28 if num == 1 else max(4, min(16, 240 // num))
        top += 18
        what = "whole network" if num == 1 else f"{num} blocks"
        parts.append(f'<text x="{GUTTER}" y="{top - 5}">{escape(site)}, {what}</text>')
        if num > 1:
            ends = ((1, top + min(row, 9)), (num, top + num * row - 1))
            parts += [f'<text class="end" x="{GUTTER - 6}" y="{y}">{block}</text>' for block, y in ends]
        for band in mine:
            for start, stop, density in _split(band, sparse):
                x, y = GUTTER + band.step * width, top + start * row
                drawn = list(_cells(band, density is not None, x, y, width - 1, (stop - start) * row - 1))
                cells += drawn
                rectangles = "".join(map(rectangle, drawn))
                parts.append(f"<g><title>{escape(_title(run, band, start, stop, density))}</title>{rectangles}</g>")
        top += num * row + 6
    every = next(k for k in (1, 2, 5, 10, 20, 50, 100, 10**9) if k * width >= 24)
    for step in range(0, steps, every):
        x = GUTTER + step * width + width // 2
        parts.append(f'<text class="mid" x="{x}" y="{top + 9}">{step}</text>')
    parts.append(f'<text class="end" x="{GUTTER - 6}" y="{top + 9}">step</text>')
    return (
        f'<svg class="drawn" role="img" aria-label="Timeline: what was computed and what was replaced, per step and block"'
        f' width="{canvas(steps)}" height="{top + 14}">{"".join(parts)}{signs(cells)}</svg>'
    )


def _split(band: Band, sparse: Sparse) -> Iterator[tuple[int, int, float | None]]:
    """(first block, end, density) of the parts of a band that attended alike; density None where not sparsely."""
    start, before = band.start, _density(band, band.start, sparse)
    for block in range(band.start + 1, band.stop):
        density = _density(band, block, sparse)
        if density != before:
            yield start, block, before
            start, before = block, density
    yield start, band.stop, before


def _density(band: Band, block: int, sparse: Sparse) -> float | None:
    return sparse.get((band.step, band.site, block)) if band.action == "compute" else None


def _cells(band: Band, sparse: bool, x: int, y: int, width: int, height: int) -> Iterator[Cell]:
    """The rectangle of a band; two beside each other where the rest of the batch was skipped."""
    covered = round(width * band.share)
    for kind, left, wide in (("sparse" if sparse else band.action, x, covered), ("skip", x + covered, width - covered)):
        if wide:
            yield Cell(kind, left, y, wide, height)


def rectangle(cell: Cell) -> str:
    """A cell without its sign."""
    return f'<rect class="{cell.kind}" x="{cell.x:g}" y="{cell.y:g}" width="{cell.width:g}" height="{cell.height:g}"/>'


def signs(cells: Iterable[Cell]) -> str:
    """The signs of all cells, as one path for each kind: thousands of cells stay quick."""
    paths: dict[str, list[str]] = {}
    for cell in cells:
        if cell.kind != "compute":
            paths.setdefault(cell.kind, []).append(_sign(cell))
    return "".join(f'<path class="sign on-{kind}" d="{"".join(lines)}"/>' for kind, lines in paths.items())


def _sign(cell: Cell) -> str:
    x, y = cell.x + cell.width / 2, cell.y + cell.height / 2
    wide, high = min(3.5, cell.width / 2 - 1), min(3.5, cell.height / 2 - 0.7)
    if wide <= 0:
        return ""
    if cell.kind == "reuse":
        gap = min(2.0, high)
        return f"M{x - wide:g} {y - gap:g}h{2 * wide:g}M{x - wide:g} {y + gap:g}h{2 * wide:g}"
    if cell.kind == "forecast":
        return f"M{x - wide:g} {y + high:g}l{2 * wide:g} {-2 * high:g}"
    if cell.kind == "sparse":
        return f"M{x - wide:g} {y:g}h{2 * wide:g}M{x:g} {y - high:g}v{2 * high:g}"
    return f"M{x - 0.8:g} {y:g}h1.6"


def swatch(kind: str) -> str:
    """A cell for a legend."""
    cell = Cell(kind, 1, 1, 24, 14)
    return f'<svg class="drawn" width="26" height="16" aria-hidden="true">{rectangle(cell)}{signs([cell])}</svg>'


def _title(run: Run, band: Band, start: int, stop: int, density: float | None) -> str:
    """The text shown when the pointer rests on a cell."""
    event = band.event
    time = f", time {run.times[band.step]:.4g}" if band.step < len(run.times) else ""
    blocks = f"blocks {start + 1}-{stop} " if stop - start > 1 else f"block {start + 1} "
    parts = [f"step {band.step} of {run.steps}{time}: {blocks}{VERBS[band.action]}"]
    if density is not None:
        parts.append(f"attention sparse, {density:.1%} of the pairs")
    if band.share < 1:
        parts.append(f"for {band.share:.0%} of the batch, the rest skipped")
    if event is not None:
        if event.signal is not None:
            limit = "" if event.threshold is None else f" against limit {event.threshold:.4g}"
            parts.append(f"signal {event.signal:.4g}{limit}")
        if event.seconds is not None:
            parts.append(f"{1000 * event.seconds:.3g} ms")
        if event.why:
            parts.append(event.why)
    return "; ".join(parts)
