"""Verifiers: how good a generated picture or clip is for its prompt, as one number, larger is better.

Any callable `(frames, prompt) -> float` is one; frames: float64 [F, H, W, C] in [0, 1], F = 1 for a picture. CLIP scores and
reward models are not part of hasten: pass a function that asks them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
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


def local_verifier(text: str) -> Verifier:
    """The function that `module:function` or `file.py:function` names, imported here.

    It runs code of this machine, so only a person at the command line may name one: no recipe, file of prompts or page does.
    Raises `UsageError` where there is no such module, file or function.
    """
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise UsageError(
            f"There is no verifier {text!r}; allowed: {', '.join(VERIFIERS)}, or a function of (frames, prompt) of your own as"
            f" module:function or file.py:function.{nearest(text, VERIFIERS)}"
        )
    try:
        module = _of_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (ImportError, OSError, SyntaxError) as error:
        raise UsageError(
            f"Cannot import {where} for the verifier {text}: {error}. Name a module that Python finds, or a .py file."
        ) from None
    found = getattr(module, name, None)
    if not callable(found):
        raise UsageError(f"{where} has no function {name!r}. Define it there: {name}(frames, prompt) -> float, larger is better.")
    made: Verifier = found
    return made


def _of_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None, "a name that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
