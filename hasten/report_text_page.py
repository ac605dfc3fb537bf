"""The report on a language model as one self-contained page: numbers, warnings, layers against phases, recipe."""

from __future__ import annotations

from html import escape

from hasten.report_forms import readable_bytes
from hasten.report_page import facts, page, rows, tiles, yaml_of
from hasten.report_style import GUTTER, canvas, column
from hasten.report_text import PHASES, TextReport
from hasten.trace import Reading

HEIGHT = 64
"""Of a bar that stands for everything, in pixels."""


def render(report: TextReport) -> str:
    """The page of `report` as HTML text, UTF-8."""
    paper = f" - {report.recipe.paper}" if report.recipe and report.recipe.paper else ""
    sections = [
        _tiles(report),
        *(_picture(phase, [row for row in report.rows if row.phase == phase]) for phase in report.phases),
        rows("Layer by layer", [_row(row) for row in report.rows]),
        facts("Request", report.extras),
        yaml_of(report.recipe),
        facts("Hardware", report.hardware),
        facts("Versions", report.versions),
    ]
    return page(report.name, f"hasten report, {report.model}{paper}", report.warnings, sections)


def _tiles(report: TextReport) -> str:
    shown = []
    for phase, whole in report.phases.items():
        recall = "" if whole.recall is None else f", {whole.recall:.1%} of the mass by estimate"
        shown.append((f"{whole.density:.1%}", f"of the pairs read by {PHASES[phase]}{recall}"))
        shown.append((f"{whole.sparse:,} / {whole.calls:,}", f"attention calls sparse, {PHASES[phase]}"))
    return tiles([*shown, (readable_bytes(report.bytes_held), "held beside the model's own cache, at most")])


def _picture(phase: str, layers: list[Reading]) -> str:
    """Bars: how much each layer read. What it left out is drawn above it, in another pattern."""
    width, parts = column(len(layers)), []
    for at, row in enumerate(layers):
        x, read = GUTTER + at * width, round(HEIGHT * row.density)
        parts.append(f"<g><title>{escape(_about(row))}</title>")
        if read < HEIGHT:
            parts.append(f'<rect class="skip" x="{x}" y="20" width="{width - 1}" height="{HEIGHT - read}"/>')
        parts.append(f'<rect class="compute" x="{x}" y="{20 + HEIGHT - read}" width="{width - 1}" height="{read}"/></g>')
    for at in {0, len(layers) - 1}:
        middle = GUTTER + at * width + width // 2
        parts.append(f'<text class="mid" x="{middle}" y="{HEIGHT + 33}">{layers[at].layer}</text>')
    parts.append(f'<text class="end" x="{GUTTER - 6}" y="{HEIGHT + 33}">layer</text>')
    title = f"Share of the pairs that {PHASES[phase]} read, layer by layer"
    svg = (
        f'<svg class="drawn" role="img" aria-label="{escape(title)}" width="{canvas(len(layers))}" height="{HEIGHT + 40}">'
        f'<text x="{GUTTER}" y="13">{escape(title)}</text>{"".join(parts)}</svg>'
    )
    return f'<section><div class="scroll" tabindex="0">{svg}</div></section>'


def _row(row: Reading) -> dict[str, str]:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    return {
        "layer": str(row.layer), "phase": PHASES[row.phase], "sparse calls": f"{row.sparse:,}", "dense calls": f"{row.dense:,}",
        "read by sparse calls": share(row.of_sparse), "read by all": share(row.density), "mass by estimate": share(row.recall),
    }  # fmt: skip


def _about(row: Reading) -> str:
    """The text shown when the pointer rests on a bar."""
    recall = "" if row.recall is None else f", {row.recall:.1%} of the mass"
    return f"{row.site}: {row.sparse:,} of {row.calls:,} calls sparse, {row.density:.1%} of the pairs{recall}"
