"""Attention as one opaque node of a compiled graph."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.errors import UsageError
from hasten.sparse_attn import attention, op
from hasten.sparse_attn.mask import Mask, causal
from tests.sparse_attn.kernel_cases import Case, case


@dataclass
class Site:
    """Dense until step 2, then nothing of it: what happens inside is not the graph's business."""

    step: int = 0
    seen: list[tuple[int, ...]] = field(default_factory=list)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen.append(tuple(q.shape))
        if self.step < 2:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return v.mean(2, True).expand(*q.shape[:3], -1)


class Block(nn.Module):
    """A transformer block as small as can be, whose attention is at a site."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.qkv, self.site, self.ticket = nn.Linear(16, 48), site, op.ticket(site)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return x + op.attend(q, k, v, self.ticket).transpose(1, 2).flatten(2)


def test_one_graph_for_all_steps_and_all_blocks() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    blocks = [Block(Site()) for _ in range(3)]
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(Block.forward, backend=count, fullgraph=True)
    x = torch.randn(2, 10, 16)
    with torch.no_grad():
        for step in range(4):
            for block in blocks:
                block.site.step = step
                y = compiled(block, x)
                assert torch.equal(y, block(x))
    assert all(len(block.site.seen) == 8 for block in blocks)
    assert len(graphs) == 1, f"{len(graphs)} graphs for three blocks of one class"
    called = [node.target for node in graphs[0].graph.nodes if "attend" in str(node.target)]
    assert len(called) == 1


def test_traced_ahead_of_time_it_computes_the_same() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block(Site())
    x = torch.randn(2, 10, 16)
    with torch.no_grad():
        wanted = block(x)
        assert torch.allclose(torch.compile(block, backend="aot_eager", fullgraph=True)(x), wanted)


def test_output_is_a_tensor_of_its_own() -> None:
    class Same(Site):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return v.transpose(0, 1).transpose(0, 1)

    site = Same()
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    o = op.attend(q, k, v, op.ticket(site))
    assert torch.equal(o, v) and o.data_ptr() != v.data_ptr() and o.is_contiguous()


def test_the_host_s_arguments_reach_the_site_where_they_are_not_defaults() -> None:
    found = []

    class Listens(Site):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, **named: object) -> Tensor:
            found.append(named)
            return torch.zeros_like(q)

    site = Listens()
    q, bias = torch.randn(1, 2, 5, 8), torch.zeros(5, 5)
    op.attend(q, q, q, op.ticket(site))
    op.attend(q, q, q, op.ticket(site), attn_mask=bias, dropout_p=0.5, is_causal=True, scale=0.25, enable_gqa=True)
    assert found[0] == {} and found[1].pop("attn_mask") is bias
    assert found[1] == {"dropout_p": 0.5, "is_causal": True, "scale": 0.25, "enable_gqa": True}


def test_a_site_that_is_gone_is_named() -> None:
    site = Site()
    ticket = op.ticket(site)
    q = torch.randn(1, 2, 5, 8)
    op.attend(q, q, q, ticket)
    del site
    gc.collect()
    with pytest.raises(UsageError, match=f"belongs to site {int(ticket)}, which is gone"):
        op.attend(q, q, q, ticket)


def test_attend_passes_the_checks_of_operators() -> None:
    site = Site()
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.hasten.attend, (q, k, v, op.ticket(site)), test_utils=checks)


def run(problem: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    found = op.sparse_attention(
        problem.q, *problem.arranged(), problem.plan, scale=problem.scale, compensation=problem.compensation,
        arranged=True,
    )  # fmt: skip
    return found.o, found.lse, found.lse_exact


TREE = Mask(None, 0, 20, torch.ones(70, 3, dtype=torch.bool))


@pytest.mark.parametrize("mask", [None, causal(70, 90), Mask(7, None, 2), TREE])
@pytest.mark.parametrize("compensation", [0, 1, 2])
def test_a_plan_within_a_graph(mask: Mask | None, compensation: int) -> None:
    torch._dynamo.reset()
    problem = replace(case(0, mask=mask, compensation=compensation, poison=False))
    wanted = attention.sparse_attention(
        problem.q, problem.k, problem.v, problem.plan, scale=problem.scale, compensation=problem.compensation
    )
    compiled = torch.compile(lambda: run(problem), backend="aot_eager", fullgraph=True)
    for o, lse, exact in (run(problem), compiled()):
        assert torch.equal(o, wanted.o) and torch.equal(lse, wanted.lse)
        assert (exact is None) == (compensation == 0)
        if exact is not None:
            assert wanted.lse_exact is not None and torch.equal(exact, wanted.lse_exact)


@pytest.mark.parametrize("compensation", [0, 2])
def test_sparse_attention_passes_the_checks_of_operators(
    monkeypatch: pytest.MonkeyPatch, compensation: int
) -> None:
    problem = case(1, dims=(8, 12), mask=TREE, compensation=compensation, poison=False)
    calls = []

    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if "hasten.sparse_attention" in str(func):
                calls.append(args)
            return func(*args, **(kwargs or {}))

    with Record():
        run(problem)
    (arguments,) = calls
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.hasten.sparse_attention, arguments, test_utils=checks)


def test_plans_of_one_shape_share_a_graph() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    def attend(q: Tensor, k: Tensor, v: Tensor, plan: object) -> Tensor:
        return op.sparse_attention(q, k, v, plan).o * 2  # type: ignore[arg-type]

    compiled = torch.compile(attend, backend=count, fullgraph=True)
    for seed in range(4):
        problem = case(seed, perm="none", poison=False)
        wanted = attention.sparse_attention(problem.q, problem.k, problem.v, problem.plan)
        assert torch.equal(compiled(problem.q, problem.k, problem.v, problem.plan), wanted.o * 2)
    assert len(graphs) <= 2, "one graph, and one more whose numbers of tiles and chunks are not fixed"
