"""Text models: configurations, batches, masks and losses do what they claim."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hasten.distill.pretrain.config import load_config
from hasten.distill.pretrain.text_config import (
    CodeConfig,
    RecallConfig,
    TasksConfig,
    load_any,
    load_text_config,
)
from hasten.distill.pretrain.text_data import code_batch, recall_batch, tasks_batch
from hasten.distill.pretrain.text_objective import TextObjective, masked, predict, seen, seen_doubled
from hasten.distill.pretrain.text_tokenizer import load_tokenizer
from hasten.distill.pretrain.texts import build_model
from hasten.distill.pretrain.tiny_attention import MaskedBmmAttention
from hasten.errors import UsageError
from tests.text_training import KINDS, config

TEXTS = ("tiny-dllm", "tiny-dllm-block", "tiny-dllm-shifted", "tiny-lm", "tiny-draft", "tiny-lists")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer()


def noisy(c: Any, tokenizer: Any) -> Any:
    """A model whose output depends strongly on all that it sees."""
    torch.manual_seed(3)
    model = build_model(c, tokenizer).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


# -- configuration ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*TEXTS, "smoke-text"])
def test_bundled_configurations_are_valid(name: str) -> None:
    assert load_text_config(name).name == name


def test_sizes_are_as_told(tokenizer: Any) -> None:
    models = {name: build_model(load_text_config(name), tokenizer) for name in TEXTS}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert 5.0e6 <= counts["tiny-dllm"] <= 5.5e6 and 1.3e6 <= counts["tiny-lm"] <= 1.5e6 and counts["tiny-draft"] <= 0.25e6
    assert 2 * sum(counts.values()) < 18 * 2**20, "two bytes each: what the package carries"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model.widht": 3}, r"unknown key 'model\.widht'.*'width'"),
        ({"model.width": 33}, "multiple of 2 x heads"),
        ({"model.block": 8}, "block goes with attention: block"),
        ({"model.attention": "block"}, "block goes with attention: block"),
        ({"model.attention": "causal", "model.shifted": True}, "shifted goes with attention: full"),
        ({"tasks.shortest": 23}, "24 <= shortest <= longest"),
        ({"tasks": None, "code": None}, "nothing to learn from"),
        ({"later_from": 3}, "later_from goes with"),
        ({"tasks.later": 3}, "later_from goes with"),
        ({"code.length": 65}, r"model\.positions must be 65 at least"),
        ({"recall.longest": 40, "recall.length": 64}, "shortest <= longest <= length / 2"),
        ({"recall.length": 64}, "recall goes with code and attention: causal"),
        ({"kind": "txt"}, "Did you mean 'text'"),
        ({"training.lr": -1}, r"training\.lr.*got -1"),
    ],
)
def test_bad_settings_are_explained(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_any("smoke-text", settings)


def test_kinds_are_not_confused() -> None:
    assert load_any("smoke-image") == load_config("smoke-image")
    with pytest.raises(UsageError, match="expected kind: text"):
        load_text_config("smoke-image")


# -- batches ----------------------------------------------------------------------------------------------------
def test_task_batches_are_questions_answers_and_ends(tokenizer: Any) -> None:
    c = TasksConfig(batch=40, shortest=26, longest=31)
    batch, again = (tasks_batch(tokenizer, c, 5) for _ in range(2))
    assert torch.equal(batch.ids, again.ids) and 26 <= batch.ids.shape[1] <= 31
    assert len({tasks_batch(tokenizer, c, s).ids.shape[1] for s in range(20)}) == 6
    eos = tokenizer.eos_token_id
    for ids, answer, weight in zip(batch.ids, batch.answer, batch.weight, strict=True):
        text = tokenizer.decode(ids)
        question = text[: text.index("=") + 1]
        begin = len(tokenizer(question).input_ids)
        assert answer.tolist() == [i >= begin for i in range(len(ids))]
        first = ids.tolist().index(eos)
        assert bool((ids[first:] == eos).all())
        assert bool((weight[begin : first + 1] == 1).all()) and bool((weight[:begin] == 0).all())
        torch.testing.assert_close(weight[first + 1 :], torch.full_like(weight[first + 1 :], c.tail))


def test_recall_batches_end_with_a_passage_of_their_own() -> None:
    row, c = torch.arange(1000, 3000, dtype=torch.int16), RecallConfig(batch=40, length=64, shortest=6, longest=20)
    batch, again = (recall_batch(row, c, 7, 900) for _ in range(2))
    assert torch.equal(batch.ids, again.ids) and batch.answer.all()
    sizes = set()
    for b, (ids, weight) in enumerate(zip(batch.ids, batch.weight, strict=True)):
        size = int((weight != 1).sum()) + 2
        sizes.add(size)
        begins = [at for at in range(c.length - 2 * size + 1) if ids[at : at + size].equal(ids[-size:])]
        assert len(begins) == 1 and bool((weight[2 - size :] != 1).all())
        by_lot = ids[begins[0] : begins[0] + size] < 1000
        assert bool(by_lot.all()) if b % 2 else not bool(by_lot.any())
    assert sizes <= set(range(6, 21)) and len(sizes) > 8
    second = batch.weight != 1
    torch.testing.assert_close(batch.weight[second].sum(), (~second).sum().float())
    with pytest.raises(UsageError, match="sources have only 2000 tokens"):
        recall_batch(row, RecallConfig(length=2001), 1, 900)


def test_code_batches_are_windows_and_every_other_has_a_beginning() -> None:
    row = torch.arange(100, dtype=torch.int16)
    batch = code_batch(row, CodeConfig(batch=64, length=30), 9)
    assert bool((batch.ids.diff(dim=1) == 1).all()) and batch.ids.min() >= 0 and batch.ids.max() <= 99
    given = (~batch.answer).sum(1)
    assert bool((given[::2] == 0).all()) and bool((given[1::2] >= 1).all()) and given.max() < 30
    assert len(batch.ids[:, 0].unique()) > 20
    with pytest.raises(UsageError, match="have only 10 tokens"):
        code_batch(row[:10], CodeConfig(batch=1, length=30), 0)


@pytest.mark.parametrize("kind", ["full", "block"])
def test_the_share_of_masks_is_spread_evenly(kind: str) -> None:
    c = config(kind).model
    answer = torch.ones(64, 40, dtype=torch.bool)
    answer[:, :7] = False
    asked = masked(c, answer, torch.Generator().manual_seed(1))
    assert not bool(asked[:, :7].any())
    share = asked[:, 7:].float().mean(1)
    assert 0.45 < float(share.mean()) < 0.55
    groups = asked[:, 8:].view(64, 4, 8) if kind == "block" else asked[:, None, 8:]
    low = (groups.float().mean(2) < 0.25).float().mean()
    assert 0.1 < float(low) < 0.4, "some rows or blocks have few masks"
    assert float((groups.float().mean(2) > 0.75).float().mean()) > 0.1, "and some nearly all"
    if kind == "block":
        inside = groups.float().mean(2).std(1).mean()
        assert float(inside) > 0.2, "blocks of one text have shares of their own"


def test_the_mixture_changes_at_the_step_told(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    c = config(**{"tasks.later": 2, "code": None, "later_from": 5})
    objective = TextObjective(c, tokenizer, None, "cpu")
    sizes: list[int] = []

    def part(model: Any, batch: Any, seed: int) -> torch.Tensor:
        sizes.append(len(batch.ids))
        return torch.zeros(())

    monkeypatch.setattr(objective, "part", part)
    for step in (0, 4, 5, 9):
        objective(None, step)
    assert sizes == [4, 4, 2, 2]


# -- attention and predictions ----------------------------------------------------------------------------------
def test_masked_training_attention_equals_the_fused_one() -> None:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 10, 16, requires_grad=True) for _ in range(3)]
    sight = torch.rand(10, 10) < 0.5
    sight.fill_diagonal_(True)
    weight = torch.randn(2, 3, 10, 16)
    exact = sdpa(*parts, attn_mask=sight)
    wanted = torch.autograd.grad((exact * weight).sum(), parts)
    with MaskedBmmAttention(sight):
        ours = sdpa(*parts, attn_mask=sight)
        low = sdpa(*parts[:2], parts[2].bfloat16(), attn_mask=sight)
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), parts), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert low.dtype == torch.bfloat16, "under autocast the values' type decides"
    with MaskedBmmAttention(None):
        torch.testing.assert_close(sdpa(*parts), sdpa(*parts), atol=0, rtol=0)


@pytest.mark.parametrize("kind", list(KINDS))
def test_predictions_are_the_models_own_logits(kind: str, tokenizer: Any) -> None:
    c = config(kind)
    model = noisy(c, tokenizer)
    ids = torch.randint(3, 2048, (3, 13))
    asked = torch.rand(3, 13) < 0.4
    asked[:, 0] = False
    sight = seen(c.model, 13)
    with torch.no_grad():
        ours = predict(model, c.model, ids, asked)
        plain = model(input_ids=ids, attention_mask=sight[None, None]).logits
        if kind in ("shifted", "causal"):
            plain = plain.roll(1, 1)
    torch.testing.assert_close(ours, plain[asked], atol=1e-4, rtol=1e-4)
    if kind == "causal":
        with torch.no_grad():
            usual = model(input_ids=ids).logits.roll(1, 1)
        torch.testing.assert_close(usual[asked], ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [13, 16])
def test_block_training_sees_what_block_decoding_sees(length: int, tokenizer: Any) -> None:
    """Block by block: clean before, masks inside; later blocks must not matter."""
    c = config("block")
    model = noisy(c, tokenizer)
    clean = torch.randint(3, 2048, (2, length))
    asked = torch.rand(2, length) < 0.5
    asked[:, length - 1] = True
    masks = clean.masked_fill(asked, tokenizer.mask_token_id)
    with torch.no_grad():
        ours = predict(model, c.model, masks, asked, clean)
        rows = torch.zeros(2, length, 2048)
        for begin in range(0, length, 8):
            part = torch.cat([clean[:, :begin], masks[:, begin : begin + 8]], 1)
            sight = seen(c.model, part.shape[1])[None, None]
            rows[:, begin : begin + 8] = model(input_ids=part, attention_mask=sight).logits[:, begin:]
    torch.testing.assert_close(ours, rows[asked], atol=1e-4, rtol=1e-4)


def test_no_block_sees_its_own_answer() -> None:
    sight = seen_doubled(4, 10)
    group = torch.arange(10) // 4
    assert not bool((sight[:10, 10:] & (group[:, None] <= group[None, :])).any())
    assert not bool(sight[10:, :10].any()), "clean text sees no masks"


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_loss_is_the_mean_over_what_was_asked(kind: str, tokenizer: Any) -> None:
    c = config(kind)
    model = noisy(c, tokenizer)
    objective = TextObjective(c, tokenizer, None, "cpu")
    batch = tasks_batch(tokenizer, c.tasks, 3)
    with torch.no_grad():
        loss = float(objective.part(model, batch, 3))
    answer = batch.answer.clone()
    if kind == "causal":
        asked, ids = answer, batch.ids
    else:
        asked = masked(c.model, answer, torch.Generator().manual_seed(3))
        ids = batch.ids.masked_fill(asked, tokenizer.mask_token_id)
    with torch.no_grad():
        logits = predict(model, c.model, ids, asked, batch.ids if kind == "block" else None)
    each = F.cross_entropy(logits, batch.ids[asked], reduction="none")
    weight = batch.weight[asked]
    assert math.isclose(loss, float((each * weight).sum() / weight.sum()), rel_tol=1e-5)
