"""Look-up of clusters (Squeezed Attention) and votes for tokens (TokenSelect)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.sparse_attn.blocks import Blocks, Order
from hasten.sparse_attn.text.lookup import Lookup, ShareAbove, cluster, key_shares, threshold
from hasten.sparse_attn.text.reader import Everything, Reader
from hasten.sparse_attn.text.votes import Votes, ballot

SCALE = 8**-0.5


def draw(b: int, hq: int, hk: int, n: int, s: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = (b, hq, n, 8), (b, hk, s, 8), (b, hk, s, 6)
    q, k, v = (torch.randn(*shape, generator=g) for shape in shapes)
    return q, k, v


def topics(hk: int, groups: int, s: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys about one of 8 topics in random order; each query head asks for one topic. Returns q, k, v and topic [Hk,
    S]."""
    g = torch.Generator().manual_seed(seed)
    centres = 4 * torch.nn.functional.normalize(torch.randn(hk, 8, 16, generator=g), dim=-1)
    topic = torch.randint(0, 8, (hk, s), generator=g)
    k = centres.gather(1, topic[..., None].expand(-1, -1, 16)) + 0.2 * torch.randn(hk, s, 16, generator=g)
    q = 3 * centres[:, :1].expand(hk, groups, 16).reshape(1, hk * groups, 1, 16)
    return q, k[None], torch.randn(1, hk, s, 16, generator=g), topic


def truth(q: Tensor, k: Tensor, v: Tensor, reads: Tensor, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    logits = (q.double() @ k.mT * scale).masked_fill(~reads, -math.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ v


@settings(max_examples=30, deadline=None)
@given(p=st.integers(1, 40), count=st.integers(1, 9), pad=st.integers(0, 12), seed=st.integers(0, 99))
def test_clusters_hold_each_real_key_once(p: int, count: int, pad: int, seed: int) -> None:
    _, k, _ = draw(2, 2, 2, 1, p, seed)
    first = torch.tensor([0, min(pad, p)])
    order = cluster(k, count, rounds=3, first=first).order
    assert order.perm is not None and torch.equal(order.perm.sort(1).values, torch.arange(p).expand(4, p))
    assert torch.equal(order.bounds[:, 0], first.repeat_interleave(2).int()) and (order.bounds[:, -1] == p).all()
    assert (order.sizes >= 0).all()
    for plane in range(4):
        start = int(order.bounds[plane, 0])
        assert (order.perm[plane, :start] < start).all(), "padding stands in front"


def test_centroids_are_the_means_of_their_keys() -> None:
    _, k, _ = draw(1, 1, 1, 1, 23)
    found = cluster(k, 4)
    assert found.order.perm is not None
    for number in range(4):
        own = found.order.perm[0, int(found.order.bounds[0, number]) : int(found.order.bounds[0, number + 1])]
        if len(own):
            torch.testing.assert_close(found.means[0, number], k[0, 0, own].mean(0), rtol=1e-5, atol=1e-5)


def test_shares_add_up_to_one_over_the_keys() -> None:
    q, k, _ = draw(2, 4, 2, 3, 30)
    found = cluster(k, 5)
    share = key_shares(q, found, SCALE)
    assert share.shape == (4, 6, 5)
    torch.testing.assert_close((share * found.order.sizes[:, None]).sum(-1), torch.ones(4, 6))


@pytest.mark.parametrize("budget", [0.05, 0.3, 1.0])
def test_the_threshold_holds_the_budget_over_all_heads(budget: float) -> None:
    q, k, _ = draw(2, 4, 2, 16, 200)
    found = cluster(k, 25)
    share, sizes = key_shares(q, found, SCALE), found.order.sizes
    read = ((share >= threshold(share, sizes, budget)) * sizes[:, None]).sum() / (200 * share.shape[0] * share.shape[1])
    assert budget <= read <= budget + 25 / 200  # the last cluster is read whole


@pytest.mark.parametrize("n", [1, 3])
def test_a_share_of_one_is_everything(n: int) -> None:
    q, k, v = draw(2, 4, 2, 40, 40)
    first = torch.tensor([0, 11])
    state = Lookup(share=1.0, cluster=4).start()
    state.prepare(q, k[:, :, :36], v[:, :, :36], first, SCALE)
    out = state.attend(q[:, :, :n], k, v, first, SCALE)
    expected = Everything().start().attend(q[:, :, :n], k, v, first, SCALE)
    torch.testing.assert_close(out.o, expected.o, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(out.lse, expected.lse, rtol=2e-5, atol=2e-5)


def test_lookup_finds_the_topic_that_is_asked_for() -> None:
    q, k, v, topic = topics(hk=2, groups=2, s=256)
    state = Lookup(share=0.2, cluster=16).start()
    state.prepare(q.expand(-1, -1, 8, -1), k, v, None, 0.25)
    more = torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2)
    out = state.attend(q, *more, None, 0.25)
    full = Everything().start().attend(q, *more, None, 0.25)
    assert state.read is not None and int(state.read) < 0.3 * 2 * 257
    assert (out.o - full.o).norm() < 0.02 * full.o.norm(), "the topic holds nearly all of the mass"
    assert (topic == 0).any(1).all()


def test_a_cache_cut_into_the_prompt_forgets_the_prompt() -> None:
    q, k, v = draw(1, 2, 1, 32, 32)
    state = Lookup(share=0.1, cluster=4).start()
    state.prepare(q, k, v, None, SCALE)
    state.attend(q[:, :, :1], k[:, :, :20], v[:, :, :20], None, SCALE)
    other_k, other_v = -torch.cat([k, k], 2), torch.cat([v, -v], 2)  # grown again, with other tokens
    out = state.attend(q[:, :, :1], other_k, other_v, None, SCALE)
    torch.testing.assert_close(out.o, Everything().start().attend(q[:, :, :1], other_k, other_v, None, SCALE).o)
    assert state.num_bytes() == 0


def test_a_cache_that_grew_anew_is_read_whole() -> None:
    q, k, v = draw(1, 2, 1, 32, 40)
    state = Lookup(share=0.1, cluster=4).start()
    state.prepare(q, -k[:, :, :32], v[:, :, :32], None, SCALE)
    out = state.attend(q[:, :, :1], k, v, None, SCALE)
    assert torch.equal(out.o, Everything().start().attend(q[:, :, :1], k, v, None, SCALE).o)


def test_share_above_is_the_rule_per_key() -> None:
    bounds = torch.tensor([[0, 2, 10, 10, 12]]).int()
    blocks = Blocks(Order(None, torch.tensor([[0, 4]]).int(), torch.zeros(1)), Order(None, bounds, torch.zeros(4)))
    mass = torch.tensor([0.2, 0.4, 0.0, 0.4])
    keep = ShareAbove(limit=0.09).start().keep(mass.log()[None, None], blocks)
    assert keep.tolist() == [[[True, False, False, True]]]


# --- votes --------------------------------------------------------------------------------------------


def naive_choice(q: Tensor, k: Tensor, low: int, high: int, top: int) -> set[int]:
    """Places that the heads of one sample choose among low to high: [Hq, n, D], [Hk, S, D]."""
    groups = q.shape[0] // k.shape[0]
    votes = torch.zeros(high - low, dtype=torch.float64)
    for head in range(q.shape[0]):
        logits = q[head].double() @ k[head // groups, low:high].double().mT * SCALE
        votes += logits.softmax(-1).sum(0)
    return {low + int(place) for place in votes.topk(min(top, high - low)).indices}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("first", [None, (0, 9), (50, 20), (58, 0)])
def test_votes_read_sinks_the_chosen_and_the_window(n: int, first: tuple[int, int] | None) -> None:
    q, k, v = draw(2, 4, 2, n, 60)
    state = Votes(top=7, sinks=4, window=10).start()
    begin = first or (0, 0)
    reads = torch.zeros(2, 1, n, 60, dtype=torch.bool)
    for sample, start in enumerate(begin):
        edge = 60 - 10 - n + 1
        low = min(start + 4, edge)
        chosen = naive_choice(q[sample], k[sample], low, edge, 7)
        reads[sample, :, :, sorted({*range(start, min(start + 4, 60)), *chosen, *range(max(edge, start), 60)})] = True
    reads &= torch.ones(n, 60, dtype=torch.bool).tril(60 - n)
    reads &= (torch.arange(60) >= torch.tensor(begin)[:, None])[:, None, None]
    out = state.attend(q, k, v, None if first is None else torch.tensor(first), SCALE)
    torch.testing.assert_close(out.o.double(), truth(q, k, v, reads, SCALE), rtol=2e-5, atol=2e-5)


def test_the_choice_serves_until_the_query_has_turned() -> None:
    q, k, v = draw(1, 4, 2, 1, 80)
    state = Votes(top=5, sinks=2, window=8, similarity=0.9).start()
    state.attend(q, k[:, :, :60], v[:, :, :60], None, SCALE)
    near = q + 0.1 * torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    state.attend(near, k[:, :, :61], v[:, :, :61], None, SCALE)
    assert (state.made, state.edge) == (1, 52), "what left the window since is read"  # type: ignore[attr-defined]
    state.attend(-q, k[:, :, :62], v[:, :, :62], None, SCALE)
    assert state.made == 2 and state.edge == 54  # type: ignore[attr-defined]
    state.attend(-q, k[:, :, :30], v[:, :, :30], None, SCALE)
    assert state.made == 3, "a shorter cache is another one"  # type: ignore[attr-defined]


def test_each_head_has_one_vote() -> None:
    """A head with huge logits does not outvote two that agree."""
    k = torch.eye(8)[None, None, :3]
    q = torch.stack([100 * torch.eye(8)[0], 9 * torch.eye(8)[1], 9 * torch.eye(8)[1]])[None, :, None]
    votes = ballot(q, k, torch.ones(1, 3, dtype=torch.bool), 1.0)
    assert votes.argmax() == 1
    torch.testing.assert_close(votes.sum(), torch.tensor(3.0))


@pytest.mark.parametrize("reader", [Votes(top=64, sinks=4, window=8), Lookup()])
def test_short_caches_are_read_whole(reader: Reader) -> None:
    q, k, v = draw(1, 4, 2, 1, 40)
    state = reader.start()
    out = state.attend(q, k, v, None, SCALE)
    torch.testing.assert_close(out.o, Everything().start().attend(q, k, v, None, SCALE).o)
    assert state.read is None
