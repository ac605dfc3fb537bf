"""How much attention read: a strip of layers against steps, averaged over heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.report_style import GUTTER, canvas, column
from hasten.trace import Attended
from hasten.ui.views.markup import empty, share, text, view
from hasten.ui.views.timeline import trace_of


def density(about: Mapping[str, Any]) -> str:
    """HTML of the strip. about: `Report.to_dict()`, or its keys `runs` and `attention` (calls with the mean over heads)."""
    trace = trace_of({key: about[key] for key in ("runs", "attention") if key in about})
    run = trace.runs[-1] if trace.runs else None
    calls = [call for call in trace.attention if run is None or call.run == run.index]
    if not any(call.sparse for call in calls):
        return empty("density", "Attention density", "Attention was dense: no plan acted in this run.")
    branches = sorted({call.branch for call in calls})
    strips = "".join(_strip([call for call in calls if call.branch == branch], branch, len(branches) > 1) for branch in branches)
    pairs = [call.tokens**2 for call in calls]
    mean = sum(call.density * num for call, num in zip(calls, pairs, strict=True)) / max(1, sum(pairs))
    known = [call.recall for call in calls if call.recall is not None]
    told = f"{share(round(mean, 3))} of the pairs of query and key were read"
    told += f"; they hold {share(round(sum(known) / len(known), 3))} of the attention by estimate" if known else ""
    inner = (
        f'<div class="hv-head"><h3>What attention read</h3><p class="hv-number">{text(told)}</p></div>'
        f'<div class="hv-scroll" tabindex="0" role="group" aria-label="Drawing; scroll it sideways">{strips}</div>'
        '<p class="hv-said" data-said="Point at a cell for its number.">Point at a cell for its number.</p>'
        '<p class="hv-scale" aria-hidden="true"><span>nothing</span><i></i><span>every pair</span></p>'
    )
    return view("density", "Attention density: layers against steps", inner)


def _strip(calls: Sequence[Attended], branch: int, several: bool) -> str:
    """One drawing: calls of the same layer and step (self and cross attention) are averaged."""
    cells: dict[tuple[int, int], list[Attended]] = {}
    for call in calls:
        cells.setdefault((call.layer, call.step), []).append(call)
    steps, layers = max(call.step for call in calls) + 1, max(call.layer for call in calls) + 1
    wide, row = column(steps), max(5, min(18, 260 // layers))
    parts = []
    for (layer, step), group in sorted(cells.items()):
        read = sum(call.density for call in group) / len(group)
        known = [call.recall for call in group if call.recall is not None]
        about = f"step {step}, layer {layer} ({group[0].site}): {read:.1%} of the pairs" + (
            f", {sum(known) / len(known):.1%} of the mass" if known else "" if any(call.sparse for call in group) else ", dense"
        )
        parts.append(
            f'<g><title>{text(about)}</title><rect class="hv-heat" style="--read:{100 * read:.0f}%" x="{GUTTER + step * wide}"'
            f' y="{layer * row}" width="{wide - 1}" height="{row - 1}"/></g>'
        )
    numbers = "".join(f'<text class="end" x="{GUTTER - 6}" y="{layer * row + min(row, 11)}">{layer}</text>' for layer in {0, layers - 1})
    every = next(k for k in (1, 2, 5, 10, 20, 50, 100, 10**9) if k * wide >= 24)
    below = "".join(
        f'<text class="mid" x="{GUTTER + step * wide + wide / 2:g}" y="{layers * row + 13}">{step}</text>' for step in range(0, steps, every)
    )
    title = f'<p class="hv-branch">Branch {branch}</p>' if several else ""
    return (
        f'{title}<svg class="drawn" role="img" aria-label="Share of the pairs that attention read, layers against steps"'
        f' width="{canvas(steps)}" height="{layers * row + 18}">{"".join(parts)}{numbers}{below}</svg>'
    )
