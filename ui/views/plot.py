"""Plots that stretch with the page: lines are SVG, points and numbers are HTML that keeps its size.

Everything is placed in per cent of the plot, so that a plot is as readable at 390 pixels as on a desktop.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hasten.ui.views.markup import text


@dataclass(frozen=True, slots=True)
class Axis:
    """From `low` to `high`, which differ; log: needs low > 0. unit: written behind each tick."""

    low: float
    high: float
    name: str
    unit: str = ""
    log: bool = False

    @classmethod
    def around(
        cls, values: Iterable[float], name: str, unit: str = "", *, log: bool = False, room: float = 0.06
    ) -> Axis:
        """An axis that holds all finite values, with room at both ends. Values that a logarithm has not are left out."""
        found = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
        low, high = min(found), max(found)
        if log:
            room = max(room * math.log(high / low), 0.05)
            return cls(low * math.exp(-room), high * math.exp(room), name, unit, True)
        room = max(room * (high - low), abs(high) * 1e-3, 1e-9)
        return cls(low - room, high + room, name, unit)

    def at(self, value: float) -> float:
        """Where a value stands, 0 to 100."""
        if self.log:
            value = max(value, self.low)
            return 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside the axis, at most about `most`."""
        if self.log and self.high / self.low > 8:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps: tuple[int, ...] = (1,) if len(powers) > most else (1, 2, 5)
            fine = [step * 10.0**power for power in powers for step in steps]
            return [tick for tick in fine if self.low <= tick <= self.high]
        rough = (self.high - self.low) / most
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * k for k in (1, 2, 5, 10) if size * k >= rough)
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, math.floor(self.high / step) + 1)]


def line(across: Axis, down: Axis, points: Sequence[tuple[float, float]], kind: str) -> str:
    """A line through `points` as SVG for `frame`."""
    steps = " ".join(f"{across.at(x):.2f},{100 - down.at(y):.2f}" for x, y in points)
    return f'<polyline class="{kind}" points="{steps}"/>'


def rule(down: Axis, y: float, kind: str) -> str:
    """A level line as SVG."""
    at = 100 - down.at(y)
    return f'<line class="{kind}" x1="0" x2="100" y1="{at:.2f}" y2="{at:.2f}"/>'


def place(across: Axis, down: Axis, x: float, y: float) -> str:
    """The `style` that puts an HTML mark onto a point."""
    return f"left:{across.at(x):.2f}%;top:{100 - down.at(y):.2f}%"


def frame(across: Axis, down: Axis, lines: str, marks: str = "", *, name: str, kind: str = "") -> str:
    """A plot with grid and ticks. lines: SVG in the coordinates of `line`. marks: HTML placed by `place`. name: for screen readers."""
    grid, numbers = [], []
    for tick in across.ticks():
        grid.append(f'<line class="hv-grid" x1="{across.at(tick):.2f}" x2="{across.at(tick):.2f}" y1="0" y2="100"/>')
        numbers.append(f'<span class="hv-x" style="left:{across.at(tick):.2f}%">{tick:.6g}{text(across.unit)}</span>')
    for tick in down.ticks(6):
        grid.append(rule(down, tick, "hv-grid"))
        numbers.append(f'<span class="hv-y" style="top:{100 - down.at(tick):.2f}%">{tick:.6g}{text(down.unit)}</span>')
    svg = (
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{text(name)}">'
        f"{''.join(grid)}{lines}</svg>"
    )
    return (
        f'<div class="hv-plot {kind}"><p class="hv-axis-y" aria-hidden="true">{text(down.name)}</p>'
        f'<div class="hv-area">{svg}<div class="hv-ticks" aria-hidden="true">{"".join(numbers)}</div>{marks}</div>'
        f'<p class="hv-axis-x" aria-hidden="true">{text(across.name)}</p></div>'
    )
