"""Sparse attention that can be trained through: its torch version against the reference and numerical gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.errors import UsageError
from hasten.sparse_attn import autograd
from hasten.sparse_attn.autograd import planned_attention, with_bias
from hasten.sparse_attn.blocks import Blocks, Order, uniform
from hasten.sparse_attn.mask import Mask, causal
from hasten.sparse_attn.pack import pack
from hasten.sparse_attn.plan import Plan
from hasten.sparse_attn.reference import reference
from hasten.sparse_attn.stand_ins.compensate import approximate_map, centroids
from tests.sparse_attn.random_blocks import Case, cases, generator, masks

GRADCHECK = torch.autograd.gradcheck


def tensors(case: Case, d: int = 4, dv: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    (b, hq, hk), g = case.heads, generator(case.seed)
    sq, sk = case.blocks.q.length, case.blocks.k.length
    shapes = ((b, hq, sq, d), (b, hk, sk, d), (b, hk, sk, dv))
    q, k, v = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return q, k, v


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_forward_is_the_reference(data: st.DataObject) -> None:
    case = data.draw(cases())
    blocks, q, k, v = case.blocks, *tensors(case)
    mask = data.draw(st.one_of(st.none(), masks(q.shape[2], k.shape[2])))
    keep = blocks.force(case.keep)
    plan = pack(blocks, keep, case.heads, block_m=16, block_n=16, mask=mask)
    stands = approximate_map(blocks, keep, groups=case.groups, mask=mask)
    tables = None
    if data.draw(st.booleans()) and stands.flatten(0, 1).shape[0] == plan.row_start.numel():
        arranged = (blocks.k.arrange(x) for x in (k, v))
        tables = centroids(*arranged, blocks.k, stands.flatten(0, 1), second_order=data.draw(st.booleans()))
    o, lse = planned_attention(q, k, v, plan, 0.4, compensation=tables)
    wanted = reference(q, k, v, blocks, keep, scale=0.4, mask=mask, compensation=tables)
    torch.testing.assert_close(o, wanted.o.double(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse, wanted.lse.double(), atol=1e-6, rtol=1e-6)


def problem(mask: Mask | None = None, groups: int = 2) -> tuple[Case, Plan]:
    """Small enough for numerical gradients: permuted, ragged, an empty block, a row that reads nothing."""
    g = generator(5)
    planes, hk, sq, sk = 2 * groups, 2, 7, 9

    def side(count: int, tokens: int, cuts: list[int]) -> Order:
        perm = torch.stack([torch.randperm(tokens, generator=g) for _ in range(count)])
        bounds = torch.tensor([[0, *cuts, tokens]], dtype=torch.int32).expand(count, -1)
        return Order(perm, bounds, torch.zeros(len(cuts) + 1, dtype=torch.int8))

    blocks = Blocks(side(planes, sq, [2, 5]), side(hk, sk, [1, 4, 4, 6]))
    keep = torch.rand(planes, 3, 5, generator=g) < 0.5
    keep[:, 0], keep[:, 1, 1] = False, True
    found = Case((1, planes, hk), blocks, keep, 5)
    return found, pack(blocks, keep, found.heads, block_m=4, block_n=2, mask=mask)


def finite(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Numerical differences of -inf are NaN."""
    return o, lse.masked_fill(lse.isinf(), 0.0)


@pytest.mark.parametrize("mask", [None, causal(7, 9), Mask(3, 2, 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_numerical_ones(mask: Mask | None, groups: int) -> None:
    case, plan = problem(mask, groups)
    inputs = [x.requires_grad_() for x in tensors(case)]
    assert GRADCHECK(lambda *x: finite(*planned_attention(*x, plan, 0.7)), inputs)


def test_gradients_of_the_bias() -> None:
    case, plan = problem()
    bias = torch.randn(1, 2, 9, generator=generator(1), dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (*tensors(case), bias)]
    assert GRADCHECK(lambda q, k, v, bias: finite(*planned_attention(q, k, v, plan, bias=bias)), inputs)


@pytest.mark.parametrize("second_order", [False, True])
def test_gradients_through_the_means_of_what_is_not_read(second_order: bool) -> None:
    case, plan = problem()
    q, k, v = tensors(case)
    stands = approximate_map(case.blocks, case.keep, groups=case.groups).flatten(0, 1)
    arranged = (case.blocks.k.arrange(x) for x in (k, v))
    made = centroids(*arranged, case.blocks.k, stands, second_order=second_order)
    leaves = [x.double() for x in (made.keys, made.values, made.variances) if x is not None]

    def run(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *spread: Tensor) -> tuple[Tensor, Tensor]:
        tables = replace(made, keys=keys, values=values, variances=spread[0] if spread else None)
        return finite(*planned_attention(q, k, v, plan, 0.5, compensation=tables))

    assert GRADCHECK(run, [x.detach().requires_grad_() for x in (q, k, v, *leaves)])
    # And on to the keys themselves, through the means.
    k = k.float().requires_grad_()
    tables = centroids(case.blocks.k.arrange(k), case.blocks.k.arrange(v), case.blocks.k, stands)
    o, _ = planned_attention(q.float(), k.detach(), v.float(), plan, compensation=tables)
    o.square().sum().backward()
    assert k.grad is not None and k.grad.abs().max() > 0


def test_slabs_of_any_size_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case, plan = problem(causal(7, 9))
    found = []
    for room in (1, 40, 1 << 22):
        monkeypatch.setattr(autograd, "ROOM", room)
        inputs = [x.requires_grad_() for x in tensors(case)]
        o, lse = planned_attention(*inputs, plan)
        found.append((o, lse, *torch.autograd.grad(o.sum() + finite(o, lse)[1].sum(), inputs)))
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            torch.testing.assert_close(x, y)


def test_dense_plan_has_the_gradients_of_dense_attention() -> None:
    g = generator(3)
    q, k, v = (torch.randn(2, 4 if i == 0 else 2, 50, 16, generator=g).requires_grad_() for i in range(3))
    side = Order(None, uniform(50, 16), torch.zeros(4, dtype=torch.int8))
    plan = pack(Blocks(side, side), torch.ones(1, 4, 4, dtype=torch.bool), (2, 4, 2), mask=causal(50, 50))
    of = torch.randn(2, 4, 50, 16, generator=g)
    o, _ = planned_attention(q, k, v, plan)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(o, wanted)
    for x, y in zip(torch.autograd.grad(o, (q, k, v), of), torch.autograd.grad(wanted, (q, k, v), of), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_are_rounded_once(dtype: torch.dtype) -> None:
    case, plan = problem()
    exact, short = [], []
    for wide, found in ((torch.float64, exact), (dtype, short)):
        inputs = [x.to(dtype).to(wide).requires_grad_() for x in tensors(case)]
        o, lse = planned_attention(*inputs, plan)
        found += [o, *torch.autograd.grad(o.double().square().sum(), inputs)]
        assert o.dtype == wide and lse.dtype == (torch.float64 if wide == torch.float64 else torch.float32)
    for x, y in zip(exact, short, strict=True):
        assert (x - y).abs().max() <= 4 * torch.finfo(dtype).eps * x.abs().max()


def test_what_is_not_read_may_hold_anything() -> None:
    case, _ = problem()
    q, k, v = tensors(case)
    keep = torch.zeros_like(case.keep)
    keep[:, 0, 1], keep[:, 2, 3:] = True, True  # rows of 3 and 5 keys; not the first key, nothing for the second block
    plan = pack(case.blocks, keep, case.heads, block_m=4, block_n=2)
    chosen = case.blocks.k.labels() != 0
    read = chosen.new_zeros(1, 2, 9)
    assert case.blocks.k.perm is not None and not chosen.all()
    read.view(2, 9).scatter_(1, case.blocks.k.perm, chosen)
    idle = torch.zeros(1, 4, 7, dtype=torch.bool)
    assert case.blocks.q.perm is not None
    idle.view(4, 7).scatter_(1, case.blocks.q.perm, case.blocks.q.labels() == 1)
    clean = [x.requires_grad_() for x in (q, k, v)]
    dirty = [
        x.detach().masked_fill(unread[..., None], torch.nan).requires_grad_()
        for x, unread in zip(clean, (idle, ~read, ~read), strict=True)
    ]
    found = []
    for inputs in (clean, dirty):
        o, _ = planned_attention(*inputs, plan)
        found.append((o, *torch.autograd.grad(o.sum(), inputs)))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


def test_bias_as_coordinates() -> None:
    g = generator(0)
    q, k = (torch.randn(1, 2, 6, 8, generator=g).bfloat16() for _ in range(2))
    bias = (3 * torch.randn(1, 2, 6, generator=g)).requires_grad_()
    x, y = with_bias(q, k, bias, 0.25)
    logits = (x.float() @ y.float().mT) * 0.25
    wanted = q.float() @ k.float().mT * 0.25 + bias[:, :, None]
    assert (logits - wanted).abs().max() < 2e-4, "one coordinate alone would be off by 1e-2"
    grad = torch.autograd.grad(logits.sum(), bias)[0]
    torch.testing.assert_close(grad, torch.full_like(grad, 6.0))


def test_second_derivatives_and_wrong_arguments_are_refused() -> None:
    case, plan = problem()
    q, k, v = (x.requires_grad_() for x in tensors(case))
    o, _ = planned_attention(q, k, v, plan)
    (first,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"bias": torch.zeros(1, 2, 5)}, "bias"), ({"backend": "flash"}, "auto, torch, triton"),
    ]  # fmt: skip
    for how, message in wrong:
        with pytest.raises(UsageError, match=message):
            planned_attention(q, k, v, plan, **how)
    with pytest.raises(UsageError, match="one dtype"):
        planned_attention(q, k.float(), v, plan)
