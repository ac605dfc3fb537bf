"""Two runs of the same prompt, frame by frame: wipe, side by side, blink, or their difference made visible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.errors import UsageError
from hasten.ui.views.markup import empty, source, text, view

MODES = {"wipe": "Wipe", "side": "Side by side", "blink": "Blink", "difference": "Difference"}
TINY = 160
"""Clips narrower than this are enlarged without smoothing."""

_ICONS = {
    "play": "M4 2.5v11l9.5-5.5z", "pause": "M4 2.5h3v11H4zM9 2.5h3v11H9z",
    "previous": "M12 2.5v11L5 8zM3.5 2.5H5v11H3.5z", "next": "M4 2.5v11L11 8zM11 2.5h1.5v11H11z",
}  # fmt: skip


def player(about: Mapping[str, Any]) -> str:
    """HTML of a comparison.

    about: `runs` ([{"label", "url"}], two or more; the first two are shown first), `kind` ("video" or "image"), `width`,
    `height` (pixels), and for videos `frames` and `fps`; optional `mode` (one of `MODES`), `group` (views with the same one
    seek together), `pixelated` (default: for clips of up to 160 pixels). Raises `UsageError` for a URL of another host.
    """
    runs: Sequence[Mapping[str, Any]] = about.get("runs") or ()
    if len(runs) < 2:
        return empty("player", "Comparison", "Nothing to compare yet: a comparison needs two runs of the same prompt.")
    kind, mode = about.get("kind", "video"), about.get("mode") or "wipe"
    if kind not in ("video", "image") or mode not in MODES:
        raise UsageError(f"A player shows a video or an image as {', '.join(MODES)}; got kind {kind!r}, mode {mode!r}.")
    width, height = int(about.get("width") or 16), int(about.get("height") or 9)
    frames, fps = int(about.get("frames") or 1), float(about.get("fps") or 16)
    pixelated = about.get("pixelated", width <= TINY)
    moving = kind == "video" and frames > 1
    hint = "Arrow keys: frame. Space: play. S: swap. 1 to 4: view." if moving else "S: swap. 1 to 4: view."
    wide = max(480, min(16 * width if pixelated else width, 800))
    inner = "".join(
        (
            _stage(kind, runs, mode, width, height, bool(pixelated)),
            _time(frames) if moving else "",
            f'<div class="hv-row">{_modes(mode)}{_gain()}</div>',
            f'<div class="hv-row hv-ends">{_choice("a", "Left", runs, 0)}{_SWAP}{_choice("b", "Right", runs, 1)}</div>',
            f'<p class="hv-hint">{hint}</p>',
        )
    )
    return view(
        "player", f"Comparison of {runs[0]['label']} and {runs[1]['label']}", f'<div class="hv-keys" style="--least:{wide}px" tabindex="0" role="group"'
        f' aria-label="Player: {text(hint)}">{inner}</div>', fps=f"{fps:g}", frames=str(frames), group=str(about.get("group") or ""),
    )  # fmt: skip


_SWAP = '<button type="button" class="hv-button" data-do="swap" aria-keyshortcuts="s">Swap</button>'


def _stage(kind: str, runs: Sequence[Mapping[str, Any]], mode: str, width: int, height: int, pixelated: bool) -> str:
    sides = []
    for side, run in zip("ab", runs, strict=False):
        name, url = text(run["label"]), source(run["url"])
        media = (
            f'<video class="hv-media" muted loop playsinline preload="auto" aria-label="{name}" src="{url}"></video>'
            if kind == "video"
            else f'<img class="hv-media" alt="{name}" src="{url}">'
        )
        sides.append(f'<div class="hv-side hv-{side}">{media}<span class="hv-tag" aria-hidden="true">{name}</span></div>')
    return (
        f'<div class="hv-stage{" hv-pixels" if pixelated else ""}" data-mode="{text(mode)}" style="--ratio:{width}/{height}">{"".join(sides)}'
        '<div class="hv-handle" aria-hidden="true"></div>'
        '<input class="hv-wipe" type="range" min="0" max="100" step="0.5" value="50" aria-label="Wipe between left and right"></div>'
    )


def _time(frames: int) -> str:
    return (
        f'<div class="hv-row hv-time">{_icon("play", "Play", "Space")}{_icon("previous", "Previous frame", "ArrowLeft")}'
        f'<input type="range" class="hv-range" data-do="time" min="0" max="{frames - 1}" step="1" value="0" aria-label="Frame">'
        f'{_icon("next", "Next frame", "ArrowRight")}<output class="hv-number" data-part="frame">1 / {frames}</output></div>'
    )


def _icon(name: str, label: str, key: str) -> str:
    """A button with a picture; the play button has a second one for pause."""
    paths = "".join(f'<path class="hv-{which}" d="{_ICONS[which]}"/>' for which in (["play", "pause"] if name == "play" else [name]))
    return (
        f'<button type="button" class="hv-button hv-icon" data-do="{name}" aria-label="{label}" aria-keyshortcuts="{key}">'
        f'<svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">{paths}</svg></button>'
    )


def _modes(chosen: str) -> str:
    """A row of radio buttons; their group name is made unique by the script."""
    options = "".join(
        f'<label><input type="radio" name="hv-mode" value="{mode}"{" checked" if mode == chosen else ""}><span>{label}</span></label>'
        for mode, label in MODES.items()
    )
    return f'<fieldset class="hv-segments"><legend class="hv-hidden">View</legend>{options}</fieldset>'


def _gain() -> str:
    return (
        '<label class="hv-gain" hidden><span>Amplify</span> <input type="range" class="hv-range" data-do="gain" min="0" max="6" step="1"'
        ' value="3" aria-label="Amplify the difference"> <output class="hv-number" data-part="gain">8×</output></label>'
    )


def _choice(side: str, label: str, runs: Sequence[Mapping[str, Any]], chosen: int) -> str:
    options = "".join(
        f'<option value="{source(run["url"])}"{" selected" if at == chosen else ""}>{text(run["label"])}</option>'
        for at, run in enumerate(runs)
    )
    return f'<label class="hv-choice"><span>{label}</span> <select data-do="{side}">{options}</select></label>'
