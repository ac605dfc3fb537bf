"""Other tokens in other layers: the seam, and the two policies that work by it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.caching.depth import Depth
from hasten.caching.kv import Recompute, Rows, TokenKV
from hasten.caching.kv_attention import AttentionDrift, DriftState, attention
from hasten.caching.kv_values import ValueDrift
from hasten.caching.store import KVStore, Pass
from hasten.canvas import Canvas, TextFacts
from hasten.errors import RecipeError, RefusedError
from hasten.pipelines.text import calls
from hasten.pipelines.text_models.families import choose
from hasten.pipelines.text_models.host import TextHost
from hasten.pipelines.text_models.layers import TextLayers
from hasten.samplers.commit import Quota
from hasten.samplers.revise_erase import NarrowOut
from hasten.samplers.text_blocks import Whole
from tests.contract_kv import LAYERS, Restless, Trial, llama, same, trial
from tests.text_hosts import MASKED
from tests.text_models import prompts

TAPPED = [name for name in MASKED if name != "mdlm-flash"]
VALUELESS = [name for name in TAPPED if name.startswith(("mdlm", "bd3lm"))]
"""Families whose attention reads a modulated stream: their values cannot be had without the layer."""


def adapter(name: str) -> TextHost:
    model, facts = MASKED[name](1)
    return choose(model, **facts.told)


def one(host: TextHost, kv: TokenKV, **given: Any) -> Trial:
    return Trial(host, prompts([5, 3]), [6, 8], kv, **given)


class TestFamilies:
    @pytest.mark.parametrize("name", TAPPED)
    def test_attention_drift_with_all_computed_is_recomputation(self, name: str) -> None:
        host = adapter(name)
        assert host.caches
        same(one(host, AttentionDrift(every=2, below=2.0, wait=True)), one(host, AttentionDrift(every=2, below=2.0, wait=True)))
        same(one(host, AttentionDrift(every=1)), one(host, Recompute()))

    @pytest.mark.parametrize("name", TAPPED)
    def test_value_drift_with_all_computed_is_recomputation(self, name: str) -> None:
        host = adapter(name)
        assert host.caches
        kv = ValueDrift(prompt_every=1, every=9, share=1.0)
        if name in VALUELESS:
            with pytest.raises(RefusedError, match="values of layer 0"):
                one(host, kv)
        else:
            same(one(host, kv), one(host, Recompute()))


class Jumbled(nn.Module):
    """A layer that looks at where a token stands in the call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(hidden_states, *args, **kwargs) + torch.arange(hidden_states.shape[1])[:, None]


class TestRefusals:
    def test_layers_that_go_by_more_than_their_tokens(self) -> None:
        host = llama()
        held = host.model.model.layers
        host.model.model.layers = nn.ModuleList([Jumbled(held[0]), *held[1:]])
        try:
            with pytest.raises(RefusedError, match="another order"):
                one(host, AttentionDrift())
            assert "layers" not in vars(host.model.model), "what was attached is taken off again"
        finally:
            host.model.model.layers = held

    def test_layers_that_cannot_be_found(self) -> None:
        host = TextHost(nn.Linear(2, 2), TextFacts(LAYERS, 9, 1))
        with pytest.raises(RefusedError, match=f"no list of {LAYERS} layers"):
            TextLayers(host)

    def test_shadows_beside_layers(self) -> None:
        with pytest.raises(RecipeError, match="another reviser"):
            trial("full", AttentionDrift(), revise=NarrowOut())


class Some(Depth):
    """Every second token in every second layer; the others go on as they were."""

    def enter(self, layer: int, x: Tensor, now: Pass, values: Any) -> Tensor | None:
        if layer % 2 == 0:
            return None
        count = x.shape[1]
        index = torch.arange(0, count, 2).expand(x.shape[0], -1)
        return torch.nn.functional.pad(index, (0, 2), value=count)  # two numbers of none

    def leave(self, layer: int, x: Tensor, y: Tensor, index: Tensor | None, now: Pass) -> Tensor:
        if index is None:
            return y
        out = x.clone()
        out[:, index[0, :-2]] = y[:, :-2]
        return out


def test_a_layer_computes_what_it_is_asked_for() -> None:
    """Against the layers called by hand on half of the tokens, which read the keys that the others had before."""
    host = llama()
    canvas = Canvas.of(prompts([6, 6]), [3, 3], host.facts)
    store = KVStore(2, canvas.slots, torch.device("cpu"))
    wanted = calls.Wanted(canvas.used, canvas.slots)
    rows = Rows([0, 1], canvas.used, canvas.slots)
    with host.attached(), host.layers.attached():
        host.run(calls.plain(rows, canvas, wanted, host.facts, store), store)
        keys = {layer: store.keys[layer].clone() for layer in range(LAYERS)}
        rows.depth = Some()
        now = calls.plain(rows, canvas, wanted, host.facts, store)
        host.run(now, store)
    assert now.work is not None and now.work.tolist() == [2 * 9 + 2 * 5] * 2
    for layer in range(LAYERS):
        moved = (store.keys[layer] - keys[layer]).abs().amax((2, 3))[:, :9] > 1e-6
        if layer < 2:
            assert not bool(moved.any()), "nothing before them has changed"
        else:
            assert moved[:, 1::2].any() or layer % 2, "layers that compute all renew all"
        if layer % 2:
            assert not bool(moved[:, 1::2].any()), "the others' keys stay"


@pytest.mark.parametrize("kv", [AttentionDrift(every=1), ValueDrift(prompt_every=1, every=9, share=1.0)], ids=repr)
def test_half_precision(kv: TokenKV) -> None:
    """As near to recomputation in bfloat16 as that is to float32."""
    host = llama()
    half = TextHost(copy.deepcopy(host.model).bfloat16(), host.facts)
    exact, plain, ours = one(host, Recompute()), one(half, Recompute()), one(half, kv)
    noise, loss = (float((a.seen[0] - b.seen[0]).nan_to_num().abs().max()) for a, b in ((plain, exact), (ours, plain)))
    assert 0 < noise and loss <= 2 * noise


class TestValueDrift:
    def test_what_is_computed(self) -> None:
        """rho of the generated slots in every layer but the first, the prompt when it is due."""
        host = llama()
        done = Trial(host, prompts([5]), [8], ValueDrift(prompt_every=3, every=6, share=0.25), rule=Quota(), blocks=Whole())
        full, partial = LAYERS * 8, 8 + (LAYERS - 1) * 2
        steps = [LAYERS * 13, partial, partial, partial + LAYERS * 5, partial, partial, LAYERS * 13, partial]
        assert done.work.tolist() == [sum(steps)] and full  # at step 6 both are due

    def test_its_share_of_a_layer_is_counted(self) -> None:
        host = llama()
        done = Trial(host, prompts([5]), [8], ValueDrift(prompt_every=99, every=99), rule=Quota(), blocks=Whole())
        layer = host.model.model.layers[0]
        share = layer.self_attn.v_proj.weight.numel() / sum(p.numel() for p in layer.parameters())
        asked = 7 * (LAYERS - 1) * 8 * share
        assert float(done.loop.tally.layers[0]) == pytest.approx(float(done.work[0]) + asked)

    def test_more_changes_than_its_share_are_all_computed(self) -> None:
        kv = ValueDrift(prompt_every=99, every=99, share=0.1)
        done = Trial(llama(), prompts([5]), [9], kv, rule=Quota(steps=3), blocks=Whole())
        assert done.work.tolist() == [LAYERS * 14 + 2 * (9 + (LAYERS - 1) * 3)]

    def test_bytes_grow_with_the_layers(self) -> None:
        done = trial("full", ValueDrift())
        assert done.loop.kv.bytes == LAYERS * 3 * (16 + 1) * 32 * 4


class TestAttentionDrift:
    def test_rows_are_those_of_the_attention(self) -> None:
        """The product of a few queries with the keys, against all of it."""
        torch.manual_seed(0)
        q, k = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 7, 3)
        visible = torch.rand(2, 5, 7) < 0.7
        visible[:, :, 0] = True
        none = torch.zeros(2, 0, dtype=torch.int64)
        now = Pass(torch.arange(2), torch.zeros(2, 5, dtype=torch.int64), none, "store", visible, none, none)
        index = torch.tensor([[4, 0], [2, 2]])
        s = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) * 0.3
        whole = s.masked_fill(~visible[:, None], -float("inf")).softmax(-1)
        found = attention(q, k, index, now, 0.3)
        for text in range(2):
            torch.testing.assert_close(found[text], whole[text][:, index[text]])

    def test_it_tests_the_row_of_the_most_attended_token(self) -> None:
        """Two calls by hand, against a plain calculation of S, T and sigma."""
        torch.manual_seed(1)
        state, canvas = drift_state()
        q, k, now = attended(canvas, list(range(9)))
        depth = follow(state, canvas, now, boundary=-1)
        depth.watch(0, q, k, now, 0.5)
        s = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) * 0.5
        s = s.masked_fill(~now.visible[:, None], -float("inf")).softmax(-1)  # type: ignore[index]
        sums = s[0][:, 4:7].sum((0, 1))[:4]  # slots 4, 5, 6 are open, 0 to 3 are given
        t = int(sums.argmax())
        assert int(state.tracked[0, 0]) == t and float(state.near[0, 0]) > 1e9, "a layer that computes all is not tested"
        before = s[0][:, t]

        q2, k2, again = attended(canvas, [*sorted({t, 4, 5, 6})])
        follow(state, canvas, again, boundary=9).watch(0, q2, k2, again, 0.5)
        s2 = torch.einsum("bhqd,bhkd->bhqk", q2, k2.repeat_interleave(2, 1)) * 0.5
        s2 = s2.masked_fill(~again.visible[:, None], -float("inf")).softmax(-1)  # type: ignore[index]
        now_row = s2[0][:, again.slots[0].tolist().index(t)]
        sigma = torch.nn.functional.cosine_similarity(before, now_row, dim=-1).mean()
        torch.testing.assert_close(state.near[0, 0], sigma)

    @pytest.mark.parametrize("wait", [False, True])
    def test_never_and_always(self, wait: bool) -> None:
        """gamma 0: few tokens in all layers; gamma 2: layers behind the first compute all, once there is something known."""
        never = Trial(llama(), prompts([5]), [8], AttentionDrift(below=0.0, wait=wait), rule=Quota(), blocks=Whole())
        always = Trial(llama(), prompts([5]), [8], AttentionDrift(below=2.0, wait=wait), rule=Quota(), blocks=Whole())
        first = LAYERS * 13
        few = [min(13, 8 - step + 1 + LAYERS) for step in range(1, 8)]
        assert first + LAYERS * sum(8 - step + 1 for step in range(1, 8)) <= float(never.work[0]) <= first + LAYERS * sum(few)
        assert float(always.work[0]) >= float(never.work[0]) + (6 if wait else 5) * 13
        assert float(always.work[0]) < 8 * LAYERS * 13

    def test_waiting_decides_a_step_earlier(self) -> None:
        sooner, later = (
            Trial(llama(), prompts([5]), [8], AttentionDrift(below=2.0, wait=wait), rule=Quota(), blocks=Whole())
            for wait in (True, False)
        )
        assert float(sooner.work[0]) > float(later.work[0])

    def test_texts_with_boundaries_of_their_own(self) -> None:
        done = trial("full", AttentionDrift(below=0.995), revise=Restless(budget=1))
        shares = done.work / (done.loop.tally.evaluations * LAYERS * done.loop.canvas.end)
        assert bool((shares < 1).all()) and bool((shares > 0.1).all())

    def test_bytes_are_told(self) -> None:
        done = trial("full", AttentionDrift())
        assert done.loop.kv.bytes == LAYERS * 3 * (16 + 1) * (32 + 4) * 4


def drift_state() -> tuple[DriftState, Canvas]:
    facts = TextFacts(2, 9, 1)
    canvas = Canvas.of([torch.full((4,), 5)], [5], facts)
    canvas.enter(canvas.open, torch.tensor([[4, 7]]))
    state = AttentionDrift().start(facts, KVStore(1, canvas.slots, torch.device("cpu")))
    assert isinstance(state, DriftState)
    return state, canvas


def attended(canvas: Canvas, slots: list[int]) -> tuple[Tensor, Tensor, Pass]:
    """Random queries of these slots and keys of all, as a call's attention has them."""
    place, none = torch.tensor([slots]), torch.zeros(1, 0, dtype=torch.int64)
    visible = (torch.arange(canvas.slots + 1) < canvas.slots).expand(1, len(slots), -1)
    now = Pass(torch.zeros(1, dtype=torch.int64), place, none, "store", visible, none, none)
    return torch.randn(1, 4, len(slots), 3), torch.randn(1, 2, canvas.slots + 1, 3), now


def follow(state: DriftState, canvas: Canvas, now: Pass, boundary: int) -> Any:
    from hasten.caching.kv_attention import _Drift

    rows = canvas.look(state.tell(canvas))
    return _Drift(state, Rows([0], state.tokens, 9, runs=0), boundary, canvas, rows)
