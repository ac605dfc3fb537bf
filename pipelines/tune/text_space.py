"""What is searched for texts: on each axis one kind, and the numbers of that kind.

`commit` (rule and score), `blocks`, `end`, `kv`, and `extra`: drafts or a reviser, which never go together. What other parts
refuse is refused when it is run, with the reason; nothing of that is repeated here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hasten.caching.kv import Dual, Prefix, TokenKV, Vicinity
from hasten.caching.kv_attention import AttentionDrift
from hasten.caching.kv_echo import Echo
from hasten.caching.kv_front import BlockCausal, Freeze, Nested
from hasten.caching.kv_rollout import Rollout
from hasten.caching.kv_scattered import Delayed
from hasten.caching.kv_suffix import SparseSuffix
from hasten.caching.kv_values import ValueDrift
from hasten.recipe import Recipe
from hasten.samplers.commit import Either, Quota, Threshold, Unmask
from hasten.samplers.commit_history import Settled, Steady
from hasten.samplers.commit_sure import AboveMean, AllAtOnce, EntropyBound, Factor, Lead, Nearby, Runs
from hasten.samplers.commit_wide import WideIn
from hasten.samplers.filter import Learned
from hasten.samplers.revise_edit import Edit
from hasten.samplers.revise_erase import Backtrack, NarrowOut, Remask
from hasten.samplers.revise_unsure import Lapse, Outbid
from hasten.samplers.scores import Certainty, Margin
from hasten.samplers.scores_history import Averaged, Credit
from hasten.samplers.text_blocks import AtDelimiter, BlockRule, Fixed, InBlocks, SubBlocks, Whole, Window
from hasten.samplers.text_ends import AtEndToken, AtPredictedEnd, EndRule
from hasten.samplers.verify import FreeDave

Params = Mapping[str, Any]

BLOCK = 32
"""Slots of a block of sequential decoding."""


@dataclass(frozen=True, slots=True)
class Knob:
    """A number of a part, from `low` to `high`; whole where these are. usual: the paper's. log: searched by its logarithm."""

    low: float
    high: float
    usual: float
    log: bool = False

    def ask(self, trial: Any, name: str) -> float:
        """What an optuna trial says of it."""
        ask = trial.suggest_int if isinstance(self.low, int) and isinstance(self.high, int) else trial.suggest_float
        return float(value) if isinstance(value := ask(name, self.low, self.high, log=self.log), float) else int(value)


@dataclass(frozen=True, slots=True)
class Kind:
    """One choice on an axis. make: called with the numbers of `knobs`; gives the part, or None for doing without."""

    make: Callable[..., Any]
    knobs: Mapping[str, Knob] = field(default_factory=dict)


DOUBT = Knob(0.001, 0.6, 0.1, log=True)
"""1 - the confidence that is enough: between thresholds near 1, what counts is their distance from 1."""

EVERY = Knob(0, 16, 0)
"""Steps after which a cache computes everything again; 0 is never."""


def _sure(doubt: float) -> float:
    return round(1 - doubt, 5)


def _commits(length: int) -> dict[str, Kind]:
    """length: tokens of the longest text."""
    return {
        "quota": Kind(lambda steps: Unmask(rule=Quota(steps=steps)), {"steps": Knob(1, length, length, log=True)}),
        "threshold": Kind(lambda doubt: Unmask(rule=Threshold(above=_sure(doubt))), {"doubt": DOUBT}),
        "credit": Kind(lambda doubt: Unmask(rule=Threshold(above=_sure(doubt)), score=Credit()), {"doubt": DOUBT}),
        "factor": Kind(lambda factor: Unmask(rule=Factor(factor=factor)), {"factor": Knob(0.03, 3.0, 1.0, log=True)}),
        "entropy-bound": Kind(
            lambda bound: Unmask(rule=EntropyBound(bound=bound), score=Certainty()), {"bound": Knob(0.001, 2.0, 0.1, log=True)}
        ),
        "either": Kind(
            lambda doubt, bound: Unmask(rule=Either(rules=(Threshold(above=_sure(doubt)), EntropyBound(bound=bound)))),
            {"doubt": DOUBT, "bound": Knob(0.001, 1.0, 0.05, log=True)},
        ),
        "lead": Kind(lambda doubt: Unmask(rule=Lead(by=_sure(doubt)), score=Margin()), {"doubt": Knob(0.002, 0.9, 0.2, log=True)}),
        "nearby": Kind(
            lambda doubt, near, reach: Unmask(rule=Nearby(above=_sure(doubt), near=_sure(near), reach=reach)),
            {"doubt": DOUBT, "near": Knob(0.01, 0.7, 0.25, log=True), "reach": Knob(1, 8, 4)},
        ),
        "runs": Kind(
            lambda doubt, low: Unmask(rule=Runs(above=_sure(doubt), low=low)), {"doubt": DOUBT, "low": Knob(0.2, 0.95, 0.4)}
        ),
        "above-mean": Kind(lambda slack: Unmask(rule=AboveMean(slack=slack)), {"slack": Knob(0.001, 0.2, 0.02, log=True)}),
        "settled": Kind(
            lambda doubt, drift: Unmask(rule=Settled(above=_sure(doubt), drift=drift)),
            {"doubt": Knob(0.001, 0.7, 0.4, log=True), "drift": Knob(0.0005, 0.1, 0.01, log=True)},
        ),
        "steady": Kind(
            lambda over, top: Unmask(rule=Steady(top=top, lasting=over), score=Averaged(over=over)),
            {"over": Knob(2, 4, 2), "top": Knob(2, 8, 4)},
        ),
        "all-at-once": Kind(
            lambda times: Unmask(rule=AllAtOnce(early=7.5 * times, middle=5.0 * times, late=2.5 * times)),
            {"times": Knob(0.5, 4.0, 1.0, log=True)},
        ),
        "wide-in": Kind(lambda doubt: Unmask(rule=WideIn(above=_sure(doubt))), {"doubt": Knob(0.01, 0.7, 0.4, log=True)}),
    }  # fmt: skip


FILTER = Kind(lambda doubt: Unmask(rule=Either(rules=(Learned(above=_sure(doubt)), Quota()))), {"doubt": Knob(0.001, 0.3, 0.05, log=True)})
"""A filter that was trained for the model (Learn2PD)."""


def _blocks(length: int) -> dict[str, Kind]:
    size = Knob(min(4, length), max(length, 4), min(BLOCK, length), log=True)
    inner = Knob(min(2, length), max(length // 2, 2), min(8, max(length // 2, 2)), log=True)
    return {
        "fixed": Kind(lambda size: Fixed(size=size), {"size": size}),
        "whole": Kind(Whole),
        "sub-blocks": Kind(lambda inner: SubBlocks(size=BLOCK, inner=inner), {"inner": inner}),
        "window": Kind(lambda size: Window(size=size), {"size": size}),
        "at-delimiter": Kind(lambda: AtDelimiter()),
    }


ENDS: dict[str, Kind] = {
    "end-token": Kind(lambda: AtEndToken()),
    "predicted-end": Kind(
        lambda doubt, steps, run: AtPredictedEnd(above=_sure(doubt), steps=steps, run=run),
        {"doubt": Knob(0.001, 0.4, 0.1, log=True), "steps": Knob(1, 3, 2), "run": Knob(0, 8, 4)},
    ),
}


def _caches(block: int | None) -> dict[str, Kind]:
    """block: of a block-causal model."""
    found: dict[str, Kind] = {
        "recompute": Kind(lambda: None),
        "dual": Kind(lambda every: Dual(every=every or None), {"every": EVERY}),
        "prefix": Kind(lambda every: Prefix(every=every or None), {"every": EVERY}),
        "vicinity": Kind(lambda every: Vicinity(every=every or None), {"every": EVERY}),
        "freeze": Kind(lambda: Freeze()),
        "sparse-suffix": Kind(lambda window: SparseSuffix(window=window), {"window": Knob(8, 256, 128, log=True)}),
        "delayed": Kind(lambda every: Delayed(every=every or None), {"every": Knob(0, 16, 8)}),
        "echo": Kind(lambda often, every: Echo(often=often, every=every or None), {"often": Knob(1, 16, 4), "every": EVERY}),
        "rollout": Kind(
            lambda mass, every: Rollout(mass=mass, every=every or None), {"mass": Knob(0.05, 0.9, 0.1), "every": EVERY}
        ),
        "value-drift": Kind(
            lambda every, share: ValueDrift(prompt_every=None, every=every, share=share),
            {"every": Knob(2, 16, 7), "share": Knob(0.1, 0.9, 0.25)},
        ),
        "attention-drift": Kind(
            lambda doubt: AttentionDrift(below=_sure(doubt)), {"doubt": Knob(0.001, 0.5, 0.1, log=True)}
        ),
    }  # fmt: skip
    if block is not None:
        found |= {"block-causal": Kind(lambda: BlockCausal()), "nested": Kind(lambda: Nested())}
    return found


EXTRAS: dict[str, Kind] = {
    "none": Kind(lambda: None),
    "drafts": Kind(lambda most: FreeDave(most=most), {"most": Knob(2, 8, 4)}),
    "backtrack": Kind(lambda least: Backtrack(least=least), {"least": Knob(0.01, 0.5, 0.05, log=True)}),
    "remask": Kind(lambda below: Remask(below=below), {"below": Knob(0.05, 0.9, 0.4)}),
    "narrow-out": Kind(lambda below: NarrowOut(below=below), {"below": Knob(0.3, 0.99, 0.9)}),
    "edit": Kind(lambda above: Edit(above=above), {"above": Knob(0.3, 0.99, 0.5)}),
    "outbid": Kind(lambda: Outbid()),
    "lapse": Kind(lambda eta: Lapse(eta=eta, schedule="rescale", unsure=True), {"eta": Knob(0.01, 1.0, 1.0, log=True)}),
}


@dataclass
class TextSpace:
    """What can be searched on one model. length: tokens of the longest text. block: of a block-causal model, else None. caches:
    can keys and values of the model be kept? filtered: has it a trained filter?"""

    length: int
    block: int | None = None
    caches: bool = True
    filtered: bool = False
    axes: dict[str, dict[str, Kind]] = field(init=False)

    def __post_init__(self) -> None:
        commits, caches = _commits(self.length), _caches(self.block)
        self.axes = {
            "commit": commits | ({"learned": FILTER} if self.filtered else {}),
            "blocks": _blocks(self.length),
            "end": ENDS,
            "kv": caches if self.caches else {"recompute": caches["recompute"]},
            "extra": EXTRAS,
        }

    def described(self) -> dict[str, Any]:
        """What two processes must have in common to search one study."""
        return {"length": self.length} | {axis: list(kinds) for axis, kinds in self.axes.items()}

    def ask(self, trial: Any) -> Params:
        """A new composition. trial: an optuna trial, fixed or not."""
        params: dict[str, Any] = {}
        for axis, kinds in self.axes.items():
            params[axis] = trial.suggest_categorical(axis, list(kinds))
            for name, knob in kinds[params[axis]].knobs.items():
                params[_key(axis, params[axis], name)] = knob.ask(trial, _key(axis, params[axis], name))
        return params

    def params(self, **kinds: str | tuple[str, Mapping[str, float]]) -> dict[str, Any]:
        """Params of these kinds, with their usual numbers or those that stand beside; axes that are left out do what sequential
        decoding does."""
        found: dict[str, Any] = {}
        plain = {"commit": "quota", "blocks": "fixed", "end": "end-token", "kv": "recompute", "extra": "none"}
        for axis in self.axes:
            said = kinds.get(axis, plain[axis])
            kind, numbers = (said, {}) if isinstance(said, str) else said
            found[axis] = kind
            for name, knob in self.axes[axis][kind].knobs.items():
                found[_key(axis, kind, name)] = numbers.get(name, knob.usual)
        return found

    def recipe(self, params: Params) -> Recipe:
        """The composition that `params` say; axes on which it does what sequential decoding does stay empty."""
        made = {axis: self._made(axis, params) for axis in self.axes}
        commit, rule, end = made["commit"], made["blocks"], made["end"]
        assert isinstance(commit, Unmask) and isinstance(rule, BlockRule) and isinstance(end, EndRule)
        assert made["kv"] is None or isinstance(made["kv"], TokenKV)
        slow = isinstance(commit.rule, Quota) and (commit.rule.steps or self.length) >= self.length
        plain = isinstance(end, AtEndToken) and self._as_sequential(rule)
        drafts = isinstance(made["extra"], FreeDave)
        return Recipe(
            name=self.name(params), kv=made["kv"], commit=None if slow else commit, blocks=None if plain else InBlocks(rule=rule, end=end),
            verify=made["extra"] if drafts else None, revise=None if drafts else made["extra"],
        )  # fmt: skip

    def _as_sequential(self, rule: BlockRule) -> bool:
        """Are its blocks those of sequential decoding?"""
        if self.block is not None:
            return isinstance(rule, Fixed)
        size = rule.size if isinstance(rule, Fixed) else self.length if isinstance(rule, Whole) else None
        return size is not None and min(size, self.length) == min(BLOCK, self.length)

    def _made(self, axis: str, params: Params) -> Any:
        kind = params[axis]
        found = self.axes[axis][kind]
        return found.make(**{name: params[_key(axis, kind, name)] for name in found.knobs})

    def name(self, params: Params) -> str:
        """A label in words: what differs from sequential decoding."""
        plain, said = self.params(), []
        for axis, kinds in self.axes.items():
            kind = params[axis]
            numbers = {name: params[_key(axis, kind, name)] for name in kinds[kind].knobs}
            if all(plain.get(key) == params[key] for key in (axis, *(_key(axis, kind, name) for name in numbers))):
                continue
            told = ", ".join(f"{name} {_short(value)}" for name, value in numbers.items())
            said.append(f"{kind} ({told})" if told else kind)
        return " + ".join(said) or "sequential"


def first_guesses(space: TextSpace) -> list[dict[str, Any]]:
    """Compositions to begin with: what is safe and what is ours, the control of fewer evaluations, then each published method
    alone, caches with sequential decoding last, because they are slow."""
    quick: tuple[str, dict[str, float]] = ("predicted-end", {"steps": 1, "run": 2})
    careful: tuple[str, dict[str, float]] = ("threshold", {"doubt": 0.03})
    ours: tuple[str, dict[str, float]] = ("either", {"doubt": 0.14})
    exact = {"kv": "block-causal"} if "block-causal" in space.axes["kv"] else {}
    found = [
        space.params(commit="threshold", **exact),
        space.params(commit="threshold", end="predicted-end", **exact),
        space.params(commit=careful, end=quick, **exact),
        space.params(commit="quota", extra="drafts"),
        space.params(commit="threshold", extra="drafts"),
    ]
    if "echo" in space.axes["kv"]:
        found += [space.params(commit=rule, end=quick, kv="echo") for rule in (careful, ours)]
    fewer = [max(1, math.ceil(space.length * share)) for share in (0.75, 0.5, 0.25)]
    found += [space.params(commit=("quota", {"steps": steps})) for steps in fewer]
    found += [space.params(commit=kind) for kind in space.axes["commit"]]
    found += [space.params(commit="threshold", blocks=kind) for kind in space.axes["blocks"]]
    revisers = [kind for kind in space.axes["extra"] if kind not in ("none", "drafts")]
    found += [space.params(commit="wide-in" if kind == "narrow-out" else "threshold", extra=kind) for kind in revisers]
    found += [space.params(commit="threshold", kv=kind) for kind in space.axes["kv"]]
    found += [space.params(kv=kind) for kind in space.axes["kv"]]
    once = {tuple(guess.items()): guess for guess in found}
    return [guess for guess in once.values() if guess != space.params()]


def _key(axis: str, kind: str, name: str) -> str:
    return f"{axis}.{kind}.{name}"


def _short(value: float) -> str:
    return f"{value:.4g}"
