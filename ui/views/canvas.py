"""A text that was written in any order: each token in the colour of the step that revealed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.ui.views.markup import empty, text, view


def canvas(about: Mapping[str, Any]) -> str:
    """HTML of one text.

    about: `tokens` ([{"text", "step"}]; step counts from 0, None or negative where it is still masked; `given`: true for the
    prompt), `steps` (default: as many as there were) and `play` (true: it is shown being written, once). The slider and its button
    show the text as it stood after each step.
    """
    tokens: Sequence[Mapping[str, Any]] = about.get("tokens") or ()
    if not tokens:
        return empty("canvas", "Text", "No text yet: it fills in here, and colours say how it came about.")
    revealed = [step for token in tokens if not token.get("given") and (step := _step(token)) is not None]
    steps = max(int(about.get("steps") or 0), max(revealed, default=-1) + 1, 1)
    words = "".join(_token(token, steps) for token in tokens)
    inner = (
        f'<div class="hv-head"><h3>{text(about.get("title") or "Written in any order")}</h3>'
        f'<output class="hv-number" data-part="said">{len(revealed)} of {sum(not t.get("given") for t in tokens)} tokens</output></div>'
        f'<p class="hv-words">{words}</p>'
        f'<div class="hv-row hv-time"><span class="hv-number">step</span><input type="range" class="hv-range" data-keep="canvas-step" min="0" max="{steps}"'
        f' step="1" value="{steps}" aria-label="Step"><output class="hv-number" data-part="step">{steps} / {steps}</output>'
        '<button type="button" class="hv-button" data-replay>Watch it being written</button></div>'
        f'<p class="hv-scale" aria-hidden="true"><span>step 1</span><i class="hv-order"></i><span>step {steps}</span>'
        '<b class="hv-token hv-masked">mask</b><span>not yet</span><b class="hv-given">grey</b><span>your prompt</span></p>'
    )
    return view("canvas", "Text, coloured by step", inner, steps=str(steps), play="once" if about.get("play") else None)


def _step(token: Mapping[str, Any]) -> int | None:
    step = token.get("step")
    return int(step) if isinstance(step, int | float) and step >= 0 else None


def _token(token: Mapping[str, Any], steps: int) -> str:
    """One token; a line break is shown as a sign, and breaks the line."""
    words, step = str(token.get("text", "")), _step(token)
    shown = text(words.replace("\n", "↵")) or "&nbsp;"
    broken = "<br>" if "\n" in words else ""
    if token.get("given"):
        return f'<span class="hv-given">{shown}</span>{broken}'
    if step is None:
        return f'<span class="hv-token hv-masked" aria-hidden="true">{shown or "mask"}</span>{broken}'
    order = 100 * step / max(1, steps - 1)
    return f'<span class="hv-token" data-step="{step}" style="--order:{order:.0f}%" title="step {step + 1}">{shown}</span>{broken}'
