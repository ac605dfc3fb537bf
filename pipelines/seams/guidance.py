"""Guidance on unmodified pipelines: which branch is which is measured, then one of them is not evaluated.

Pipelines hard-code u + s (c - u) and call c first, u first, or both in one batch. Instead of knowing
that per pipeline, the seam looks at what the solver receives: with outputs a and b and g the combination,
the least-squares s' in g = a + s' (b - a) is above 1 when b is the conditional branch and below 0 when a is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.samplers.guidance import GuidanceState
from hasten.samplers.guidance_ledger import LedgerGuidanceState
from hasten.step import Step


@dataclass(frozen=True, slots=True)
class Roles:
    """Which output is conditional. cond, uncond: branch numbers (or halves of the batch, when batched).

    scale: s in u + s (c - u). rows: batch size of a call. cond_first: whether the conditional call comes first.
    """

    cond: int
    uncond: int
    scale: float
    batched: bool
    rows: int

    @property
    def cond_first(self) -> bool:
        return self.cond < self.uncond


class GuidanceSeam:
    """Applies a guidance policy to one run. `refused` holds the reason when it cannot be applied.

    single: it is refused because the pipeline evaluates one branch.
    """

    def __init__(self, state: GuidanceState) -> None:
        self.state = state
        self.roles: Roles | None = None
        self.refused, self.single = "", False
        self._raw: dict[int, Tensor] = {}
        self._returned: dict[int, Tensor] = {}
        self._placeholder: Tensor | None = None
        self._late: Tensor | None = None
        self._last_uncond: Tensor | None = None
        self._step: Step | None = None

    # --- asked by the denoiser gate ---------------------------------------------------------------

    def skips(self, step: Step, num_rows: int) -> bool:
        """Is (this part of) this call the unconditional branch of a step that does not need it?"""
        roles = self.roles
        if roles is None or self.refused:
            return False
        concerned = num_rows == roles.rows if roles.batched else step.branch == roles.uncond
        return concerned and not self.state.needs(step)

    def answer(self, step: Step) -> Tensor | None:
        """What to answer an unevaluated unconditional call with; None when nothing is known yet."""
        assert self.roles is not None
        if self.roles.cond_first:
            c = self._raw.get(self.roles.cond)
            return None if c is None else self.state.estimate(step, c)
        # u comes first and c is not known yet: answer with anything, and put it right in the c call.
        self._placeholder = self._last_uncond
        return self._placeholder

    def finish(self, step: Step, c: Tensor) -> Tensor:
        """The conditional output as the pipeline must see it: it combines a placeholder z as z + s (c' - z)."""
        if self._placeholder is None or self.roles is None or step.branch != self.roles.cond:
            return c
        z, self._placeholder = self._placeholder, None
        u, self._late = self.state.estimate(step, c) if self._late is None else self._late, None
        target = u + self.roles.scale * (c - u)
        return z + (target - z) / self.roles.scale

    def late(self, step: Step) -> Tensor | None:
        """What stands in for u, answered by a placeholder before the conditional call of `step`, which has just been computed; None
        where nothing was, or in another call."""
        if self._placeholder is None or self.roles is None or step.branch != self.roles.cond:
            return None
        return self.state.estimate(step, self._raw[step.branch])

    def settle(self, u: Tensor) -> None:
        """The u that `finish` is to combine: that of `late`, as reuse has put it right."""
        self._late = u

    def join(self, step: Step, c: Tensor) -> Tensor:
        """Both halves of a batched call, from its conditional half."""
        assert self.roles is not None
        u = self.state.estimate(step, c)
        return torch.cat([c, u] if self.roles.cond_first else [u, c])

    def conditional_rows(self, num_rows: int) -> slice:
        """The rows of a batched call that must be evaluated."""
        assert self.roles is not None
        half = num_rows // 2
        return slice(0, half) if self.roles.cond == 0 else slice(half, num_rows)

    def evaluated(self, step: Step, raw: Tensor) -> None:
        """A branch was really computed: `raw` is the network's own output."""
        self._step = step
        self._raw[step.branch] = raw

    def returned(self, step: Step, output: Tensor) -> None:
        """What the pipeline got for a branch that was really computed."""
        self._returned[step.branch] = output

    # --- told by the clock ------------------------------------------------------------------------

    def tick(self, combined: Tensor | None) -> None:
        """The solver received `combined`: measure the roles once, then let the policy learn."""
        raw, returned, step = self._raw, self._returned, self._step
        self._raw, self._returned, self._placeholder, self._late = {}, {}, None, None
        if step is None or self.refused or not isinstance(combined, Tensor):
            return
        if returned and self._must_measure(returned):
            self._measure(returned, combined)
        if self.roles is None:
            return
        pair = _halves(next(iter(raw.values()))) if self.roles.batched and raw else raw
        c, u = pair.get(self.roles.cond), pair.get(self.roles.uncond)
        if c is not None and u is not None:
            self._last_uncond = u
            self.state.observe(step, c, u)

    def _must_measure(self, outputs: dict[int, Tensor]) -> bool:
        """The roles are unknown, another network took over (Wan 2.2's second expert), or the scale may have moved."""
        roles = self.roles
        if roles is None:
            return True
        if roles.batched:
            return False
        others = not set(outputs) <= {roles.cond, roles.uncond}
        return others or (not roles.cond_first and len(outputs) == 2)

    def _measure(self, outputs: dict[int, Tensor], combined: Tensor) -> None:
        batched = len(outputs) == 1
        pair = outputs
        if batched:
            only = next(iter(outputs.values()))
            if only.shape[0] != 2 * combined.shape[0]:
                self.refused = "the pipeline evaluates one branch per step, so there is no second one to leave out"
                self.single = True
                return
            pair = _halves(only)
        if len(pair) != 2:
            self.refused = f"the pipeline evaluates {len(pair)} branches per step; guidance policies know two"
            return
        (first, a), (second, b) = sorted(pair.items())
        scale, residual = _fit(a, b, combined)
        if not residual < _tolerance(a.dtype) or 0 <= scale <= 1:
            self.refused = (
                f"the solver does not receive u + s (c - u) of the two outputs (s = {scale:.3g},"
                f" residual {residual:.2g}); guidance rescaling and similar tricks are not taken apart"
            )
            return
        before, rows = self.roles, next(iter(outputs.values())).shape[0]
        if scale > 1:
            self.roles = Roles(second, first, scale, batched, rows)
        else:
            self.roles = Roles(first, second, 1 - scale, batched, rows)
        if isinstance(self.state, LedgerGuidanceState):
            self._tell(self.state, self.roles, combined)
        if before is None or self.roles.cond_first or before.uncond != self.roles.uncond:
            return
        if abs(self.roles.scale / before.scale - 1) > _tolerance(a.dtype):
            # u was answered before c was known, which needs the scale of a step that is still to come.
            self.refused = f"its scale changes during the run ({before.scale:.3g}, then {self.roles.scale:.3g})"

    def _tell(self, state: LedgerGuidanceState, roles: Roles, combined: Tensor) -> None:
        """What an account needs to know: how much an error counts in what the solver receives."""
        state.scale = roles.scale
        state.channels = combined.shape[1] if combined.ndim > 1 else None


def _halves(both: Tensor) -> dict[int, Tensor]:
    first, second = both.chunk(2)
    return {0: first, 1: second}


def _fit(a: Tensor, b: Tensor, combined: Tensor) -> tuple[float, float]:
    """Least-squares s in combined = a + s (b - a), and the relative residual."""
    channels = combined.shape[1] if combined.ndim > 1 else None
    if a.shape != combined.shape and channels is not None:  # networks that also return a variance
        a, b = a[:, :channels], b[:, :channels]
    if a.shape != combined.shape:
        return float("nan"), float("inf")
    away, apart = (combined - a).double().flatten(), (b - a).double().flatten()
    scale = away.dot(apart) / apart.dot(apart).clamp_min(1e-30)
    residual = (away - scale * apart).norm() / away.norm().clamp_min(1e-30)
    found = torch.stack([scale, residual]).tolist()
    return found[0], found[1]


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-3 if dtype == torch.float32 else 1e-5 if dtype == torch.float64 else 5e-2
