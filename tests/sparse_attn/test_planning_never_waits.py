"""Planning never reads the device: it runs on meta tensors, whose values nobody can ask for.

What asks for a value there raises (`.item()`, `bool(tensor)`, `nonzero`, shapes that depend on data). On a GPU each of
these would wait for all that is under way.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.part import Part
from hasten.sparse_attn.layouts.kmeans import KMeans
from hasten.sparse_attn.layouts.layout import Identity, Layout
from hasten.sparse_attn.layouts.tiles import Tiles
from hasten.sparse_attn.layouts.tree import Tree
from hasten.sparse_attn.mask import Mask, causal
from hasten.sparse_attn.pack import pack
from hasten.sparse_attn.scorers.pooled import Centroid
from hasten.sparse_attn.scorers.scorer import Scorer, View
from hasten.sparse_attn.segments import Tokens, plain, text, video
from hasten.sparse_attn.selectors.selector import Selector
from hasten.sparse_attn.selectors.top import TopP
from hasten.sparse_attn.stand_ins.compensate import Compensate, approximate_map
from tests.sparse_attn.test_scorers import NEEDED as SCORERS
from tests.sparse_attn.test_selectors import NEEDED as SELECTORS

LAYOUTS = [Identity(block=16), Tiles(block=16), Tree(block=16), KMeans(q_size=20, k_size=10)]
TOKENS = Tokens((video(3, 5, 7), text(9)))


def view_on_meta(layout: Layout, tokens: Tokens = TOKENS, mask: Mask | None = None) -> View:
    q, k = (torch.zeros(2, heads, tokens.length, 24, device="meta") for heads in (4, 2))
    blocks = layout.start().blocks(q, k, tokens, tokens)
    return View(blocks.q.arrange(q), blocks.k.arrange(k), blocks, tokens, tokens, 0.2, mask, k)


def everything(members: dict[str, type[Part]], needed: dict[str, dict[str, object]]) -> list[object]:
    return [pytest.param(member(**needed.get(kind, {})), id=kind) for kind, member in sorted(members.items())]


def test_values_on_meta_cannot_be_read() -> None:
    with pytest.raises(RuntimeError):
        bool(torch.zeros(1, device="meta") > 0)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(3, device="meta").nonzero()


@pytest.mark.parametrize("mask", [None, causal(114, 114)])
@pytest.mark.parametrize("part", everything(Scorer.members(), SCORERS))
def test_scorers_never_wait(part: Scorer, mask: Mask | None) -> None:
    view = view_on_meta(Identity(block=16), mask=mask)
    state = part.start()
    if state.needs_lse:
        state.observe(view, torch.zeros(2, 4, 114, device="meta"))
    assert state.scores(view).shape[1:] == (view.blocks.q.count, view.blocks.k.count)


@pytest.mark.parametrize("part", everything(Selector.members(), SELECTORS))
def test_selectors_never_wait(part: Selector) -> None:
    view = view_on_meta(Identity(block=16))
    state = part.start()
    scores = torch.zeros(8, view.blocks.q.count, view.blocks.k.count, device="meta")
    for _ in range(2):
        assert state.keep(scores, view.blocks).shape == scores.shape
        state.observe(torch.zeros(8, device="meta"))


@pytest.mark.parametrize("mask", [None, causal(114, 114)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kind)
def test_a_whole_plan_is_made_without_waiting(layout: Layout, mask: Mask | None) -> None:
    view = view_on_meta(layout, mask=mask)
    keep = view.blocks.force(TopP(p=0.5).start().keep(Centroid(variance=True).start().scores(view), view.blocks))
    plan = pack(view.blocks, keep, (2, 4, 2), block_m=16, block_n=16, mask=mask)
    stand_in = approximate_map(view.blocks, keep, groups=2, mask=mask)
    tables = Compensate().tables(view.k, view.k, view.blocks.k, stand_in)
    assert plan.row_start.shape == tables.approximate.shape[:1]
    assert (plan.queries, plan.keys) == (114, 114)


def test_draft_trees_are_planned_without_waiting() -> None:
    tree = torch.zeros(114, 8, dtype=torch.bool, device="meta")
    view = view_on_meta(Identity(block=16), plain(114))
    keep: Tensor = torch.ones(1, view.blocks.q.count, view.blocks.k.count, dtype=torch.bool, device="meta")
    pack(view.blocks, keep, (2, 4, 2), mask=Mask(tree=tree))
