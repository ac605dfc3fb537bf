"""The closed loop: it holds its target on heads of every kind, in a run, with and without compensation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hasten.sparse_attn.blocks import Blocks
from hasten.sparse_attn.layouts.tree import Tree
from hasten.sparse_attn.measure.synthetic import heads
from hasten.sparse_attn.pattern import Pattern
from hasten.sparse_attn.policy import SparseAttention
from hasten.sparse_attn.scorers.mass import block_mass
from hasten.sparse_attn.scorers.pooled import Centroid
from hasten.sparse_attn.scorers.scorer import View
from hasten.sparse_attn.segments import Tokens, plain, video
from hasten.sparse_attn.selectors.target import TargetRecall, TargetRecallState
from hasten.sparse_attn.stand_ins.compensate import Compensate
from hasten.step import Step
from tests.sparse_attn.random_blocks import generator
from tests.sparse_attn.test_selectors import long


def loop(part: TargetRecall, law: dict[int, float], steps: int) -> tuple[Tensor, Tensor]:
    """Share and rho after `steps` calls for heads whose mass left out is (1 - share)^law: float32 [P] each."""
    state = part.start()
    assert isinstance(state, TargetRecallState)
    powers = torch.tensor(list(law.values()))
    scores, blocks = torch.randn(len(law), 4, 400, generator=generator(1)), Blocks(long(4), long(400))
    rho = torch.zeros(len(law))
    for _ in range(steps):
        keep = state.keep(scores, blocks)
        read = keep.float().mean((1, 2))
        rho = 1 - (1 - read) ** powers
        state.observe(rho)
    return read, rho


def test_the_closed_loop_settles_at_the_target() -> None:
    read, rho = loop(TargetRecall(target=0.9, first=0.3), {0: 3.0, 1: 8.0, 2: 40.0}, 25)
    assert (rho - 0.9).abs().max() < 0.04
    assert read[0] > read[1] > read[2], "a head whose mass is concentrated reads less"


def test_a_head_below_the_floor_is_read_densely_for_a_while() -> None:
    state = TargetRecall(target=0.9, first=0.1, floor=0.5, rest=2).start()
    scores, blocks = torch.randn(2, 4, 20, generator=generator(2)), Blocks(long(4), long(20))
    state.keep(scores, blocks)
    state.observe(torch.tensor([0.2, 0.9]))
    for _ in range(2):
        keep = state.keep(scores, blocks)
        assert keep[0].all() and not keep[1].all()
        state.observe(torch.tensor([1.0, 0.9]))
    keep = state.keep(scores, blocks)
    assert keep[0].sum(-1).tolist() == [8] * 4, "then with 3.8 times the share: (0.66 / 0.1) ^ 0.7"


def test_what_is_not_a_number_changes_nothing() -> None:
    state = TargetRecall(first=0.3).start()
    assert isinstance(state, TargetRecallState)
    state.keep(torch.zeros(2, 4, 20), Blocks(long(4), long(20)))
    state.observe(torch.tensor([math.nan, 0.95]))
    assert torch.allclose(state.share, torch.tensor([0.3, 0.3]))


def test_static_scores_get_a_share_of_their_own_for_each_plane() -> None:
    state = TargetRecall(target=0.9, first=0.2).start()
    scores, blocks = torch.zeros(1, 4, 20), Blocks(long(4), long(20))
    assert state.keep(scores, blocks).shape[0] == 1
    state.observe(torch.tensor([0.6, 0.99]))
    keep = state.keep(scores, blocks)
    assert keep.shape[0] == 2
    assert keep[0].sum() > keep[1].sum()


def test_the_closed_loop_starts_anew_with_another_batch() -> None:
    state, blocks = TargetRecall(target=0.9, first=0.2).start(), Blocks(long(4), long(20))
    assert isinstance(state, TargetRecallState)
    state.keep(torch.zeros(2, 4, 20), blocks)
    state.observe(torch.tensor([0.6, 0.6]))
    state.keep(torch.zeros(4, 4, 20), blocks)
    state.observe(torch.full((4,), 0.9))
    assert torch.allclose(state.share, torch.full((4,), 0.2))


def test_a_choice_that_is_used_again_is_judged_once() -> None:
    state = TargetRecall(target=0.9, first=0.2).start()
    assert isinstance(state, TargetRecallState)
    state.keep(torch.zeros(2, 4, 20), Blocks(long(4), long(20)))
    state.observe(torch.tensor([0.8, 0.95]))
    once = state.share
    state.observe(torch.tensor([0.8, 0.95]))
    assert torch.equal(state.share, once) and not torch.allclose(once, torch.full((2,), 0.2))


@pytest.mark.parametrize("compensate", [None, Compensate(order=1), Compensate(order=2)])
def test_in_a_run_heads_settle_at_the_target(compensate: Compensate | None) -> None:
    """Three heads of unlike sharpness over clusters, through the policy: what it reads, and what that is worth."""
    n, make = 512, generator(0)
    centres = torch.randn(2, 1, 3, 16, 1, 16, generator=make)
    q, k = (centres + 0.3 * torch.randn(2, 1, 3, 16, 32, 16, generator=make)).flatten(3, 4)
    q = q * torch.tensor([1.5, 3.0, 6.0])[:, None, None]
    v = torch.randn(1, 3, n, 16, generator=make)
    pattern = Pattern(
        layout=Tree(block=16, q_block=32), score=Centroid(variance=True), select=TargetRecall(target=0.9, first=0.1)
    )
    policy = SparseAttention(
        patterns=(pattern,), compensate=compensate, warm=0.0, min_tokens=0, block_m=16, block_n=16
    )
    state, tokens = policy.start(), plain(n)
    for at in range(16):
        state.attend(q, k, v, Step(at, 16, 1 - at / 16, 0), tokens, tokens, 0.25, lambda: v)
    rho = [float(fact.rho) for fact in state.facts if fact.rho is not None]
    density = [float(fact.density) for fact in state.facts if fact.density is not None]
    assert rho[0] < 0.5, "a first share that was far too small"
    assert abs(sum(rho[-6:]) / 6 - 0.9) < 0.02
    assert max(density[-6:]) < 0.6
    share = state._patterns[0].select
    assert isinstance(share, TargetRecallState)
    assert share.share.max() > 1.2 * share.share.min(), "each head has a share of its own"


def test_the_closed_loop_settles_on_heads_of_every_kind() -> None:
    """By the true mass of blocks; a diffuse head, which has to read nearly everything, among them."""
    q, k, _ = heads((4, 10, 12), 48)
    tokens = Tokens((video(4, 10, 12),))
    blocks = Tree(block=16, q_block=32).start().blocks(q, k, tokens, tokens)
    view = View(blocks.q.arrange(q), blocks.k.arrange(k), blocks, tokens, tokens, 48**-0.5)
    mass, scores = block_mass(view), Centroid(variance=True).start().scores(view)
    weights = blocks.q.sizes / blocks.q.sizes.sum(-1, keepdim=True)
    state, far = TargetRecall(target=0.95).start(), []
    for _ in range(14):
        rho = ((mass * state.keep(scores, blocks)).sum(-1) * weights).sum(-1)
        state.observe(rho)
        far.append((rho - 0.95).abs())
    assert torch.stack(far[-4:]).max() < 0.03
    assert far[0].max() > 0.2


def test_an_account_moves_the_target_of_those_that_follow_one() -> None:
    fixed, following = TargetRecall(target=0.9).start(), TargetRecall(target=0.9, lowest=0.7).start()
    assert isinstance(fixed, TargetRecallState) and isinstance(following, TargetRecallState)
    for state in (fixed, following):
        state.aim(0.8)
    assert (fixed.target, following.target) == (0.9, 0.8)
    following.aim(0.1)
    assert following.target == 0.7
    following.aim(2.0)
    assert following.target == 0.999 and TargetRecall(lowest=0.7).follows and not TargetRecall().follows


def test_shares_follow_the_target_that_is_aimed_at() -> None:
    """Where a share x reads the mass 1 - (1 - x)^3, they settle where that is the new target."""
    state = TargetRecall(target=0.95, lowest=0.6).start()
    assert isinstance(state, TargetRecallState)
    scores, blocks = torch.randn(1, 4, 400, generator=generator(1)), Blocks(long(4), long(400))
    for target in (0.95, 0.7, 0.98):
        state.aim(target)
        for _ in range(30):
            read = state.keep(scores, blocks).float().mean((1, 2))
            state.observe(1 - (1 - read) ** 3)
        assert 1 - (1 - float(read)) ** 3 == pytest.approx(target, abs=0.015)


def test_the_lowest_target_lies_above_the_floor() -> None:
    with pytest.raises(ValueError, match=r"has to be below the target of 0\.4"):
        TargetRecall(lowest=0.4)
