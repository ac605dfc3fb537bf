"""Objects written for kvpress score our caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.caching.decode.amount import AdaptiveHeads
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.decode_kv.foreign import from_kvpress
from hasten.pipelines.decode_kv.session import attach
from tests.pipelines.decode_kv.kv_contract import generated, model, open_session, padded, steps, text


@dataclass
class ValueNormPress:
    """As somebody would write it for kvpress: values of large length are kept; queries are made again from hidden states."""

    compression_ratio: float = 0.5
    called: int = 0

    def score(
        self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        self.called += 1
        queries = module.q_proj(hidden_states[:, -4:])  # type: ignore[operator]
        assert queries.shape[1] == 4 and attentions is None
        cos, sin = kwargs["position_embeddings"]
        assert cos.shape[1] == hidden_states.shape[1] == sin.shape[1]
        return values.norm(dim=-1)

    __hash__ = object.__hash__


def test_a_press_decides_what_stays() -> None:
    ids, press = text(), ValueNormPress()
    with open_session(from_kvpress(press)) as run:
        cache, everything = run.cache(), None
        steps(run, cache, [ids])
        slots = cache.layers[1].slots
    assert press.called == 3 and slots.tokens == [20.0]
    with open_session(from_kvpress(press, amount=None)) as run:
        everything = run.cache()
        steps(run, everything, [ids])
    v = everything.layers[1].slots.view().v
    worth = v[0, 0].norm(dim=-1)
    worth[-1] = float("inf")  # the newest stays in any case
    assert slots.place[0, 0].tolist() == worth.topk(20).indices.sort().values.tolist()


def test_it_works_in_a_batch_and_frees_memory_by_head() -> None:
    ids, mask = padded()
    with open_session(from_kvpress(ValueNormPress(0.75), heads=AdaptiveHeads())) as run:
        tokens, logits = generated(model(), ids, mask)
        assert run.report().share < 0.9  # a third of that is what was generated, and places
    assert tokens.shape == (3, 10) and bool(torch.isfinite(logits).all())


class Wrong:
    compression_ratio = 0.5

    def __init__(self, found: Any) -> None:
        self.found = found

    def score(self, *args: Any) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_what_is_no_score_is_said() -> None:
    with pytest.raises(UsageError, match=r"score\(...\)"):
        from_kvpress(object())
    with pytest.raises(UsageError, match="compression_ratio is 0"):
        from_kvpress(ValueNormPress(0.0))
    for found, error, words in ((torch.ones(3), UsageError, "shape of keys"), (KeyError("x"), RefusedError, "Wrong.score failed")):
        with attach(model(), from_kvpress(Wrong(found))) as run, pytest.raises(error, match=words):
            steps(run, run.cache(), [text()])
