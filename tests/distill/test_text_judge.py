"""The judge of text models: its decoding is sequential, its likelihood exact where that is known in closed form."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.distill.pretrain import text_judge
from hasten.distill.pretrain.text_config import load_text_config
from hasten.distill.pretrain.text_tokenizer import load_tokenizer
from hasten.distill.pretrain.texts import build_model
from hasten.pipelines.list_tasks import TASKS

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "shifted": {"model.shifted": True},
    "block": {"model.attention": "block", "model.block": 4},
    "causal": {"model.attention": "causal"},
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer()


def model_of(kind: str, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    return build_model(load_text_config("smoke-text", KINDS[kind]), tokenizer).eval()


class Scripted:
    """Knows the text, and is sure of places in the order of `sure` (highest first)."""

    def __init__(self, text: Tensor, sure: Tensor, kind: str, model: Any) -> None:
        self.text, self.sure, self.shift = text, sure, kind in ("shifted", "causal")
        self.config = model.config
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, **_: Any) -> Any:
        self.seen.append(input_ids.clone())
        b, length = input_ids.shape
        out = torch.zeros(b, length, 2048)
        out.scatter_(2, self.text[:, :length, None], self.sure[:, :length, None])
        out[..., 2] = 50.0  # the mask itself is what a model must never write
        return SimpleNamespace(logits=out.roll(-1, 1) if self.shift else out)


@pytest.mark.parametrize("kind", list(KINDS))
def test_decoding_writes_one_token_a_forward_the_surest_first(kind: str, tokenizer: Any) -> None:
    torch.manual_seed(1)
    text = torch.randint(3, 2048, (3, 13))
    sure = 9 + 9 * torch.rand(3, 13)
    scripted = Scripted(text, sure, kind, model_of(kind, tokenizer))
    out = text_judge.decode(scripted, text[:, :5], 8)
    assert torch.equal(out, text) and len(scripted.seen) == 8
    states = [*scripted.seen, out]
    for row in range(3):
        places = [int((a[row] != b[row]).nonzero()) for a, b in itertools.pairwise(states)]
        if kind == "causal":
            assert places == list(range(5, 13))
        elif kind == "block":
            groups = [[p for p in places if p // 4 == block] for block in (1, 2, 3)]
            assert places == list(itertools.chain(*groups)), "block by block"
            assert all(g == sorted(g, key=lambda p: -float(sure[row, p])) for g in groups)
        else:
            assert places == sorted(range(5, 13), key=lambda p: -float(sure[row, p]))


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_model_that_knows_nothing_has_the_likelihood_of_a_guess(kind: str, tokenizer: Any) -> None:
    model = model_of(kind, tokenizer)
    torch.nn.init.zeros_(model.lm_head.weight)
    ids = torch.randint(3, 2048, (5, 13))
    guess = (13 - 6) * math.log(2048 - 2)  # mask and padding are never written
    assert math.isclose(text_judge.nll(model, ids, 6), guess, rel_tol=1e-5)


def test_orders_ask_for_every_number_of_places_equally_often() -> None:
    asked = torch.zeros(70, 12, dtype=torch.bool)
    asked[:, 5:] = True
    group = torch.zeros(12, dtype=torch.long)
    chosen, weight = text_judge._orders(asked, group, torch.Generator().manual_seed(0))
    counts = chosen.sum(1)
    assert counts.bincount().tolist() == [0] + [10] * 7 and not bool(chosen[:, :5].any())
    torch.testing.assert_close(weight[:, 5:], (7 / counts)[:, None].expand(-1, 7))


@pytest.mark.parametrize("kind", list(KINDS))
def test_logits_stand_at_the_token_they_predict(kind: str, tokenizer: Any) -> None:
    """Changing what comes at or after a place changes what a causal model says there only from the next place on."""
    model = model_of(kind, tokenizer)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    ids = torch.randint(3, 2048, (1, 12))
    other = ids.clone()
    other[0, 6] = 3 + (ids[0, 6] - 2) % 2000
    with torch.no_grad():
        a, b = (text_judge.logits(model, x)[0, 1:, 3:] for x in (ids, other))
    changed = ((a - b).abs().amax(-1) > 1e-6).nonzero()[:, 0] + 1
    first = {"full": 1, "shifted": 1, "block": 4, "causal": 7}[kind]
    assert changed.tolist() == list(range(first, 12))


def test_rows_name_every_task_with_its_closed_form(tokenizer: Any) -> None:
    rows = text_judge.tasks_rows(model_of("full", tokenizer), tokenizer, 3)
    assert [row["task"] for row in rows] == list(TASKS)
    for row in rows:
        assert 0 <= row["exact_match"] <= 1 and math.isfinite(row["nll"])
        assert (row["closed_form"] > 0) == (row["task"] in ("insert", "shuffle"))


def test_reading_stops_at_the_end_of_the_text(tokenizer: Any) -> None:
    ids = torch.tensor([*tokenizer(" b a").input_ids, 1, *tokenizer(" c").input_ids])
    assert text_judge.read(tokenizer, ids) == " b a"
    assert text_judge.read(tokenizer, ids[:2]) == " b a"
