"""From scores to outputs: plans of random layouts, maps and masks, against the float64 reference that knows no plan."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.sparse_attn.attention import sparse_attention
from hasten.sparse_attn.pack import pack
from hasten.sparse_attn.reference import reference
from hasten.sparse_attn.stand_ins.compensate import Compensate, approximate_map
from tests.sparse_attn.random_blocks import Case, cases, masks, normal


@given(cases(), st.data(), st.sampled_from([None, 1, 2]))
@settings(max_examples=80, deadline=None)
def test_outputs_are_those_of_the_map_of_blocks(case: Case, data: st.DataObject, order: Any) -> None:
    (b, hq, hk), (sq, sk) = case.heads, (case.blocks.q.length, case.blocks.k.length)
    mask = data.draw(st.one_of(st.none(), masks(sq, sk)))
    q, k, v = normal(case.seed, b, hq, sq, 8), normal(case.seed + 1, b, hk, sk, 8), normal(case.seed + 2, b, hk, sk, 8)
    keep = case.blocks.force(case.keep)
    plan = pack(case.blocks, keep, case.heads, block_m=7, block_n=5, mask=mask)
    arranged, tables = [case.blocks.k.arrange(x) for x in (k, v)], None
    if order is not None:
        stand_in = approximate_map(case.blocks, keep, groups=case.groups, mask=mask)
        tables = Compensate(order=order).tables(*arranged, case.blocks.k, stand_in)
    out = sparse_attention(q, *arranged, plan, scale=0.3, compensation=tables, arranged=True)
    truth = reference(q, k, v, case.blocks, keep, scale=0.3, mask=mask, compensation=tables)
    assert torch.allclose(out.o.double(), truth.o, atol=1e-5)
    assert torch.allclose(out.lse.double(), truth.lse, atol=1e-5)
    assert torch.allclose(out.rho.double(), truth.rho.double(), atol=1e-5)
