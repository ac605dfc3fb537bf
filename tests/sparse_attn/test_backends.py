"""Which backend runs a call, why the others do not, and that those taken by name compute the same."""

from __future__ import annotations

import inspect
import math
import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

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
        ({"head_dims": (64, 128)}, "take equal ones"),
        ({"head_dims": (68, 68)}, "multiples of 8"),
        ({"head_dims": (264, 264)}, "up to 256"),
        ({"plan": replace(diagonal(), mask=causal(64, 32))}, "mask"),
        ({"plan": case(0).plan}, "several ranges|overlapping"),
        ({}, None),
    ],
)
def test_xformers_refuses(monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], reason: str | None) -> None:
    monkeypatch.setattr(choice, "installed", lambda module: True)
    found = xformers.refuses(call(**changes))
    assert found is None if reason is None else any(part in str(found) for part in reason.split("|"))


@dataclass
class Gappy:
    """What xformers' BlockDiagonalGappyKeysMask is told, where xformers is not there."""

    q_seqlen: list[int]
    kv_seqstarts: list[int]
    kv_seqlen: list[int]

    @classmethod
    def from_seqlens(
        cls, q_seqlen: list[int], kv_seqstarts: list[int], kv_seqlen: list[int], *, device: torch.device
    ) -> Gappy:
        assert len(q_seqlen) == len(kv_seqlen) and len(kv_seqstarts) == len(kv_seqlen) + 1 and len(kv_seqlen)
        assert kv_seqstarts == sorted(kv_seqstarts) and device == torch.device("cpu")
        return cls(q_seqlen, kv_seqstarts, kv_seqlen)

    def materialize(self, shape: tuple[int, ...]) -> Tensor:
        """0 where a query reads a key, else -inf."""
        assert shape[-1] == self.kv_seqstarts[-1] and shape[-2] == sum(self.q_seqlen)
        bias, first = torch.full(shape, -math.inf), 0
        for queries, start, keys in zip(self.q_seqlen, self.kv_seqstarts, self.kv_seqlen, strict=False):
            bias[..., first : first + queries, start : start + keys] = 0
            first += queries
        return bias


def attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, scale: float) -> tuple[Tensor, Tensor]:
    """In place of xformers' operators, which run on GPUs only: by the mask that the bias says it is."""
    logits = (q[0, :, 0] @ k[0, :, 0].mT) * scale + attn_bias.materialize((q.shape[1], k.shape[1]))
    return (logits.softmax(-1) @ v[0, :, 0])[None, :, None], logits.logsumexp(-1)[None, None]


@pytest.fixture(params=["ours", "xformers"])
def fmha(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """xformers with its operators replaced, and its mask, too, where it is not installed."""
    if request.param == "ours":
        module = ModuleType("xformers.ops.fmha")
        module.attn_bias = SimpleNamespace(BlockDiagonalGappyKeysMask=Gappy)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "xformers.ops.fmha", module)
    else:
        module = pytest.importorskip("xformers.ops.fmha")
        inspect.signature(module.memory_efficient_attention_forward_requires_grad).bind(0, 0, 0, attn_bias=0, scale=0.1)
    monkeypatch.setattr(module, "memory_efficient_attention_forward_requires_grad", attention, raising=False)


@pytest.mark.usefixtures("fmha")
def test_xformers_is_asked_for_the_ranges_of_the_plan() -> None:
    torch.manual_seed(0)
    keep = torch.eye(4, dtype=torch.bool)[torch.randperm(4)][None]
    keep[0, 2] = False
    plan = pack(grid(64, 32, 1, False), keep, (2, 4, 2), block_m=16, block_n=8)
    q, k, v = (torch.randn(2, h, s, 16) for h, s in ((4, 64), (2, 32), (2, 32)))
    found, wanted = xformers.execute(q, k, v, plan, 0.3), execute(q, k, v, plan, 0.3)
    assert torch.allclose(found.o, wanted.o, atol=2e-6) and torch.allclose(found.lse, wanted.lse, atol=2e-6)
    assert (found.lse[:, :, 32:48] == -math.inf).all()


@pytest.mark.usefixtures("fmha")
def test_xformers_is_not_asked_for_nothing() -> None:
    plan = pack(grid(64, 32, 1, False), torch.zeros(1, 4, 4, dtype=torch.bool), (1, 2, 2), block_m=16, block_n=8)
    q, k = torch.randn(1, 2, 64, 16), torch.randn(1, 2, 32, 16)
    found = xformers.execute(q, k, k, plan, 0.3)
    assert (found.o == 0).all() and (found.lse == -math.inf).all()


def test_the_installed_xformers_is_what_was_read() -> None:
    """Its operators take our mask, of the head dimensions and on the GPUs that `refuses` says, and pack the LSE."""
    module = pytest.importorskip("xformers.ops.fmha")
    mask = module.attn_bias.BlockDiagonalGappyKeysMask
    taking = [
        operator for operator in (module.flash.FwOp, module.flash3.FwOp, module.cutlass.FwOp)
        if mask in operator.SUPPORTED_ATTN_BIAS_TYPES
    ]  # fmt: skip
    assert taking and all(operator.VARLEN_LSE_PACKED for operator in taking)
    assert min(operator.SUPPORTED_MAX_K for operator in taking) == xformers.WIDEST
    assert min(operator.CUDA_MINIMUM_COMPUTE_CAPABILITY for operator in taking) == xformers.AMPERE
    assert all(set(choice.HALF) <= operator.SUPPORTED_DTYPES for operator in taking)
