"""The report on a decode loop as one self-contained page: numbers, warnings, who guessed what at which depth, recipe."""

from __future__ import annotations

from hasten.report_decode import DecodeReport
from hasten.report_page import facts, page, rows, tiles, yaml_of


def render(report: DecodeReport) -> str:
    """The page of `report` as HTML text, UTF-8."""
    paper = f" - {report.recipe.paper}" if report.recipe and report.recipe.paper else ""
    sections = [
        tiles([
            (f"{report.tokens_per_forward:.2f}", "tokens per forward of a row"),
            (f"{report.written:,} / {len(report.rounds):,}", "tokens / forwards behind prompts"),
            (report.exactness.partition(";")[0], "compared with the model's own texts"),
        ]),
        rows("Who guessed", [{"drafter": name} | _row(pair) for name, pair in report.drafters.items()]),
        rows("At which depth", [{"depth": str(at)} | _row(pair) for at, pair in report.depths.items()]),
        facts("Seconds", {part: f"{value:.3g}" for part, value in report.seconds.items()}),
        facts("Calls of generate", report.calls),
        facts("Request", report.extras),
        yaml_of(report.recipe),
        facts("Hardware", report.hardware),
        facts("Versions", report.versions),
    ]  # fmt: skip
    return page(report.name, f"hasten report, {report.model}{paper}", report.warnings, sections)


def _row(pair: tuple[int, int]) -> dict[str, str]:
    return {"read": f"{pair[0]:,}", "accepted": f"{pair[1]:,}", "share": f"{pair[1] / max(pair[0], 1):.0%}"}
