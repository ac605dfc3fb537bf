"""Runs of nearly equal keys (DeltaLLM) and search by halving (HiP)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.sparse_attn.blocks import Blocks, Order, uniform
from hasten.sparse_attn.mask import causal
from hasten.sparse_attn.scorers.scorer import View
from hasten.sparse_attn.segments import plain
from hasten.sparse_attn.text.delta import Delta, Runs, runs
from hasten.sparse_attn.text.hierarchical import Hierarchical, Tree, halve, middles, samples
from hasten.sparse_attn.text.reader import Everything

SCALE = 8**-0.5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(s=st.integers(1, 60), count=st.integers(1, 20), limit=st.floats(0, 3), seed=st.integers(0, 99))
def test_keys_of_a_run_are_within_theta(s: int, count: int, limit: float, seed: int) -> None:
    k = draw(2, 1, s, 4, seed=seed)
    bounds = runs(k, count, limit)
    assert bounds.shape == (2, count + 1) and (bounds.diff(dim=1) >= 0).all()
    assert (bounds[:, 0] == 0).all() and (bounds[:, -1] == s).all()
    for plane in range(2):
        keys = k[plane, 0]
        change = float((keys[1:] - keys[:-1]).norm(dim=-1).double().sum())
        theta = max(limit * float(keys.square().sum(-1).mean().sqrt()), change / count)
        for low, high in zip(bounds[plane, :-1].tolist(), bounds[plane, 1:].tolist(), strict=True):
            if high > low:
                assert torch.cdist(keys[low:high], keys[low:high]).max() <= theta * (1 + 1e-4) + 1e-4


def test_padding_belongs_to_no_run() -> None:
    bounds = runs(draw(2, 2, 30, 4), 6, first=torch.tensor([0, 13]))
    assert bounds[:, 0].tolist() == [0, 0, 13, 13] and (bounds[:, -1] == 30).all()


def repeated(s: int, each: int) -> tuple[Tensor, Tensor]:
    """Keys and values [1, 2, s, 8] that change every `each` tokens."""
    k, v = (draw(1, 2, -(-s // each), 8, seed=seed).repeat_interleave(each, 2)[:, :, :s] for seed in (1, 2))
    return k, v


def test_equal_keys_are_read_once_and_exactly() -> None:
    k, v = repeated(200, 10)
    q = draw(1, 4, 1, 8)
    state = Delta(share=0.5, limit=1e-3, window=16, sinks=3).start()
    out, full = state.attend(q, k, v, None, SCALE), Everything().start().attend(q, k, v, None, SCALE)
    torch.testing.assert_close(out.o, full.o, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(out.lse, full.lse, rtol=2e-5, atol=2e-5)
    assert state.read is not None and int(state.read) < 2 * 200


def test_values_of_a_run_are_averaged() -> None:
    k, _ = repeated(200, 10)
    v, q = draw(1, 2, 200, 5, seed=3), draw(1, 4, 1, 8)
    out = Delta(share=0.5, limit=1e-3, window=16, sinks=3).start().attend(q, k, v, None, SCALE)
    torch.testing.assert_close(out.o, Everything().start().attend(q, k, v, None, SCALE).o, rtol=2e-5, atol=2e-5)


def test_the_error_falls_as_runs_get_shorter() -> None:
    k = draw(1, 2, 400, 8).cumsum(2) / 10
    v, q = draw(1, 2, 400, 8, seed=1), draw(1, 4, 1, 8, seed=2)
    full = Everything().start().attend(q, k, v, None, SCALE).o
    errors = [
        float((Delta(share=share, window=32).start().attend(q, k, v, None, SCALE).o - full).norm())
        for share in (0.05, 0.25, 1.0)
    ]
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.5 * errors[0]


def test_runs_are_made_anew_and_a_crop_is_noticed() -> None:
    k, v, q = draw(1, 2, 300, 8), draw(1, 2, 300, 8, seed=1), draw(1, 2, 1, 8, seed=2)
    state = Delta(window=16, refresh=8).start()
    for s in (200, 201, 207):
        state.attend(q, k[:, :, :s], v[:, :, :s], None, SCALE)
        assert state.made == 200  # type: ignore[attr-defined]
    for s in (208, 150):
        state.attend(q, k[:, :, :s], v[:, :, :s], None, SCALE)
        assert state.made == s  # type: ignore[attr-defined]


def test_a_cache_that_grew_anew_is_another_one() -> None:
    k, v, q = draw(1, 2, 300, 8), draw(1, 2, 300, 8, seed=1), draw(1, 2, 1, 8, seed=2)
    state, fresh = Delta(window=16).start(), Delta(window=16).start()
    state.attend(q, -k[:, :, :200], v[:, :, :200], None, SCALE)
    after = state.attend(q, k[:, :, :201], v[:, :, :201], None, SCALE)
    assert torch.equal(after.o, fresh.attend(q, k[:, :, :201], v[:, :, :201], None, SCALE).o)


def test_runs_as_a_layout() -> None:
    k = draw(2, 3, 50, 8)
    blocks = Runs(share=0.2, block=16).start().blocks(k, k, plain(50), plain(50))
    assert blocks.q.count == 4 and blocks.k.count == 10 and blocks.k.bounds.shape == (6, 11)
    torch.testing.assert_close(blocks.k.bounds, runs(k, 10))


# --- halving ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40), top=st.integers(1, 12), cut=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_halving_finds_blocks_of_the_range_once(count: int, top: int, cut: tuple[int, int], seed: int) -> None:
    low, high = sorted(min(end, count) for end in cut)
    top = min(top, count)
    q, keys = draw(2, 3, 2, 4, seed=seed), draw(2, count, 4, seed=seed + 1)
    ends = (torch.full((1, 3), end) for end in (low, high))
    block, score = halve(q, keys, *ends, top, count)
    real = score > -math.inf
    assert (real.sum(-1) == min(top, high - low)).all() or (high - low > top and (real.sum(-1) >= 1).all())
    for plane in range(2):
        for row in range(3):
            found = block[plane, row][real[plane, row]].tolist()
            assert len(set(found)) == len(found) and all(low <= one < high for one in found)
            for one, value in zip(found, score[plane, row][real[plane, row]], strict=True):
                torch.testing.assert_close(value, (q[plane, row] @ keys[plane, one]).logsumexp(0))


def test_halving_finds_the_best_block_of_a_smooth_landscape() -> None:
    """Where neighbours score alike, as attention does, the tree leads to the peak."""
    angle = torch.linspace(0, 3, 256)
    keys = torch.stack([angle.cos(), angle.sin()], -1)[None]
    for peak in (0.4, 1.7, 2.9):
        q = 30 * torch.tensor([[[[math.cos(peak), math.sin(peak)]]]])
        block, score = halve(q, keys, torch.zeros(1, 1).long(), torch.full((1, 1), 256), 4, 256)
        best, found = int((q[0, 0] @ keys[0].T)[0].argmax()), block[0, 0].tolist()
        assert best in found and max(abs(one - best) for one in found) <= 4 and (score > -math.inf).all()


def view(b: int, hq: int, hk: int, s: int, block: int, masked: bool = True) -> View:
    q, k = draw(b, hq, s, 8), draw(b, hk, s, 8, seed=1)
    order = Order(None, uniform(s, block), torch.zeros(-(-s // block), dtype=torch.int8), tokens=s)
    return View(q, k, Blocks(order, order), plain(s), plain(s), SCALE, causal(s, s) if masked else None)


@pytest.mark.parametrize("top", [2, 50])
def test_the_scorer_keeps_to_the_past(top: int) -> None:
    seen = view(2, 4, 2, 71, 8)
    found = Hierarchical(top=top, queries=3).start().scores(seen)
    assert found.shape == (8, 9, 9)
    finite = found > -math.inf
    past = torch.ones(9, 9, dtype=torch.bool).tril()
    assert not (finite & ~past).any() and finite.any(-1).all() and int(finite.sum(-1).max()) <= top
    if top >= 9:
        assert (finite == past).all(), "with room for all, all of the past is found"


def test_representatives_are_tokens_of_their_block() -> None:
    seen = view(1, 2, 1, 21, 8)
    keys, queries = middles(seen.k, seen.blocks.k), samples(seen.q, seen.blocks.q, 2)
    assert torch.equal(keys[0], seen.k[0, 0, [3, 11, 18]])
    assert torch.equal(queries[0], seen.q[0, 0, [2, 6, 10, 14, 17, 19]].view(3, 2, 8))


@pytest.mark.parametrize("first", [None, (0, 17)])
def test_tree_reads_what_it_found(first: tuple[int, int] | None) -> None:
    q, k, v = draw(2, 4, 1, 8), draw(2, 2, 120, 8, seed=1), draw(2, 2, 120, 8, seed=2)
    state = Tree(top=3, block=8, sinks=5, window=20).start()
    out = state.attend(q, k, v, None if first is None else torch.tensor(first), SCALE)
    keep, edge = state.keep, state.edge  # type: ignore[attr-defined]
    assert edge == 96 and (keep.sum(1) == 3).all()
    begin = torch.tensor(first or (0, 0)).repeat_interleave(2)[:, None]
    place = torch.arange(120)
    found = torch.cat([keep.repeat_interleave(8, 1), torch.ones(4, 24, dtype=torch.bool)], 1)
    reads = (found | (place < begin + 5)) & (place >= begin)
    assert state.read is not None and int(state.read) == int(reads.sum())
    logits = q.view(4, 2, 8) @ k.view(4, 120, 8).mT * SCALE
    expected = logits.masked_fill(~reads[:, None], -math.inf).softmax(-1) @ v.view(4, 120, 8)
    torch.testing.assert_close(out.o.view(4, 2, 8), expected, rtol=2e-5, atol=2e-5)
    before = keep
    grown = (torch.cat([x, x[:, :, :1]], 2) for x in (k, v))
    state.attend(-q, *grown, None if first is None else torch.tensor(first), SCALE)
    assert state.keep is before, "found again every `refresh` tokens only"  # type: ignore[attr-defined]
