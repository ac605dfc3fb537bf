"""Verifiers: how good a generated picture or clip is for its prompt, as one number, larger is better.

Any callable `(frames, prompt) -> float` is one; frames: float64 [F, H, W, C] in [0, 1], F = 1 for a picture. CLIP scores and
reward models are not part of hasten: pass a function that asks them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray

from hasten.errors import UsageError, nearest

Verifier = Callable[[NDArray[Any], str], float]


def digits(frames: NDArray[Any], prompt: str) -> float:
    """Log probability, of the bundled judge, that the frames show the digit of the prompt, moving as it says.

    Raises `UsageError` where the prompt names no digit.
    """
    from hasten.pipelines.judge import DIRECTIONS, SPEEDS, Judge, as_clip, parse_prompt

    told, judge = parse_prompt(prompt), Judge.load()
    clip = as_clip(frames)
    with torch.no_grad():
        score = judge.net.digit(judge.net.digit_features(clip[:, None]).mean(0)).log_softmax(-1)[told["digit"]]
        if len(clip) > 1:
            motion = judge.net.motion_features(clip[torch.linspace(0, len(clip) - 1, 17).round().long()][None])[0]
            if "direction" in told:
                score = score + judge.net.direction(motion).log_softmax(-1)[DIRECTIONS.index(str(told["direction"]))]
            if "speed" in told:
                score = score + judge.net.speed(motion).log_softmax(-1)[SPEEDS.index(str(told["speed"]))]
    return float(score)


def sharpness(frames: NDArray[Any], prompt: str) -> float:
    """Mean square of the Laplacian of the grey frames: knows nothing of the prompt."""
    grey = frames.mean(-1)
    middle = grey[:, 1:-1, 1:-1]
    bend = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * middle
    return float((bend**2).mean())


VERIFIERS: dict[str, Verifier] = {"digits": digits, "sharpness": sharpness}


def verifier_of(which: str | Verifier) -> Verifier:
    """The verifier of that name, or `which` itself. Raises `UsageError` for a name that there is not."""
    if not isinstance(which, str):
        return which
    if which not in VERIFIERS:
        raise UsageError(
            f"There is no verifier {which!r}; allowed: {', '.join(VERIFIERS)}, or a function of (frames, prompt).{nearest(which, VERIFIERS)}"
        )
    return VERIFIERS[which]
