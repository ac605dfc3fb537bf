"""Which backend runs a call, why the others do not, and that those taken by name compute the same."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from hasten.errors import RefusedError, UsageError
from hasten.sparse_attn.backends import choice, flex, xformers
from hasten.sparse_attn.backends.executor import execute
from hasten.sparse_attn.blocks import Blocks, Order, uniform
from hasten.sparse_attn.mask import Mask, causal
from hasten.sparse_attn.pack import pack
from hasten.sparse_attn.plan import Plan
from tests.sparse_attn.kernel_cases import case


def call(**changes: object) -> choice.Call:
    """A call on a CUDA device that every backend would take, except for the changes."""
    plain = choice.Call(torch.device("cuda"), torch.bfloat16, (64, 64), diagonal(), False)
    return replace(plain, **changes)  # type: ignore[arg-type]


def grid(sq: int, sk: int, planes: int, perm: bool, block: tuple[int, int] = (16, 8)) -> Blocks:
    found = []
    for s, size in zip((sq, sk), block, strict=True):
        order = torch.stack([torch.randperm(s) for _ in range(planes)]) if perm else None
        bounds = uniform(s, size).expand(planes if perm else 1, -1)
        found.append(Order(order, bounds, torch.zeros(bounds.shape[1] - 1, dtype=torch.int8)))
    return Blocks(*found)


def diagonal() -> Plan:
    return pack(grid(64, 32, 1, False), torch.eye(4, dtype=torch.bool)[None], (1, 2, 2), block_m=16, block_n=8)


def test_auto_on_a_cpu_is_plain_torch() -> None:
    problem = case(0)
    found = choice.choose(problem.q, problem.v, problem.plan)
    assert (found.name, found.execute, found.refused) == ("torch", execute, ())


def test_auto_elsewhere_says_why_it_is_not_triton() -> None:
    problem = case(0)
    q = torch.empty(problem.q.shape, device="meta", dtype=torch.float64)
    found = choice.choose(q, q, problem.plan)
    assert found.name == "torch" and "float64" in found.refused[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "the tensors are torch.float64"),
        ({"head_dims": (64, 512)}, "a head dimension is 512"),
        ({"device": torch.device("cpu")}, "the tensors are on cpu"),
        ({}, None),
    ],
)
def test_triton(changes: dict[str, object], reason: str | None) -> None:
    if not choice.installed("triton"):
        pytest.skip("triton is not installed")
    found = choice._triton_refuses(call(**changes))
    assert found is None if reason is None else reason in str(found)


def test_triton_has_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "installed", lambda module: False)
    assert "triton is not installed" in str(choice._triton_refuses(call()))
    problem = case(0)
    with pytest.raises(RefusedError, match='backend="triton" cannot run this call: triton is not installed'):
        choice.choose(problem.q, problem.v, problem.plan, backend="triton")


def test_named_backends_say_why_they_cannot() -> None:
    problem = case(0)
    for name, reason in (("flex", "the tensors are on cpu"), ("xformers", "xformers is not installed|on cpu")):
        with pytest.raises(RefusedError, match=reason):
            choice.choose(problem.q, problem.v, problem.plan, backend=name)
    with pytest.raises(UsageError, match="Did you mean 'flex'"):
        choice.choose(problem.q, problem.v, problem.plan, backend="felx")


@pytest.mark.parametrize("perm", [False, True])
@pytest.mark.parametrize("mask", [None, causal(70, 90), Mask(20, 10, 5)])
def test_flex_computes_the_plan(perm: bool, mask: Mask | None) -> None:
    torch.manual_seed(0)
    blocks = grid(70, 90, 8 if perm else 1, perm)
    if perm:
        blocks = Blocks(blocks.q, grid(70, 90, 4, True).k)
    keep = torch.rand(8, 5, 12) < 0.4
    keep[:, 1] = False
    plan = pack(blocks, keep, (2, 4, 2), block_m=16, block_n=8, mask=mask)
    assert flex.not_uniform(plan) is None
    q, k, v = (torch.randn(2, h, s, 16) for h, s in ((4, 70), (2, 90), (2, 90)))
    k, v = blocks.k.arrange(k), blocks.k.arrange(v)
    found = flex.execute(q, k, v, plan, 0.3, compiled=False)
    wanted = execute(q, k, v, plan, 0.3)
    assert torch.allclose(found.o, wanted.o, atol=2e-6) and torch.allclose(found.lse, wanted.lse, atol=2e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cpu")}, "on CUDA devices only"),
        ({"compensated": True}, "stands in"),
        ({"plan": replace(diagonal(), mask=Mask(tree=torch.ones(64, 2).bool()))}, "tree mask"),
        ({"plan": case(0).plan}, "are not whole blocks"),
        ({}, None),
    ],
)
def test_flex_refuses(changes: dict[str, object], reason: str | None) -> None:
    found = flex.refuses(call(**changes))
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cpu")}, "run on CUDA devices"),
        ({"dtype": torch.float32}, "take float16 and bfloat16"),
        ({"compensated": True}, "stands in"),
        ({"plan": replace(diagonal(), mask=causal(64, 32))}, "mask"),
        ({"plan": case(0).plan}, "several ranges|overlapping"),
        ({}, None),
    ],
)
def test_xformers_refuses(monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], reason: str | None) -> None:
    monkeypatch.setattr(choice, "installed", lambda module: True)
    found = xformers.refuses(call(**changes))
    assert found is None if reason is None else any(part in str(found) for part in reason.split("|"))


def test_xformers_is_asked_for_the_ranges_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """xformers is not there: what its documentation says that these two functions do stands in for it."""

    def from_seqlens(
        *, q_seqlen: list[int], kv_seqstarts: list[int], kv_seqlen: list[int]
    ) -> list[tuple[int, int, int]]:
        assert len(kv_seqstarts) == len(kv_seqlen) + 1 and kv_seqstarts == sorted(kv_seqstarts)
        return list(zip(q_seqlen, kv_seqstarts, kv_seqlen, strict=False))

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, attn_bias: list[tuple[int, int, int]], scale: float
    ) -> tuple[Tensor, Tensor]:
        o, lse, first = torch.empty_like(q), torch.empty(1, 1, q.shape[1]), 0
        for queries, start, keys in attn_bias:
            logits = q[0, first : first + queries, 0] @ k[0, start : start + keys, 0].mT * scale
            o[0, first : first + queries, 0] = logits.softmax(-1) @ v[0, start : start + keys, 0]
            lse[0, 0, first : first + queries] = logits.logsumexp(-1)
            first += queries
        assert first == q.shape[1]
        return o, lse

    fmha = ModuleType("xformers.ops.fmha")
    fmha.attn_bias = SimpleNamespace(BlockDiagonalGappyKeysMask=SimpleNamespace(from_seqlens=from_seqlens))
    fmha.memory_efficient_attention_forward_requires_grad = attention
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", fmha)
    torch.manual_seed(0)
    keep = torch.eye(4, dtype=torch.bool)[torch.randperm(4)][None]
    keep[0, 2] = False
    plan = pack(grid(64, 32, 1, False), keep, (2, 4, 2), block_m=16, block_n=8)
    q, k, v = (torch.randn(2, h, s, 16) for h, s in ((4, 64), (2, 32), (2, 32)))
    found, wanted = xformers.execute(q, k, v, plan, 0.3), execute(q, k, v, plan, 0.3)
    assert torch.allclose(found.o, wanted.o, atol=2e-6) and torch.allclose(found.lse, wanted.lse, atol=2e-6)
    assert (found.lse[:, :, 32:48] == -math.inf).all()
