"""The public call: what it refuses, what it defaults to, and what a plan costs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import hasten.sparse_attn as package
from hasten.errors import RefusedError, UsageError
from hasten.sparse_attn.attention import choose, cost, density, flops, pairs, sparse_attention, tile_density
from hasten.sparse_attn.backends.executor import execute
from hasten.sparse_attn.blocks import Blocks, Order, uniform
from hasten.sparse_attn.pack import pack
from hasten.sparse_attn.reference import reference, token_map
from tests.sparse_attn.kernel_cases import case


def test_keys_are_arranged_here_or_by_the_caller() -> None:
    problem = case(0, poison=False)
    k, v = problem.arranged()
    direct, chosen = execute(problem.q, k, v, problem.plan, problem.scale), choose(problem.q, v, problem.plan)
    for found in (
        sparse_attention(problem.q, problem.k, problem.v, problem.plan, scale=problem.scale),
        sparse_attention(problem.q, k, v, problem.plan, scale=problem.scale, arranged=True),
        sparse_attention(problem.q, k, v, problem.plan, scale=problem.scale, arranged=True, backend=chosen),
    ):
        assert torch.equal(found.o, direct.o) and torch.equal(found.lse, direct.lse)


def test_scale_defaults_to_that_of_dense_attention() -> None:
    problem = case(1, poison=False)
    found = sparse_attention(problem.q, problem.k, problem.v, problem.plan)
    truth = reference(problem.q, problem.k, problem.v, problem.blocks, problem.keep)
    assert torch.allclose(found.o.double(), truth.o, atol=1e-5)


def test_strided_inputs() -> None:
    problem = case(2, heads=(2, 2), poison=False)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    assert not q.is_contiguous()
    wanted = sparse_attention(problem.q, problem.k, problem.v, problem.plan)
    assert torch.equal(sparse_attention(q, k, v, problem.plan).o, wanted.o)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"q": p.q[0]}, r"q is \[2, 70, 16\], not \[batch, heads, tokens, head dim\]"),
        (lambda p: {"k": p.k.half()}, "k is torch.float16 and q torch.float32"),
        (lambda p: {"q": p.q.long(), "k": p.k.long(), "v": p.v.long()}, "q is torch.int64"),
        (lambda p: {"v": p.v[:, :, :-1]}, r"v is \[1, 1, 89, 16\]; the plan is for \[1, 1, 90, 16\]"),
        (lambda p: {"q": p.q[:, :1]}, r"q is \[1, 1, 70, 16\]; the plan is for \[1, 2, 70, 16\]"),
        (lambda p: {"k": p.k[..., :8]}, r"k is \[1, 1, 90, 8\]"),
        (lambda p: {"scale": float("nan")}, "scale is nan"),
        (lambda p: {"q": p.q.to("meta"), "k": p.k, "v": p.v}, "q is on meta, the plan on cpu"),
        (lambda p: {"backend": "tritn"}, "no backend 'tritn'; allowed: auto, triton.*Did you mean 'triton'"),
        (
            lambda p: {"compensation": replace(p.compensation, keys=p.compensation.keys[:, :-1])},
            r"compensation.values is \[1, 6, 16\]; for this plan it has to be \[1, 5, 16\]",
        ),
        (
            lambda p: {"compensation": replace(p.compensation, approximate=p.compensation.approximate[1:])},
            r"compensation.approximate is \[7, 6\]; for this plan it has to be \[8, 6\]",
        ),
        (
            lambda p: {"compensation": replace(p.compensation, approximate=p.compensation.approximate.float())},
            "it has to be bool",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(change, message: str) -> None:
    problem = case(3, compensation=1)
    arguments = {"q": problem.q, "k": problem.k, "v": problem.v, **change(problem)}
    with pytest.raises(UsageError, match=message):
        sparse_attention(**arguments, plan=problem.plan)


def test_gradients_are_not_lost_silently() -> None:
    problem = case(4)
    q = problem.q.requires_grad_()
    with pytest.raises(RefusedError, match="computes no gradients.*planned_attention"):
        sparse_attention(q, problem.k, problem.v, problem.plan)
    with torch.no_grad():
        assert not sparse_attention(q, problem.k, problem.v, problem.plan).o.requires_grad


@pytest.mark.parametrize("shared", [False, True])
def test_cost_counts_tokens_and_tiles(shared: bool) -> None:
    problem = case(5, batch=2, heads=(4, 2), shared=shared)
    count = int(token_map(problem.blocks, problem.keep, 8, 2).sum())
    assert int(pairs(problem.plan)) == count
    assert float(density(problem.plan)) == pytest.approx(count / (8 * 70 * 90))
    assert float(flops(problem.plan, 16, 8)) == 2 * (16 + 8) * count
    found = cost(problem.plan, 16)
    assert found.density == float(density(problem.plan)) and found.flops == 2 * 32 * count
    assert found.tile_density == float(tile_density(problem.plan)) > found.density
    assert found.plan_bytes == problem.plan.num_bytes()


def test_whole_tiles_waste_nothing() -> None:
    blocks = Blocks(*(Order(None, uniform(64, 16), torch.zeros(4, dtype=torch.int8)) for _ in range(2)))
    plan = pack(blocks, torch.eye(4, dtype=torch.bool)[None], (1, 2, 2), block_m=16, block_n=16)
    assert float(density(plan)) == float(tile_density(plan)) == 0.25


@pytest.mark.parametrize("name", package.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(package, name) is not None and name in dir(package)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'sparse_atention'"):
        package.sparse_atention  # noqa: B018


def test_the_call_needs_neither_triton_nor_diffusers() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from hasten.sparse_attn.attention import sparse_attention
import hasten.sparse_attn.op
assert not {"diffusers", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
