"""What attention read, in a report: numbers, lines of text, and a picture of layers against steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import groupby
from typing import Any

from hasten.report_style import GUTTER, canvas, column
from hasten.trace import Attended

DENSE = "#"
"""Mark of a step or layer at which everything was read; digits are tenths."""


@dataclass(frozen=True, slots=True)
class Read:
    """A group of attention calls. calls, sparse: how many, and how many of them sparse. reused: with an earlier selection.

    density: share of all their pairs of query and key that were read; of_sparse: of the pairs of sparse calls.
    recall: mean estimated share of the softmax mass that sparse calls read, lowest: the smallest; None where nobody knows.
    """

    calls: int
    sparse: int
    reused: int
    density: float
    of_sparse: float | None
    recall: float | None
    lowest: float | None


def read_by(calls: Iterable[Attended]) -> Read:
    """The numbers of a group, which holds at least one call; pairs count, so that long sequences count more."""
    group = list(calls)
    sparse = [call for call in group if call.sparse]
    recalls = [call.recall for call in sparse if call.recall is not None and math.isfinite(call.recall)]
    return Read(
        len(group), len(sparse), sum(call.reused for call in sparse), _density(group), _density(sparse) if sparse else None,
        math.fsum(recalls) / len(recalls) if recalls else None, min(recalls, default=None),
    )  # fmt: skip


def _density(calls: Sequence[Attended]) -> float:
    pairs = [call.tokens**2 for call in calls]
    return math.fsum(call.density * num for call, num in zip(calls, pairs, strict=True)) / max(sum(pairs), 1)


def lines(calls: Sequence[Attended]) -> list[str]:
    """The report's lines about attention; none where no policy was asked."""
    if not calls:
        return []
    whole = read_by(calls)
    if whole.of_sparse is None:
        return [f"  attention   dense in all of {whole.calls:,} calls that might have been sparse"]
    head = f"  attention   {whole.sparse:,} of {whole.calls:,} calls sparse; they read {whole.of_sparse:.1%} of their pairs"
    head += f", all together {whole.density:.1%}" if whole.sparse < whole.calls else ""
    if whole.recall is not None and whole.lowest is not None:
        worst = min((c for c in calls if c.recall is not None and math.isfinite(c.recall)), key=lambda c: c.recall or 0.0)
        where = f"{worst.site}, step {worst.step}"
        head += f"; {whole.recall:.1%} of the mass by estimate, at least {whole.lowest:.1%} ({where})"
    elif whole.sparse:
        head += "; how much of the mass is not known, for nothing stood in for the rest"
    found = [head, f"  attention read, one character per step ({DENSE} everything, else tenths of the pairs):"]
    rows = _sorted(calls, lambda call: (call.run, call.branch, _network(call.site)))
    labels = {key: f"run {key[0]} branch {key[1]} {key[2]}" for key in rows}
    width = max(map(len, labels.values()))
    for key, mine in rows.items():
        found.append(f"  {labels[key]:<{width}}  {_marks(mine, lambda call: call.step)}")
    found.append("  and one character per layer:")
    for key, mine in rows.items():
        found.append(f"  {labels[key]:<{width}}  {_marks(mine, lambda call: call.layer)}")
    return found


def to_dict(calls: Sequence[Attended]) -> dict[str, Any] | None:
    """The same as plain data, with every call; None where no policy was asked."""
    if not calls:
        return None
    places: dict[str, Callable[[Attended], Any]] = {
        "by_step": lambda call: (call.run, call.branch, call.step), "by_layer": lambda call: (call.run, call.branch, call.site),
    }  # fmt: skip
    names = {"by_step": ("run", "branch", "step"), "by_layer": ("run", "branch", "site")}
    return {
        **asdict(read_by(calls)),
        **{
            name: [
                dict(zip(names[name], key, strict=True)) | asdict(read_by(mine)) for key, mine in _sorted(calls, place).items()
            ]
            for name, place in places.items()
        },
        "each": [asdict(call) for call in calls],
    }


def draw(calls: Sequence[Attended], total: int, columns: int) -> str:
    """One SVG for each network: a row per layer, a column per step, the darker the more was read. Empty without calls.

    total: steps that were planned. columns: steps that are drawn.
    """
    return "".join(_picture(mine, total, columns) for mine in _sorted(calls, lambda call: _network(call.site)).values())


def _picture(calls: Sequence[Attended], total: int, steps: int) -> str:
    width, layers = column(steps), max(call.layer for call in calls) + 1
    row, top = max(4, min(16, 240 // layers)), 20
    whole = read_by(calls)
    recall = "" if whole.recall is None else f", recall {whole.recall:.1%}"
    title = f"{_network(calls[0].site)}: attention of {layers} layers, {whole.density:.1%} of the pairs read{recall}"
    parts = [f'<text x="{GUTTER}" y="13">{escape(title)}</text>']
    parts += [
        f'<text class="end" x="{GUTTER - 6}" y="{top + at * row + min(row, 9)}">{at}</text>' for at in {0, layers - 1}
    ]
    for call in calls:
        about = f"step {call.step} of {total}, {call.site}: {call.action}, {call.density:.1%} of the pairs"
        about += "" if call.recall is None else f", recall {call.recall:.1%}"
        about += ", selection of an earlier step" if call.reused else ""
        parts.append(
            f'<rect class="compute" fill-opacity="{max(0.06, min(1.0, call.density)):.2f}" x="{GUTTER + call.step * width}"'
            f' y="{top + call.layer * row}" width="{width - 1}" height="{row - 1}"><title>{escape(about)}</title></rect>'
        )
    label = escape(f"Share of pairs read by attention of {_network(calls[0].site)}, layers against steps")
    return f'<svg class="drawn" role="img" aria-label="{label}" width="{canvas(steps)}" height="{top + layers * row + 6}">{"".join(parts)}</svg>'


def _marks(calls: Sequence[Attended], place: Callable[[Attended], int]) -> str:
    marks = {at: read_by(mine) for at, mine in _sorted(calls, place).items()}
    return "".join(
        " " if at not in marks else DENSE if not marks[at].sparse else str(min(9, int(10 * marks[at].density)))
        for at in range(max(marks) + 1)
    )


def _sorted(calls: Iterable[Attended], place: Callable[[Attended], Any]) -> dict[Any, list[Attended]]:
    return {key: list(mine) for key, mine in groupby(sorted(calls, key=place), key=place)}


def _network(site: str) -> str:
    return site.partition(".")[0]
