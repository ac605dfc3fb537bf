"""The policy of the attention axis: when it is dense, what it keeps between steps, and what it says it did."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hasten.errors import RecipeError
from hasten.recipe import Recipe, from_yaml
from hasten.sparse_attn.chooser import Fixed, Sampled
from hasten.sparse_attn.layouts.kmeans import KMeans
from hasten.sparse_attn.layouts.layout import Identity
from hasten.sparse_attn.layouts.swap import Swap
from hasten.sparse_attn.pattern import Pattern
from hasten.sparse_attn.policy import SparseAttention, SparseState
from hasten.sparse_attn.scorers.mass import CachedMass
from hasten.sparse_attn.scorers.pooled import Centroid, Pooled
from hasten.sparse_attn.segments import Tokens, plain, text, video
from hasten.sparse_attn.selectors.top import TopK, TopP
from hasten.sparse_attn.stand_ins.compensate import Compensate
from hasten.sparse_attn.stand_ins.linear_rest import LinearRest
from hasten.sparse_attn.stand_ins.recover import Residual
from hasten.sparse_attn.stand_ins.samples import Samples
from hasten.step import Step

GRID = (3, 5, 7)
N = 105


def qkv(seed: int, *, heads: int = 4, keys: int = 4, n: int = N, d: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, h, n, d, generator=generator) for h in (heads, keys, keys))  # type: ignore[return-value]


def policy(**changes: object) -> SparseAttention:
    pattern = Pattern(layout=Identity(block=16), score=Pooled(), select=TopK(share=0.3))
    return SparseAttention(**{"patterns": (pattern,), "warm": 0.0, "block_m": 16, "block_n": 16} | changes)  # type: ignore[arg-type]


def attend(state: SparseState, at: int, tensors: tuple[Tensor, Tensor, Tensor], tokens: Tokens, branch: int = 0) -> Tensor:
    q, k, v = tensors
    step = Step(at, 10, 1 - at / 10, branch)
    scale = q.shape[-1] ** -0.5
    return state.attend(q, k, v, step, tokens, tokens, scale, lambda: exact(q, k, v))


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def error(o: Tensor, truth: Tensor) -> float:
    return float((o - truth).norm() / truth.norm())


def test_first_and_last_steps_and_layers_are_dense() -> None:
    sparse = policy(warm=0.2, tail=0.1, dense_layers=1)
    dense = [[sparse.is_dense(Step(at, 10, 0.5), layer) for at in range(10)] for layer in (0, 1)]
    assert dense[0] == [True] * 10
    assert dense[1] == [True, True] + [False] * 7 + [True]
    state, tensors = sparse.start(layer=1), qkv(0)
    assert torch.equal(attend(state, 0, tensors, plain(N)), exact(*tensors))
    assert not torch.equal(attend(state, 4, tensors, plain(N)), exact(*tensors))
    assert [fact.action for fact in state.facts] == ["dense", "sparse"]


@pytest.mark.parametrize("layout", [Identity(block=16), KMeans(q_size=20, k_size=9), Swap(axes=(1, 2, 0), block=16)])
@pytest.mark.parametrize("keys", [4, 2])
def test_all_blocks_are_dense_attention(layout: object, keys: int) -> None:
    pattern = Pattern(layout=layout, score=Centroid(), select=TopP(p=1.0))  # type: ignore[arg-type]
    state = policy(patterns=(pattern,), compensate=Compensate()).start()
    tensors = qkv(1, keys=keys, n=N + 9)
    o = attend(state, 3, tensors, Tokens((video(*GRID), text(9))))
    assert torch.allclose(o, exact(*tensors), atol=1e-5)
    assert float(state.facts[0].density) == pytest.approx(1.0)  # type: ignore[arg-type]
    assert float(state.facts[0].rho) == pytest.approx(1.0)  # type: ignore[arg-type]


def test_what_stands_in_brings_the_output_nearer() -> None:
    q, k, v = qkv(2)
    centres = torch.randn(2, 4, 8, 24, generator=torch.Generator().manual_seed(3))
    member = torch.arange(N) % 8
    k, v = centres[:, :, member] * 2 + 0.2 * k, centres[:, :, member].flip(-1) + 0.2 * v
    pattern = Pattern(layout=KMeans(q_size=30, k_size=13, first=20), score=Centroid(), select=TopK(share=0.25))
    found = {
        order: error(attend(policy(patterns=(pattern,), compensate=how).start(), 3, (q, k, v), plain(N)), exact(q, k, v))
        for order, how in {0: None, 1: Compensate(order=1), 2: Compensate(order=2)}.items()
    }
    assert found[2] <= found[1] < 0.25 * found[0]


def test_linear_attention_and_samples_stand_in_on_average() -> None:
    q, k, v = (0.5 * x for x in qkv(10, keys=2))
    v = v + 1  # what is left out does not cancel
    truth = exact(q, k, v)
    pattern = Pattern(layout=KMeans(q_size=30, k_size=13), score=Centroid(), select=TopK(share=0.2))
    dropped = error(attend(policy(patterns=(pattern,)).start(), 3, (q, k, v), plain(N)), truth)
    for how in (LinearRest(features=512), Samples(count=60)):
        state = policy(patterns=(pattern,), compensate=how).start()
        assert error(attend(state, 3, (q, k, v), plain(N)), truth) < 0.75 * dropped
        assert 0 < float(state.facts[0].rho) < 1  # type: ignore[arg-type]


def test_a_selection_is_used_for_as_many_steps_as_asked() -> None:
    state, tensors = policy(refresh=3).start(), qkv(4)
    for at in range(7):
        attend(state, at, tensors, plain(N))
    assert [fact.reused for fact in state.facts] == [False, True, True, False, True, True, False]
    attend(state, 8, qkv(4, n=90), plain(90))
    assert not state.facts[-1].reused  # another shape


def test_states_share_nothing() -> None:
    sparse, first, second = policy(refresh=9), qkv(5), qkv(6)
    alone = attend(sparse.start(), 0, second, plain(N))
    state, other = sparse.start(), sparse.start()
    attend(state, 0, first, plain(N))
    assert torch.equal(attend(other, 0, second, plain(N)), alone)
    state.forget()
    assert torch.equal(attend(state, 1, second, plain(N)), alone)


def test_heads_choose_the_pattern_that_is_nearer() -> None:
    frames, tokens = 6, 20
    n = frames * tokens
    frame, place = torch.arange(n) // tokens, torch.arange(n) % tokens
    code = torch.nn.functional.one_hot
    same_frame, same_place = code(frame, 24).float() * 30, code(place, 24).float() * 30
    generator = torch.Generator().manual_seed(7)
    v = torch.randn(1, 2, n, 24, generator=generator)
    q = torch.stack([same_frame, same_place])[None]
    near = Pattern(layout=Identity(block=20), score=Pooled(), select=TopK(share=1 / 6))
    far = Pattern(layout=Swap(axes=(1, 2, 0), block=6), score=Pooled(), select=TopK(share=1 / 20))
    grid = Tokens((video(frames, 4, 5),))
    state = policy(patterns=(near, far), chooser=Sampled(samples=32)).start()
    assert error(attend(state, 3, (q, q, v), grid), exact(q, q, v)) < 1e-3
    for heads in ((0,), (1,)):
        state = policy(patterns=(near, far), chooser=Fixed(heads=heads)).start()
        assert error(attend(state, 3, (q, q, v), grid), exact(q, q, v)) > 0.1
    with pytest.raises(RecipeError, match="patterns 0 to 1"):
        attend(policy(patterns=(near, far), chooser=Fixed(heads=(0, 2))).start(), 3, (q, q, v), grid)


def test_mass_of_a_dense_step_picks_the_blocks() -> None:
    pattern = Pattern(layout=Identity(block=15), score=CachedMass(), select=TopK(share=0.4))
    state, tensors = policy(patterns=(pattern,), warm=0.1).start(), qkv(8)
    assert error(attend(state, 0, tensors, plain(N)), exact(*tensors)) < 1e-5
    blind = policy(patterns=(Pattern(layout=Identity(block=15), score=Pooled(), select=TopK(share=0.4)),)).start()
    seen = error(attend(state, 1, tensors, plain(N)), exact(*tensors))
    assert seen < error(attend(blind, 1, tensors, plain(N)), exact(*tensors))


def test_recovery_is_exact_where_nothing_has_changed() -> None:
    state, tensors = policy(recover=Residual(growth=0.0), warm=0.1, refresh=10).start(), qkv(9)
    attend(state, 0, tensors, plain(N))
    assert error(attend(state, 1, tensors, plain(N)), exact(*tensors)) < 1e-5
    assert error(attend(policy().start(), 1, tensors, plain(N)), exact(*tensors)) > 0.1
    assert state.num_bytes() > 0
    state.forget()
    assert error(attend(state, 2, tensors, plain(N)), exact(*tensors)) > 0.1


def test_recipe_survives_yaml() -> None:
    original = Recipe(name="mine", attention=policy(compensate=Compensate(), recover=Residual()))
    assert from_yaml(original.to_yaml()) == original
    with pytest.raises(RecipeError, match=r"attention.patterns.0.select"):
        from_yaml(original.to_yaml().replace("share: 0.3", "shere: 0.3"))


def test_a_policy_needs_a_pattern() -> None:
    with pytest.raises(ValidationError, match="at least one pattern"):
        SparseAttention(patterns=())
