"""Failures in words a person can act on, each with what one click would change.

An accelerator that is full says so under several names, and some only in their text; both are looked at.
"""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hasten.errors import HastenError, OutputError
from hasten.ui.engine.request import (
    Compare,
    Decode,
    Generate,
    Picture,
    Request,
    Shape,
    Text,
    Train,
    Tune,
    to_json,
)

FULL = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|not enough memory|can't allocate memory|DefaultCPUAllocator", re.IGNORECASE)
BROKEN = re.compile(r"illegal memory access|device-side assert|unspecified launch failure|CUDA error|HIP error", re.IGNORECASE)
LONGEST = 6_000
"""Characters of a traceback that are kept."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """One thing to try. label: words of a button. request: what it submits, as JSON values."""

    label: str
    request: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a job failed. kind: `memory`, `disk`, `crash`, `broken device`, `refused` (said on purpose) or `bug`. sentence: what, why
    and what to do. details: for a bug report. remedies: to be offered as buttons."""

    kind: str
    sentence: str
    details: str = ""
    remedies: tuple[Remedy, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, error: BaseException, request: Request, phase: str = "") -> Trouble:
        """What `error` means for this request. phase: in which it was."""
        details = "".join(traceback.format_exception(error))[-LONGEST:]
        said = f"{type(error).__name__}: {error}"
        if _is_full(error):
            where = f" while {phase.lower()}" if phase else ""
            return cls("memory", f"Memory ran out{where}: {_first_line(error)} The queue goes on.", details, tuple(smaller(request)))
        if isinstance(error, OutputError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return cls("disk", str(error), details, (again(request),))
        if isinstance(error, HastenError):
            return cls("refused", str(error), "", ())
        if BROKEN.search(said):
            sentence = f"The device gave up: {_first_line(error)} The worker is started anew for the next job."
            return cls("broken device", sentence, details, (again(request),))
        sentence = f"Something went wrong that hasten did not expect: {said[:300]}. The details say where; please report them."
        return cls("bug", sentence, details, (again(request),))


def again(request: Request) -> Remedy:
    """The same once more."""
    return Remedy("Try again", _values(request))


def tried(asked: dict[str, Any], error: dict[str, Any]) -> list[dict[str, Any]]:
    """What to try of a job that failed with `error` (`to_dict`; {} where it was interrupted): [{"label", "request"}]. What was
    refused would be again."""
    return list(error.get("remedies") or []) or ([] if error.get("kind") == "refused" else [{"label": "Try again", "request": asked}])


def smaller(request: Request) -> Iterator[Remedy]:
    """Requests that need less memory, the least change first. Nothing is ever made smaller without a click."""
    if isinstance(request, Picture) and request.preview:
        yield Remedy("Without previews", _values(request, preview=False))
    if isinstance(request, Picture) and request.decoding == "whole":
        yield Remedy("Decoded in tiles", _values(request, decoding="tiles"))
    if isinstance(request, Shape):
        if request.frames is not None and request.frames > 1:
            fewer = max(1, (request.frames // 2 - 1) // 4 * 4 + 1)
            yield Remedy(f"{fewer} frames instead of {request.frames}", _values(request, frames=fewer))
        if request.width is not None and request.height is not None:
            width, height = _three_quarters(request.width), _three_quarters(request.height)
            if (width, height) != (request.width, request.height):
                yield Remedy(f"{width} x {height} instead of {request.width} x {request.height}", _values(request, width=width, height=height))
    if isinstance(request, Generate) and request.recipe != "plain":
        yield Remedy("Without the recipe, which keeps features in memory", _values(request, recipe="plain"))
    if isinstance(request, Compare) and len(request.recipes) > 1:
        yield Remedy("Compare one recipe only", _values(request, recipes=request.recipes[:1]))
    if isinstance(request, Text | Decode) and (request.length or 0) > 64:
        yield Remedy(f"{(request.length or 0) // 2} tokens instead of {request.length}", _values(request, length=(request.length or 0) // 2))
    if isinstance(request, Decode) and request.recipe != "plain":
        yield Remedy("Without drafts", _values(request, recipe="plain"))
    if isinstance(request, Train):
        batch = request.settings.get("train.batch", 32)
        if isinstance(batch, int) and batch > 1:
            settings = {**request.settings, "train.batch": max(1, batch // 2)}
            yield Remedy(f"A batch of {max(1, batch // 2)}", _values(request, settings=settings))
    if isinstance(request, Tune) and len(request.prompts) > 4:
        yield Remedy("With the first four prompts", _values(request, prompts=request.prompts[:4]))


def _three_quarters(side: int) -> int:
    """About so much, in steps of 32 where it is large, of 8 where it is small."""
    step = 32 if side >= 128 else 8
    return max(step, side * 3 // 4 // step * step)


def _values(request: Request, **changes: Any) -> dict[str, Any]:
    import json

    values: dict[str, Any] = json.loads(to_json(request.model_copy(update=changes)))
    return values


def _is_full(error: BaseException) -> bool:
    """By type, by text, and by what it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        kind = type(seen).__name__
        full = isinstance(seen, MemoryError) or kind == "OutOfMemoryError" or getattr(seen, "errno", None) == errno.ENOMEM
        if full or (isinstance(seen, RuntimeError) and FULL.search(str(seen))):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:240]
    return line if line.endswith(".") else f"{line}."
