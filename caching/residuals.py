"""How far forecasts are off, in what the solver receives: the guided combination of all branches."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.step import Step

LINEAR = 0.05
"""The combination is believed to be linear when it is explained up to this share of its square."""

Key = tuple[int, int]
"""(branch, half): a pipeline that evaluates both branches in one batch has two halves in one branch."""


class Residuals:
    """Measures the rms of the combined forecast error at each computed step; read back with one synchronisation later.

    How the host combines its branches (guidance) is not known and not assumed: at the first computed step the
    coefficients a_b of  combined = sum_b a_b y_b  are found by least squares. Where they do not explain it (rescaled
    or projected guidance) the error of the first branch stands for all.
    """

    def __init__(self) -> None:
        self.coefficients: dict[Key, float] | None = None
        self._outputs: dict[Key, Tensor] = {}
        self._off: dict[Key, Tensor] = {}
        self._gram: Tensor | None = None
        self._keys: list[Key] = []
        self._error: Tensor | None = None
        self._step: Step | None = None

    def computed(self, step: Step, output: Tensor, estimate: Tensor | None) -> None:
        """A branch was evaluated: `output`; a forecast would have said `estimate`."""
        if self._step is None or step.index != self._step.index:
            self._outputs, self._off, self._step = {}, {}, step
        self._outputs[step.branch, -1] = output
        if estimate is not None:
            self._off[step.branch, -1] = estimate.float() - output.float()

    def combined(self, value: Tensor) -> None:
        """What the solver receives at a step that was computed."""
        if not self._outputs:
            return
        if self.coefficients is None and self._gram is None:
            parts = _aligned(self._outputs, value)
            self._keys = list(parts)
            columns = torch.stack([value.float().flatten(), *(part.float().flatten() for part in parts.values())])
            self._gram = columns @ columns.T
        elif self.coefficients is not None and self._off:
            off = _aligned(self._off, value)
            weighted = [part * self.coefficients.get(key, 0.0) for key, part in off.items()]
            if weighted:
                total = weighted[0]
                for part in weighted[1:]:
                    total = total + part
                self._error = total.square().mean().sqrt()
        self._outputs, self._off = {}, {}

    def pending(self) -> list[Tensor]:
        """0-d tensors that `read` wants to know."""
        if self._gram is not None:
            return list(self._gram.flatten())
        return [] if self._error is None else [self._error]

    def read(self, values: list[float]) -> tuple[Step, float | None] | None:
        """Take the values of `pending`; returns the step that was computed and its error, None when there was none."""
        step, self._step = self._step, None
        if step is None:
            return None
        if self._gram is not None:
            self.coefficients = _solve(values, self._keys)
            self._gram = None
            return step, None
        error = values[0] if values else None
        self._error = None
        return step, error

    def tensors(self) -> list[Tensor]:
        """What is held between steps: nothing; values live only from a branch's evaluation to the solver's step."""
        return []


def _aligned(parts: dict[Key, Tensor], value: Tensor) -> dict[Key, Tensor]:
    """The parts cut to the shape of `value`: batched branches apart, predicted variances left out."""
    found: dict[Key, Tensor] = {}
    for (branch, _), part in parts.items():
        pieces = part.chunk(2) if part.shape[0] == 2 * value.shape[0] else (part,)
        for half, piece in enumerate(pieces):
            if piece.ndim == value.ndim and piece.ndim > 1 and piece.shape[1] == 2 * value.shape[1]:
                piece = piece[:, : value.shape[1]]
            if piece.numel() == value.numel():
                found[branch, half if len(pieces) > 1 else -1] = piece.reshape(value.shape)
    return found


def _solve(gram: list[float], keys: list[Key]) -> dict[Key, float]:
    """Least-squares coefficients from the Gram matrix of [combined, parts...]."""
    size = len(keys) + 1
    table = torch.tensor(gram, dtype=torch.float64).reshape(size, size)
    first = {key: float(number == 0) for number, key in enumerate(keys)}
    if not keys or not torch.isfinite(table).all() or table[0, 0] <= 0:
        return first
    found = torch.linalg.lstsq(table[1:, 1:], table[1:, :1]).solution.flatten()
    rest = table[0, 0] - 2 * found @ table[1:, 0] + found @ table[1:, 1:] @ found
    if rest > LINEAR * table[0, 0]:
        return first
    return {key: float(a) for key, a in zip(keys, found, strict=True)}
