"""Scores of kvpress (its `ScorerPress.score`) on current transformers, without kvpress's hooks.

Shapes: see `hasten.caching.decode`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from hasten.caching.decode.amount import HeadBudget, OwnHeads, Share
from hasten.caching.decode.kept import KeptCache
from hasten.caching.decode.score import Seen, SlotScore, SlotScoreState
from hasten.caching.decode.slots import Slots
from hasten.errors import RefusedError, UsageError


class Foreign(SlotScore):
    """What another library's object says slots are worth. It is not serialised: recipes with one cannot be written to YAML.

    press: has score(module, hidden_states, keys, values, attentions, kwargs) -> [B, Hk, S]. It is called once after each
    prompt, with the keys that are held; attentions is None, since nobody has them.
    """

    asks_host: ClassVar[bool] = True
    press: Any

    def start(self) -> SlotScoreState:
        return _Foreign(self.press)


class _Foreign(SlotScoreState):
    def __init__(self, press: Any) -> None:
        self.press = press

    def worth(self, slots: Slots, seen: Seen) -> Tensor:
        named = {**(seen.named or {}), "hidden_states": seen.hidden}
        name = type(self.press).__name__
        try:
            found = self.press.score(seen.module, seen.hidden, seen.k, seen.v, None, named)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise RefusedError(
                f"{name}.score failed at layer {seen.layer} ({type(error).__name__}: {error}). Presses that need attention weights or"
                " a model of their own cannot be used here; a score of hasten's may be."
            ) from error
        shape = (*seen.k.shape[:2], seen.k.shape[2])
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(f"{name}.score gave {got}; a score has the shape of keys without their last dimension, {shape}.")
        return found.float()


def from_kvpress(press: Any, heads: HeadBudget | None = None, **more: Any) -> KeptCache:
    """The policy that keeps what `press`, a kvpress `ScorerPress` or anything with its `score` and `compression_ratio`, would
    keep of each prompt: really evicted, positions kept, in batches with padding, under sampling and drafts.

    heads: how heads share (kvpress's AdaKVPress, whose heads only pretend, is `AdaptiveHeads()`). more: fields of
    `KeptCache`, such as amount, sinks and window.
    """
    if not callable(getattr(press, "score", None)):
        raise UsageError(f"from_kvpress() takes an object with score(...), got a {type(press).__name__}.")
    ratio = float(getattr(press, "compression_ratio", 0.0) or 0.0)
    if "amount" not in more and not 0 < ratio < 1:
        raise UsageError(f"from_kvpress(): compression_ratio is {ratio:g}; set it between 0 and 1, or pass amount=Share(share=...).")
    given: dict[str, Any] = {"amount": Share(share=1 - ratio) if 0 < ratio < 1 else None, "sinks": 0, "when": "prompt"}
    return KeptCache(score=Foreign(press=press), heads=heads or OwnHeads(), **{**given, **more})
