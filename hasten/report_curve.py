"""Speed-up against similarity as a standalone SVG: one line per method, named beside it in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 860, 460
LEFT, RIGHT, TOP, BOTTOM = 56, 290, 34, 44
_COLOURS = ("#0063a6", "#b35900", "#00875f", "#8a1c00", "#6a4fb3", "#8f7a00", "#00808a", "#a8327d")
_DASHES = ("", "6 3", "2 3", "9 3 2 3")
_TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)

STYLE = """text{font:11px system-ui,sans-serif;fill:#5b6570}.title{font-size:13px;fill:#1c2024}.end{text-anchor:end}
.mid{text-anchor:middle}.grid{stroke:#d9dee3}.line{fill:none;stroke-width:1.4}.first{stroke-width:3}
@media (prefers-color-scheme:dark){.ground{fill:#14171a}.grid{stroke:#333b43}text{fill:#9aa5b1}.title{fill:#e8ebee}}"""


def draw_curves(
    title: str, curves: Mapping[str, Sequence[tuple[float, float]]], first: Sequence[str] = ()
) -> str:
    """SVG of (speed-up, PSNR in dB) per method; the methods named in `first` are drawn thick and listed first.

    Identical outputs (infinite PSNR) have no place on the axis and are left out; so are methods without another point.
    """
    kept = {
        name: sorted(p for p in points if math.isfinite(p[1]) and p[0] > 0) for name, points in curves.items()
    }
    order = sorted((name for name, points in kept.items() if points), key=lambda name: name not in first)
    across, down = _axes([point for name in order for point in kept[name]])
    parts = [
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        *_frame(title, across, down),
    ]
    for number, name in enumerate(order):
        colour, dash = _COLOURS[number % len(_COLOURS)], _DASHES[number // len(_COLOURS) % len(_DASHES)]
        line = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in kept[name])
        thick = " first" if name in first else ""
        stroke = f'class="line{thick}" stroke="{colour}" stroke-dasharray="{dash}"'
        parts.append(f'<polyline {stroke} points="{line}"/>')
        parts += [
            f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{colour}">'
            f"<title>{escape(name)}: {x:.2f}x, {y:.1f} dB</title></circle>"
            for x, y in kept[name]
        ]
        y = TOP + 14 * number
        parts.append(
            f'<line {stroke} x1="{WIDTH - RIGHT + 16}" x2="{WIDTH - RIGHT + 42}" y1="{y}" y2="{y}"/>'
        )
        parts.append(f'<text x="{WIDTH - RIGHT + 48}" y="{y + 4}">{escape(name)}</text>')
    height = max(HEIGHT, TOP + 14 * len(order) + 10)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(title, quote=True)}"'
        f' viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _axes(points: Sequence[tuple[float, float]]) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Speed-up -> x on a logarithmic axis, PSNR -> y on a linear one, so that all points have room."""
    slow = min([1.0, *(x for x, _ in points)])
    fast = max([2.0, *(x for x, _ in points)])
    low = 10 * math.floor(min([20.0, *(y for _, y in points)]) / 10)
    high = 10 * math.ceil(max([50.0, *(y for _, y in points)]) / 10)

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(x / slow) / math.log(fast / slow)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)

    return across, down


def _frame(title: str, across: Callable[[float], float], down: Callable[[float], float]) -> list[str]:
    """Title, grid and labels."""
    parts = [f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>']
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for tick in _TICKS:
        if LEFT - 1 <= across(tick) <= right + 1:
            parts.append(
                f'<line class="grid" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{TOP}" y2="{bottom}"/>'
            )
            parts.append(f'<text class="mid" x="{across(tick):.1f}" y="{bottom + 16}">{tick:g}x</text>')
    for decibel in range(0, 200, 5):
        if TOP - 1 <= down(decibel) <= bottom + 1:
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{down(decibel):.1f}" y2="{down(decibel):.1f}"/>'
            )
            parts.append(f'<text class="end" x="{LEFT - 6}" y="{down(decibel) + 4:.1f}">{decibel}</text>')
    parts.append(
        f'<text class="mid" x="{(LEFT + right) / 2}" y="{bottom + 34}">speed-up of the whole call</text>'
    )
    parts.append(f'<text x="{LEFT - 46}" y="{TOP - 6}">PSNR in dB</text>')
    return parts
