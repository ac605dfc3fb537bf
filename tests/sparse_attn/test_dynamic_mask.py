"""The trainable dynamic mask: what it reads, and that gradients reach its parameters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.errors import UsageError
from hasten.part import parse
from hasten.sparse_attn.autograd import planned_attention
from hasten.sparse_attn.text.dynamic_mask import DynamicMask, TopBias


def inputs(b: int, hq: int, hk: int, sq: int, sk: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, h, s, d, generator=generator) for h, s in ((hq, sq), (hk, sk), (hk, sk)))
    return q, k, v


def what_is_read(choice: TopBias, bias: Tensor, heads: tuple[int, int, int], queries: int, causal: bool) -> Tensor:
    """bool [B * Hq, Sq, Sk], out of attention itself: values that name their key."""
    b, hq, hk = heads
    keys = bias.shape[2]
    plan = choice.plan(bias, heads, queries, causal=causal, block_m=16, block_n=16)
    zeros = torch.zeros(b, hq, queries, 2), torch.zeros(b, hk, keys, 2)
    o, _ = planned_attention(*zeros, torch.eye(keys).expand(b, hk, -1, -1).contiguous(), plan)
    return o.flatten(0, 1) > 0


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, read: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v, bias = (x.repeat_interleave(groups, 1) for x in (k, v, bias))
    logits = q @ k.mT * q.shape[-1] ** -0.5 + bias[:, :, None]
    return logits.masked_fill(~read.view(logits.shape), -torch.inf).softmax(-1) @ v


@settings(max_examples=20, deadline=None)
@given(
    keys=st.integers(1, 60), queries=st.integers(1, 40), w=st.integers(1, 70), block=st.sampled_from([1, 4, 7]),
    groups=st.sampled_from([1, 3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_all_queries_read_the_keys_with_the_largest_bias(
    keys: int, queries: int, w: int, block: int, groups: int, seed: int
) -> None:
    bias = torch.randn(2, 2, keys, generator=torch.Generator().manual_seed(seed))
    found = what_is_read(TopBias(keys=w, block=block), bias, (2, 2 * groups, 2), queries, causal=False)
    assert torch.equal(found, found[:, :1].expand_as(found)), "without a mask all queries read the same keys"
    for plane, row in enumerate(found[:, 0]):
        own = bias.view(4, keys)[plane // groups]
        best = own.topk(min(w, keys)).indices
        if block == 1:
            assert set(row.nonzero()[:, 0].tolist()) == set(best.tolist())
        else:
            assert row.sum() <= -(-w // block) * block and row[own.argmax()]


@settings(max_examples=20, deadline=None)
@given(
    keys=st.integers(1, 60), behind=st.integers(0, 30), w=st.integers(1, 40), block=st.sampled_from([1, 4]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_causal_queries_read_at_least_their_own_best_and_no_more_than_a_tile_beside(
    keys: int, behind: int, w: int, block: int, seed: int
) -> None:
    queries = max(1, keys - behind)
    bias = torch.randn(1, 1, keys, generator=torch.Generator().manual_seed(seed))
    found = what_is_read(TopBias(keys=w, block=block), bias, (1, 1, 1), queries, causal=True)[0]
    for query, row in enumerate(found):
        last = query + keys - queries
        assert not row[last + 1 :].any() and row[last]
        assert row.sum() <= w + 16 + 2 * block
        if block == 1:
            assert row[bias[0, 0, : last + 1].topk(min(w, last + 1)).indices].all()


def test_no_choice_depends_on_a_later_token() -> None:
    """Otherwise training would see what decoding cannot."""
    bias = torch.randn(1, 2, 50, generator=torch.Generator().manual_seed(1))
    for choice in (TopBias(keys=5), TopBias(keys=8, block=4)):
        before = what_is_read(choice, bias, (1, 2, 2), 50, causal=True)
        for changed in (10, 16, 33):
            other = bias.clone()
            other[:, :, changed:] = torch.randn(1, 2, 50 - changed) * 10
            after = what_is_read(choice, other, (1, 2, 2), 50, causal=True)
            assert torch.equal(before[:, :changed, :changed], after[:, :changed, :changed])


@pytest.mark.parametrize("form", ["linear", "exp"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_reach_the_parameters(form: str, causal: bool, groups: int) -> None:
    q, k, v = inputs(2, 2 * groups, 2, 40, 40, 8)
    torch.manual_seed(0)
    module = DynamicMask(2, 8, TopBias(keys=10), form)  # type: ignore[arg-type]
    torch.nn.init.normal_(module.A)
    v.requires_grad_()
    o = module(q, k, v, causal=causal)
    read = what_is_read_by(module, q, k, v, causal)
    wanted = dense(q, k, v, module.bias(v), read)
    torch.testing.assert_close(o, wanted, atol=1e-5, rtol=1e-4)
    of = torch.randn_like(o)
    leaves = (module.A, module.dt.weight, v)
    for x, y in zip(torch.autograd.grad(o, leaves, of), torch.autograd.grad(wanted, leaves, of), strict=True):
        assert x.abs().max() > 0
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)


def what_is_read_by(module: DynamicMask, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    plan = module.choice.plan(module.bias(v), (q.shape[0], q.shape[1], k.shape[1]), q.shape[2], causal=causal)
    eye = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1).contiguous()
    o, _ = planned_attention(torch.zeros_like(q), torch.zeros_like(k), eye, plan)
    return o.detach().flatten(0, 1) > 0


def test_the_mask_is_learned() -> None:
    """One key in sixteen carries the answer and looks like all others to the queries; its value tells."""
    torch.manual_seed(0)
    module = DynamicMask(1, 4, TopBias(keys=16))
    torch.nn.init.constant_(module.A, 0.1)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = []
    for _ in range(120):
        v = torch.randn(4, 1, 16, 4) * 0.1
        v[..., 3] = 0
        place = torch.randint(0, 16, (4,))
        v[torch.arange(4), 0, place, 3] = 2.0
        answer = v[torch.arange(4), 0, place]
        o = module(torch.zeros(4, 1, 1, 4), torch.zeros(4, 1, 16, 4), v)[:, 0, 0]
        loss = (o - answer).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 4
    module.choice = TopBias(keys=1)
    torch.testing.assert_close(module(torch.zeros(4, 1, 1, 4), torch.zeros(4, 1, 16, 4), v)[:, 0, 0], answer)


def test_parts_can_be_written_down_and_wrong_ones_are_refused() -> None:
    part = TopBias(keys=64, block=16)
    assert part.model_dump() == {"kind": "dynamic_mask", "keys": 64, "block": 16}
    assert parse(TopBias, part.model_dump(), "test") == part
    with pytest.raises(UsageError, match="at least as many keys"):
        part.plan(torch.zeros(1, 1, 5), (1, 1, 1), 6, causal=True)
