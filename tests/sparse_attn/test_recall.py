"""The share of the mass that was read, measured on samples: against the truth, in every situation that a call can be in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hasten.sparse_attn.mask import Mask, causal
from hasten.sparse_attn.recall import sampled, sampled_recall
from hasten.sparse_attn.segments import Tokens, padding, plain, text, video
from tests.sparse_attn.random_blocks import normal


def logits(q: Tensor, k: Tensor, mask: Mask | None) -> Tensor:
    found = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * 0.3
    if mask is not None:
        found.masked_fill_(~mask.allowed(torch.arange(q.shape[2]), torch.arange(k.shape[2]), k.shape[2]), -math.inf)
    return found


@pytest.mark.parametrize("mask", [None, causal(60, 60), Mask(left=9, right=2)])
@pytest.mark.parametrize("held", [2**26, 1])
def test_with_as_many_samples_as_queries_it_is_the_mean(
    mask: Mask | None, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.sparse_attn.sums.HELD", held)
    q, k = normal(0, 2, 4, 60, 8), normal(1, 2, 2, 60, 8)
    full = logits(q, k, mask)
    read = full[..., :40].logsumexp(-1)
    truth = (read - full.logsumexp(-1)).exp().mean(-1).view(-1)
    found = sampled_recall(q, k, read, plain(60), plain(60), 0.3, samples=60, mask=mask)
    assert torch.allclose(found.double(), truth, atol=1e-5)


def test_a_few_samples_are_near() -> None:
    q, k = normal(2, 1, 2, 2000, 8), normal(3, 1, 2, 2000, 8)
    full = logits(q, k, None)
    read = full[..., :1000].logsumexp(-1)
    truth = (read - full.logsumexp(-1)).exp().mean(-1).view(-1)
    found = sampled_recall(q, k, read, plain(2000), plain(2000), 0.3)
    assert (found - truth).abs().max() < 0.03


def test_text_and_padding_neither_ask_nor_count() -> None:
    valid = torch.tensor([4, 9])
    tokens = Tokens((video(2, 4, 5), text(9, valid=valid), padding(7)))
    q, k = normal(4, 2, 2, 56, 8), normal(5, 2, 2, 56, 8)
    real = torch.arange(49) < (40 + valid[:, None])
    q[:, :, 40:], k[:, :, 49:] = math.nan, math.nan
    k[0, :, 44:] = math.nan
    full = logits(q, k, None)[..., :49].masked_fill(~real[:, None, None], -math.inf)
    read = full[..., :20].logsumexp(-1)
    truth = (read - full.logsumexp(-1)).exp()[:, :, :40].mean(-1).view(-1)
    found = sampled_recall(q, k, read, tokens, tokens, 0.3)
    assert torch.allclose(found.double(), truth, atol=1e-5)


def test_queries_that_may_read_nothing_do_not_count() -> None:
    mask = Mask(left=None, right=0, offset=-30)
    q, k = normal(6, 1, 2, 60, 8), normal(7, 1, 2, 60, 8)
    full = logits(q, k, mask)
    read = full[..., :5].logsumexp(-1)
    truth = (read - full.logsumexp(-1)).exp()[:, :, 30:].mean(-1).view(-1)
    found = sampled_recall(q, k, read, plain(60), plain(60), 0.3, mask=mask)
    assert torch.allclose(found.double(), truth, atol=1e-5)


def test_a_call_without_sparse_queries_has_read_everything() -> None:
    q = normal(8, 1, 2, 9, 8)
    found = sampled_recall(q, q, torch.zeros(1, 2, 9), Tokens((text(9),)), Tokens((text(9),)), 0.3)
    assert torch.equal(found, torch.ones(2))


def test_samples_are_sparse_queries_spread_over_all_of_them() -> None:
    tokens = Tokens((text(100), video(4, 10, 10), padding(50), video(2, 10, 10, "second")))
    found = sampled(tokens, 60)
    assert len(set(found)) == 60
    assert all(100 <= at < 500 or at >= 550 for at in found)
    assert 35 <= sum(at < 500 for at in found) <= 45
    assert len({(at - 100) % 10 for at in found if at < 500}) == 10, "not always the same column"
    assert sampled(plain(5), 60) == [0, 1, 2, 3, 4]
