"""Reuse of the whole network's output: the span every model has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from hasten.account import Account
from hasten.agree import Mean, alone
from hasten.caching.residuals import Residuals
from hasten.caching.signals import OutputChange, Signal, SignalState
from hasten.caching.target import Of, from_target, to_target
from hasten.drift import AccountState, Drift, Rule
from hasten.forecast import Forecast, ForecastState, Hold, combine, lagrange
from hasten.forecast_affine import ChannelTable
from hasten.ledger import LedgerState
from hasten.level import Level
from hasten.recipe import ReusePolicy
from hasten.step import Step


class NetworkReuse(ReusePolicy):
    """Skip whole evaluations of the denoiser and stand in a forecast of what it returns.

    rule: which steps may be skipped; decided once per step, by the first branch, for all branches.
    signal: what an adaptive rule watches. forecast: what stands in.
    of: "output" forecasts the output y; "residual" forecasts y - x and adds the present input x, which
    is EasyCache's transformation; "data" forecasts the clean data that x and y imply, which is what multistep
    solvers (DPM-Solver++, UniPC) work on. Without an estimate of the data (`Step.level`) such a step is computed.
    axis: coordinate of the forecasts, `Step.time` or lambda = log(alpha / sigma) (`Level.log_snr`).
    correct: 0, or the degree of the correction. After each gap the forecasts used in it are compared with the
    polynomial that the newly computed value makes possible, and the difference is put right in that step. Costs
    no evaluation; acts only where the solver is first-order and linear (`Step.weight`), and says so elsewhere.
    repair: scale and shift per channel of what is computed, for networks whose error is known (quantised weights).
    """

    kind: ClassVar[str] = "network"
    rule: Rule = Drift()
    signal: Signal = OutputChange()
    forecast: Forecast = Hold()
    of: Of = "output"
    axis: Literal["time", "log_snr"] = "time"
    correct: int = Field(0, ge=0, le=3)
    repair: ChannelTable | None = None

    def start(self, times: Sequence[float] = ()) -> NetworkState:
        """Fresh state for one run of one network. times: `Step.time` of each step, where known."""
        return NetworkState(self, times)

    def remarks(
        self, times: Sequence[float], weights: Sequence[float | None], levels: Sequence[Level | None]
    ) -> list[str]:
        """What cannot be done on a run with this solver, one sentence each, to be told to the user once."""
        found = [self.forecast.refusal(times)]
        if self.correct and all(weight is None for weight in weights):
            found.append("the solver is not linear and first-order in the network's output, so forecasts are not corrected.")
        if self.of == "data" and all(level is None or level.data is None for level in levels):
            found.append(
                "the solver does not say what the network's output implies about the data, so every step is"
                " computed. Use of: output."
            )
        if self.axis == "log_snr" and all(level is None for level in levels):
            found.append("the solver has no noise levels, so forecasts are made in Step.time instead of log-SNR.")
        return [sentence for sentence in found if sentence]


class NetworkState:
    """State of `NetworkReuse` for one run of one network: one decision per step, one history per branch.

    decided: index of the step that was decided last. skipping: that decision. change: what it was based on.
    agree: makes the numbers of all ranks that share a sample one; the seam sets it.
    """

    agree: Mean = staticmethod(alone)

    def __init__(self, policy: NetworkReuse, times: Sequence[float] = ()) -> None:
        self.policy = policy
        self.rule = policy.rule.start(times)
        self.signal: SignalState = policy.signal.start()
        self.branches: dict[int, BranchHistory] = {}
        self.leader: int | None = None
        self.decided = -1
        self.skipping = False
        self.change: float | None = None
        self.poisoned: list[int] = []
        self.residuals = Residuals() if policy.rule.needs_errors else None
        self.account = cast(AccountState, self.rule) if policy.rule.needs_errors else None
        self.shared: Account | None = None

    def share(self, account: Account) -> None:
        """Other levels spend of `account`, too: what they want to know is read with what is read here."""
        self.shared = account
        if isinstance(self.rule, LedgerState):
            self.rule.share(account)

    def decide(self, step: Step, x: Tensor) -> bool:
        """May `step` be skipped? The first branch of the step decides, the others follow."""
        if step.index == self.decided:
            return self.skipping
        self.decided, self.leader = step.index, step.branch
        signal = self.signal.measure(step, x) if self.policy.rule.needs_signal else None
        self.change, self.poisoned = self._read(signal)
        for branch in self.poisoned:  # a NaN or Inf was computed: forget it and compute afresh
            del self.branches[branch]
        able = not self.poisoned and any(branch.ready and branch.fits(x) for branch in self.branches.values())
        # A step at which nothing can stand in is a computed one, whatever was measured: the rule counts anew from it.
        self.skipping = self.rule.skip(step, self.change if able else None) and able
        return self.skipping

    def _read(self, signal: Tensor | None) -> tuple[float | None, list[int]]:
        """Fetch the signal and every branch's health in one host synchronisation."""
        unread = [(number, branch.finite) for number, branch in self.branches.items() if branch.finite is not None]
        flags = [signal] if signal is not None else []
        flags += [finite for _, finite in unread if finite is not None]
        flags += self.residuals.pending() if self.residuals is not None else []
        asked = self.shared.pending() if self.shared is not None else []
        if not flags and not asked:
            return None, []
        values = self.agree(torch.stack([flag.float() for flag in (*flags, *asked)])).tolist()
        if self.shared is not None:
            self.shared.tell(values[len(flags) :])
            del values[len(flags) :]
        for number, _ in unread:
            self.branches[number].finite = None
        change = values.pop(0) if signal is not None else None
        self._learn(values[len(unread) :])
        del values[len(unread) :]
        return change, [number for (number, _), healthy in zip(unread, values, strict=True) if not healthy >= 1]

    def answer(self, step: Step, x: Tensor) -> list[Tensor] | None:
        """What stands in for this branch's outputs, or None when it has no fitting history."""
        branch = self.branches.get(step.branch)
        if branch is None or not branch.fits(x):
            return None
        return branch.estimate(step, x)

    def observe(self, step: Step, x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        """The network was computed; returns what the host gets (the outputs, or the corrected ones)."""
        branch = self.branches.get(step.branch)
        if branch is None or not branch.fits(x) or len(branch.forecasts) != len(outputs):
            branch = self.branches[step.branch] = BranchHistory(self.policy, x, outputs)
        if step.branch == self.leader and self.policy.rule.needs_signal:
            self.signal.observe(step, x, outputs[0])
        if self.residuals is not None:
            self.residuals.computed(step, outputs[0], branch.expected(step, x))
        return branch.observe(step, x, outputs)

    def _learn(self, values: list[float]) -> None:
        """Tell the rule how far the latest computed step's forecast would have been off."""
        told = self.residuals.read(values) if self.residuals is not None else None
        if told is not None and self.account is not None:
            self.account.learn(*told)

    def combined(self, value: Tensor) -> None:
        """The solver receives `value`, the branches' combination, at the step that was decided last."""
        if self.residuals is not None and not self.skipping:
            self.residuals.combined(value)

    @property
    def estimated_error(self) -> float | None:
        """Relative error of the final latents that the rule believes to have caused; None where it keeps no account."""
        if self.residuals is None or self.account is None:
            return None
        if pending := self.residuals.pending():
            self._learn(self.agree(torch.stack([tensor.float() for tensor in pending])).tolist())
        return self.account.estimate

    def num_bytes(self) -> int:
        """Bytes of all tensors held for later steps."""
        tensors = [t for b in self.branches.values() for t in b.tensors()] + self.signal.tensors()
        held = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
        return sum(held.values())

    def forget(self) -> None:
        """Drop everything held."""
        self.branches.clear()
        self.signal = self.policy.signal.start()


class BranchHistory:
    """What one branch has computed so far."""

    def __init__(self, policy: NetworkReuse, x: Tensor, outputs: list[Tensor]) -> None:
        self.policy = policy
        self.forecasts: list[ForecastState] = [policy.forecast.start() for _ in outputs]
        self.dtypes = [y.dtype for y in outputs]
        self.key = (x.shape, x.dtype, x.device)
        self.finite: Tensor | None = None
        self.repair = policy.repair.start() if policy.repair is not None else None
        self.corrector: Corrector | None = Corrector(policy.correct) if policy.correct else None

    def fits(self, x: Tensor) -> bool:
        """False once resolution, batch, dtype or device have changed."""
        return self.key == (x.shape, x.dtype, x.device)

    @property
    def ready(self) -> bool:
        return all(forecast.ready for forecast in self.forecasts)

    def estimate(self, step: Step, x: Tensor) -> list[Tensor] | None:
        if not self.ready:
            return None
        at, found = self._coordinate(step), []
        for forecast, dtype in zip(self.forecasts, self.dtypes, strict=True):
            y = from_target(self.policy.of, step, x, forecast.estimate(at), dtype)
            if y is None:
                return None
            found.append(y)
        if self.corrector is not None:
            self.corrector.skipped(step, found[0])
        return found

    def expected(self, step: Step, x: Tensor) -> Tensor | None:
        """What a forecast of the first output would say, had the step been skipped; None without a history."""
        if not self.forecasts[0].ready:
            return None
        return from_target(self.policy.of, step, x, self.forecasts[0].estimate(self._coordinate(step)), self.dtypes[0])

    def observe(self, step: Step, x: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        if self.repair is not None:
            outputs = [self.repair.apply(step.time, outputs[0]), *outputs[1:]]
        self.finite = torch.stack([torch.isfinite(y).all() for y in outputs]).all()
        targets = [to_target(self.policy.of, step, x, y) for y in outputs]
        for forecast, target in zip(self.forecasts, targets, strict=True):
            if target is not None:
                forecast.store(self._coordinate(step), target)
        if self.corrector is None:
            return outputs
        first = targets[0] if self.policy.of == "output" else None
        own = outputs[0].clone() if first is None else first  # an output that is its own target is held once
        corrected = self.corrector.computed(step, own)
        return outputs if corrected is None else [corrected, *outputs[1:]]

    def tensors(self) -> list[Tensor]:
        held = [tensor for forecast in self.forecasts for tensor in forecast.tensors()]
        return held + (self.corrector.tensors() if self.corrector else [])

    def _coordinate(self, step: Step) -> float:
        by_noise = self.policy.axis == "log_snr" and step.level is not None
        return step.level.log_snr if by_noise and step.level is not None else step.time


class Corrector:
    """Puts a gap of forecasts right when the next value is computed.

    The solver has moved by sum_j w_j f_j over the skipped steps j, f_j the forecast, w_j `Step.weight`.
    With the new value y_k at t_k a polynomial p through it and the values before is known, and
    E = sum_j w_j (p(t_j) - f_j) is what the gap is off by, to the order of p. Returning y_k + E / w_k
    makes the solver add E with this step. It is the corrector of a predictor-corrector method
    (UniPC, arXiv 2302.04867, is one) at no evaluation of its own; ours works on any subset of a first-order
    solver's steps, so it approaches that solver's own path and not only the exact solution.
    """

    def __init__(self, degree: int) -> None:
        self.degree = degree
        self.nodes: list[float] = []
        self.values: list[Tensor] = []
        self.gap: list[tuple[float, float]] = []
        self.moved: Tensor | None = None

    def skipped(self, step: Step, estimate: Tensor) -> None:
        if step.weight is None:
            return
        self.gap.append((step.time, step.weight))
        part = estimate.float() * step.weight
        self.moved = part if self.moved is None else self.moved.add_(part)

    def computed(self, step: Step, y: Tensor) -> Tensor | None:
        """Remember `y`; what to return in its place, None when there is nothing to put right."""
        if step.time in self.nodes:
            spot = self.nodes.index(step.time)
            del self.nodes[spot], self.values[spot]
        self.nodes = [*self.nodes, step.time][-(self.degree + 1) :]
        self.values = [*self.values, y][-(self.degree + 1) :]
        gap, moved = self.gap, self.moved
        self.gap, self.moved = [], None
        if moved is None or not step.weight or len(self.values) < 2:
            return None
        # sum_j w_j p(t_j) is linear in the values, so the whole gap costs one weighted sum.
        totals = [0.0] * len(self.nodes)
        for time, weight in gap:
            for i, share in enumerate(lagrange(self.nodes, time)):
                totals[i] += weight * share
        off = combine(totals, [value.float() for value in self.values]) - moved
        return (y.float() + off / step.weight).to(y.dtype)

    def tensors(self) -> list[Tensor]:
        return self.values + ([] if self.moved is None else [self.moved])
