"""A card for each run beside the plain one: how much faster, how much computed, how alike, and what a judge reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.ui.views.markup import decibel, empty, number, seconds, share, text, view
from hasten.ui.views.plot import Axis, frame, line, rule

NOTE = "PSNR and SSIM say how alike a run is to the plain run, not how good it is."


def metrics(about: Mapping[str, Any]) -> str:
    """HTML of the cards.

    about: `rows` (as `hasten compare --json` writes them; the one called plain is the reference), optional `noise_floor`
    (PSNR in dB of the plain run with another seed), `by_frame` ({recipe: [PSNR in dB per frame, None where identical]}) and
    `group` (a click into a card's line seeks the player of the same group).
    """
    rows: Sequence[Mapping[str, Any]] = about.get("rows") or ()
    if not rows:
        return empty("metrics", "Measurements", "Nothing measured yet.")
    plain = next((row for row in rows if row.get("recipe") == "plain"), None)
    floor = number(about, "noise_floor")
    lines: Mapping[str, Sequence[float | None]] = about.get("by_frame") or {}
    cards = "".join(
        _card(row, plain, floor, lines.get(str(row.get("recipe"))) or ()) for row in rows if row is not plain or len(rows) == 1
    )
    note = NOTE
    if floor is not None:
        note += f" Noise floor: the plain run with another seed is at {decibel(floor)}; what is near it is another picture."
    return view(
        "metrics", "Measurements", f'<div class="hv-cards">{cards}</div><p class="hv-note">{text(note)}</p>',
        group=str(about.get("group") or ""),
    )  # fmt: skip


def _card(
    row: Mapping[str, Any], plain: Mapping[str, Any] | None, floor: float | None, by_frame: Sequence[float | None]
) -> str:
    speedup, same = number(row, "speedup"), row.get("exact_match") is True
    head = f"{speedup:.3g}× as fast" if speedup is not None and row is not plain else seconds(number(row, "seconds"))
    before = f" instead of {seconds(number(plain, 'seconds'))}" if plain is not None and row is not plain else ""
    facts = [
        ("Time", seconds(number(row, "seconds")) + before),
        ("Computed", _computed(row)),
        ("PSNR, median", decibel(number(row, "psnr_median"), same)),
        ("PSNR, worst", decibel(number(row, "psnr_worst"), same)),
        ("SSIM", f"{ssim:.4f}" if (ssim := number(row, "ssim_median")) is not None else "–"),
        ("Noise floor", decibel(floor)),
        ("Judge reads", _reading(row)),
    ]
    told = "".join(f"<div><dt>{name}</dt><dd>{text(value)}</dd></div>" for name, value in facts if value != "–")
    return (
        f'<article class="hv-card"><h3>{text(row.get("recipe", "run"))}</h3><p class="hv-big">{text(head)}</p>'
        f"<dl>{told}</dl>{_by_frame(str(row.get('recipe')), by_frame, floor)}</article>"
    )


def _computed(row: Mapping[str, Any]) -> str:
    """In the words of the demo where a student did the work, else the share of the network's work."""
    skipped = str(row.get("skipped") or "")
    if skipped.startswith("all but"):
        return skipped.removeprefix("all but ")
    return share(number(row, "computed_fraction"))


def _reading(row: Mapping[str, Any]) -> str:
    if not row.get("reads"):
        return "–"
    kept = number(row, "prompt_accuracy")
    return f"{row['reads']}" + ("" if kept is None else ", as the prompt says" if kept >= 1 else ", not what the prompt says")


def _by_frame(recipe: str, values: Sequence[float | None], floor: float | None) -> str:
    """PSNR of each frame as a line; a slider lies on it, so that a click or an arrow key seeks."""
    known = [(float(at), value) for at, value in enumerate(values) if value is not None]
    if len(values) < 2 or not known:
        return ""
    across = Axis(-0.5, len(values) - 0.5, "frame")
    down = Axis.around([value for _, value in known] + ([floor] if floor is not None else []), "PSNR by frame", " dB", room=0.1)
    drawn = (rule(down, floor, "hv-floor") if floor is not None else "") + line(across, down, known, "hv-line")
    said = text(" ".join(decibel(value, True) for value in values))
    marks = (
        '<i class="hv-now" aria-hidden="true"></i>'
        f'<input type="range" class="hv-seek" min="0" max="{len(values) - 1}" step="1" value="0" data-values="{said}"'
        f' aria-label="Frame of {text(recipe)}: go to it in the player">'
    )
    return frame(across, down, drawn, marks, name=f"PSNR of {recipe} by frame", kind="hv-small")
