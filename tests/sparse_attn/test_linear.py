"""The linear branch against its definition, written out as matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn.blocks import SELECT, SPARSE, Blocks, Order
from hasten.sparse_attn.merge import merge
from hasten.sparse_attn.stand_ins.linear import features, linear_attention, projection, random_features, rest


def inputs(b: int, hq: int, hk: int, sq: int, sk: int, f: int, dv: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, hq, sq, f), (b, hk, sk, f), (b, hk, sk, dv))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def weights(q: Tensor, k: Tensor, feature: Any) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return features(q, feature) @ features(k, feature).mT


@settings(max_examples=15, deadline=None)
@given(
    sq=st.integers(1, 40), sk=st.integers(0, 40), groups=st.sampled_from([1, 2, 5]),
    feature=st.sampled_from(["relu", "elu"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_is_the_product_of_features(sq: int, sk: int, groups: int, feature: Any, seed: int) -> None:
    q, k, v = inputs(2, 2 * groups, 2, sq, sk, 5, 3, seed)
    found, wanted = linear_attention(q, k, v, feature), weights(q, k, feature)
    torch.testing.assert_close(found.denominator, wanted.sum(-1))
    torch.testing.assert_close(found.numerator, wanted @ v.repeat_interleave(groups, 1))


@pytest.mark.parametrize("n", [1, 100, 256, 257, 600])
@pytest.mark.parametrize("decay", [None, torch.tensor([0.98, 0.5], dtype=torch.float64)])
def test_causal_with_decay(n: int, decay: Tensor | None) -> None:
    q, k, v = inputs(1, 4, 2, n, n, 6, 4)
    found = linear_attention(q, k, v, "elu", causal=True, decay=decay)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    rate = (torch.ones(2, dtype=torch.float64) if decay is None else decay).repeat_interleave(2)[:, None, None]
    wanted = weights(q, k, "elu") * (rate ** distance.clamp(min=0)) * (distance >= 0)
    torch.testing.assert_close(found.denominator, wanted.sum(-1))
    torch.testing.assert_close(found.numerator, wanted @ v.repeat_interleave(2, 1))


def blocks_of(planes_q: int, planes_k: int, sq: int, sk: int, seed: int) -> Blocks:
    generator = torch.Generator().manual_seed(seed)

    def side(planes: int, tokens: int, count: int, role: int) -> Order:
        cuts = torch.randint(0, tokens + 1, (planes, count - 1), generator=generator)
        ends = torch.tensor([[0, tokens]]).expand(planes, 2)
        bounds = torch.cat([cuts, ends], 1).sort(1).values.int()
        return Order(None, bounds, torch.full((count,), role, dtype=torch.int8), tokens=tokens)

    return Blocks(side(planes_q, sq, 4, SPARSE), side(planes_k, sk, 6, SELECT))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_rest_reads_the_blocks_it_is_given(groups: int, shared: bool) -> None:
    q, k, v = inputs(2, 2 * groups, 2, 37, 53, 5, 3)
    blocks = blocks_of(1 if shared else 4 * groups, 1 if shared else 4, 37, 53, 1)
    chosen = torch.rand(1 if shared else 4 * groups, 4, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    found = rest(q, k, v, blocks, chosen, "elu")
    planes = 4 * groups
    q_label, k_label = blocks.q.labels().expand(planes, -1), blocks.k.labels().repeat_interleave(
        1 if shared else groups, 0
    ).expand(planes, -1)  # fmt: skip
    mask = chosen.expand(planes, 4, 6)[torch.arange(planes)[:, None, None], q_label[:, :, None], k_label[:, None]]
    wanted = weights(q, k, "elu") * mask.view(2, 2 * groups, 37, 53)
    torch.testing.assert_close(found.denominator, wanted.sum(-1))
    torch.testing.assert_close(found.numerator, wanted @ v.repeat_interleave(groups, 1))


def test_adds_up_with_exact_attention() -> None:
    """Features in the units of exp(s q.k) make the merge of exact and linear parts an estimate of dense attention."""
    q, k, v = inputs(1, 2, 2, 30, 64, 16, 8)
    q, k, scale = q * 0.7, k * 0.7, 0.25
    logits = q @ k.mT * scale
    dense = logits.softmax(-1) @ v
    near = logits[..., :32]
    exact = (near.softmax(-1) @ v[:, :, :32], near.logsumexp(-1))
    rows = projection(2048, 16)
    phi_q, of_q = random_features(q, rows, scale, keys=False)
    phi_k, of_k = random_features(k[:, :, 32:], rows, scale, keys=True)
    far = linear_attention(phi_q, phi_k, v[:, :, 32:].float(), "none").pair(of_q + of_k)
    o, lse = merge([(exact[0].float(), exact[1].float()), far])
    dropped = (exact[0] - dense).norm() / dense.norm()
    error = (o - dense).norm() / dense.norm()
    assert error < 0.2 * dropped, (error, dropped)
    assert (lse - logits.logsumexp(-1)).abs().mean() < 0.05


def test_random_features_are_right_on_average() -> None:
    q, k, _ = (x / 2 for x in inputs(1, 1, 1, 4, 5, 8, 1, seed=3))
    wanted = (q @ k.mT * 0.3).exp()
    found = torch.zeros_like(wanted)
    for seed in range(40):
        rows = projection(64, 8, seed)
        (x, of_q), (y, of_k) = random_features(q, rows, 0.3, keys=False), random_features(k, rows, 0.3, keys=True)
        found += (x @ y.mT).double() * (of_q + of_k).double().exp()[..., None] / 40
    assert ((found - wanted) / wanted).abs().max() < 0.15
    huge, log = random_features(100 * q, projection(16, 8), 0.3, keys=True)
    assert huge.isfinite().all() and log.isfinite().all() and (huge <= 1).all()


def test_no_mass_is_no_part_of_a_merge() -> None:
    q, k, v = inputs(1, 1, 1, 4, 6, 3, 2)
    o, lse = linear_attention(-q.abs(), k, v, "relu").pair()
    assert (o == 0).all() and (lse == -math.inf).all()
    other = (torch.randn(1, 1, 4, 2), torch.zeros(1, 1, 4))
    torch.testing.assert_close(merge([other, (o.float(), lse.float())])[0], other[0])


def test_torch_version_has_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 1, 5, 5, 3, 2))
    for how in ({"feature": "elu"}, {"feature": "elu", "causal": True}):
        assert torch.autograd.gradcheck(lambda *x, how=how: linear_attention(*x, **how).pair(), (q, k, v))
    blocks = blocks_of(2, 1, 5, 5, 0)
    chosen = torch.ones(2, 4, 6, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda *x: rest(*x, blocks, chosen, "elu").pair(), (q, k, v))


def test_says_what_does_not_fit() -> None:
    q, k, v = inputs(1, 2, 2, 5, 6, 3, 2)
    with pytest.raises(UsageError, match="as many queries"):
        linear_attention(q, k, v, causal=True)
    with pytest.raises(UsageError, match="decay"):
        linear_attention(q, k, v, decay=torch.ones(2))
    with pytest.raises(UsageError, match="feature map"):
        linear_attention(q, k, v, "gelu")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Shapes"):
        linear_attention(q, k[:, :, :3], v)
