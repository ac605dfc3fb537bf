"""Callbacks after each step, in diffusers' protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hasten.canvas import Canvas, Row
from hasten.errors import UsageError, nearest
from hasten.samplers.scores import Scores

TENSORS = (
    "ids", "status", "transfer_index", "sampled_tokens", "sampled_probs", "active_block", "cur_x", "block_x", "x0", "x0_p",
    "confidence",
)  # fmt: skip
"""What a callback may ask for, [B, L] each: ids and status of the slots; which were written in this step; what the model
would write, and with which probability; which slots are in active blocks. The rest are other names of these."""

_SAME = {"cur_x": "ids", "block_x": "ids", "x0": "sampled_tokens", "x0_p": "sampled_probs", "confidence": "sampled_probs"}

StepEnd = Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None]
"""`callback_on_step_end(pipe, step, timestep, tensors)`; the timestep is the step."""


class OnStepEnd:
    """Calls the user's callback after each step. Pass `__call__` as `on_step` to the loop.

    Tensors are to be looked at. A callback that gives back other ones is refused, because the caches would not know;
    `pipe.interrupt = True` stops the generation after the step.
    """

    def __init__(self, pipe: Any, callback: StepEnd, wanted: Sequence[str]) -> None:
        self.pipe, self.callback, self.wanted = pipe, callback, list(wanted)

    def __call__(self, number: int, canvas: Canvas, scores: Scores, rows: list[Row]) -> None:
        shown = {name: self._tensor(_SAME.get(name, name), canvas, scores) for name in self.wanted}
        given = self.callback(self.pipe, number, number, dict(shown)) or {}
        for name, value in given.items():
            if value is not shown.get(name):
                raise UsageError(
                    f"callback_on_step_end gave back another {name!r}. Tensors can be looked at only: a text that changed from"
                    " outside would not fit what is cached of it."
                )

    def _tensor(self, name: str, canvas: Canvas, scores: Scores) -> Tensor:
        if name == "transfer_index":
            return (canvas.committed == (canvas.step - 1)[:, None]) & (canvas.committed >= 0)
        if name == "active_block":
            return canvas.active
        found = {"ids": canvas.ids, "status": canvas.status, "sampled_tokens": scores.token, "sampled_probs": scores.confidence}
        return found[name]


def on_step_end(pipe: Any, callback: Any, wanted: Sequence[str] | None) -> OnStepEnd | None:
    """The callback, checked. wanted: names from `TENSORS`; None: what the callback itself says (diffusers'
    `PipelineCallback`), or ids."""
    if callback is None:
        if wanted is not None:
            raise UsageError("callback_on_step_end_tensor_inputs says what callback_on_step_end gets, and there is none.")
        return None
    if not callable(callback):
        raise UsageError(f"callback_on_step_end must be callable, got {type(callback).__name__}.")
    names = wanted if wanted is not None else getattr(callback, "tensor_inputs", None) or ["ids"]
    for name in names:
        if name not in TENSORS:
            raise UsageError(f"A callback cannot get {name!r}; allowed: {', '.join(TENSORS)}.{nearest(name, TENSORS)}")
    return OnStepEnd(pipe, callback, names)
