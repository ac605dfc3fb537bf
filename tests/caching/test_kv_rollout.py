"""Rollout: what each stage chooses, by hand; and that a vector from the last layer gives the rollout's column sums.

Shapes: B texts, L slots; m texts with n computed tokens, K keys.
"""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.caching.kv import Recompute
from hasten.caching.kv_rollout import Rollout, RolloutState, bridged, density, first, flow, nucleus
from hasten.caching.store import KVStore
from hasten.canvas import Canvas
from hasten.noise import uniform
from hasten.samplers.commit import Threshold
from hasten.samplers.text_blocks import Whole
from tests.contract_kv import same, trial
from tests.text_models import facts, prompts


def numbers(seed: int, *shape: int) -> Tensor:
    return uniform(torch.tensor(seed), torch.tensor(0), torch.arange(math.prod(shape)), 1).float().view(*shape)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(1, 3), st.integers(0, 1 << 20), st.booleans())
def test_flow_is_the_column_sums_of_the_rollout(layers: int, slots: int, texts: int, seed: int, wide: bool) -> None:
    """Against the product of whole matrices. Some slots are not computed, some are not used; poison where nothing stands."""
    used = torch.ones(texts, slots, dtype=torch.bool)
    used[0, slots - 1] = False
    given_, product = [], torch.eye(slots).expand(texts, -1, -1)
    for layer in range(layers):
        computed = used & (numbers(seed + layer, texts, slots) < 0.7)
        count = int(computed.sum(1).max())
        order = computed.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
        at = torch.where(computed.gather(1, order), order, slots)
        a = numbers(seed + 50 + layer, texts, slots, slots) * used[:, None]
        a = a / a.sum(-1, keepdim=True).clamp(min=1e-9)
        rows = a.gather(1, at.clamp(max=slots - 1)[..., None].expand(-1, -1, slots))
        rows = torch.where((at < slots)[..., None], rows, 1e6)
        given_.append((torch.nn.functional.pad(rows, (0, 1)) if wide else rows, at))
        whole = torch.where(computed[..., None], a, torch.eye(slots))
        product = (whole + torch.eye(slots)) / 2 @ product
    expected = (product * used[:, :, None]).sum(1)
    assert torch.allclose(flow(given_, used)[used], expected[used], atol=1e-5)


def test_density_by_hand() -> None:
    """One text: two slots of a prompt, five open ones, of which the first is written."""
    canvas = Canvas.of(prompts([2]), [5], facts())
    canvas.write(canvas.place[None] == 2, canvas.ids + 1, canvas.confidence)
    spread = 1.5
    known = {slot: slot <= 2 for slot in range(-6, 20)}
    for slot in range(7):
        weights = {at: math.exp(-((at - slot) ** 2) / (2 * spread**2)) for at in range(slot - 6, slot + 7)}
        expected = sum(weight for at, weight in weights.items() if known[at]) / sum(weights.values())
        assert abs(float(density(canvas, spread)[0, slot]) - expected) < 1e-6
    canvas.write(canvas.place[None] == 6, canvas.ids + 1, canvas.confidence)
    assert float(density(canvas, 0.1)[0, 6]) == 1.0
    assert float(density(canvas, spread)[0, 6]) > 0.6, "its last slot is known, so what is behind it counts as known"


def test_density_does_not_know_of_other_texts() -> None:
    both = Canvas.of(prompts([2, 9]), [5, 14], facts())
    alone = Canvas.of(prompts([2]), [5], facts())
    assert torch.allclose(density(both, 3.0)[0, :7], density(alone, 3.0)[0], atol=1e-6)


def test_first_and_nucleus() -> None:
    key = torch.tensor([[0.1, 0.4, 0.3, 0.4, 9.0]])
    among = torch.tensor([[True, True, True, True, False]])
    assert first(key, among, 2).tolist() == [[False, True, False, True, False]]
    assert first(key, among, 9).tolist() == among.tolist()
    assert nucleus(key, among, 0.7).tolist() == [[False, True, False, True, False]]  # 0.8 of 1.2
    assert nucleus(key, among, 0.1).tolist() == [[False, True, False, False, False]], "at least one"
    assert nucleus(0 * key, among, 0.5).tolist() == [[True, False, False, False, False]], "what has none is not needed"
    assert nucleus(key, among, 1.0)[0, :4].all() and not nucleus(key, ~among & among, 1.0).any()


def test_bridged() -> None:
    chosen = torch.tensor([[0, 1, 0, 0, 1, 0, 0, 0, 1, 0]]).bool()
    assert bridged(chosen, 0).tolist() == chosen.tolist()
    assert bridged(chosen, 3)[0].long().tolist() == [0, 1, 1, 1, 1, 0, 0, 0, 1, 0]
    assert bridged(chosen, 4)[0].long().tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    assert not bridged(torch.zeros(1, 5, dtype=torch.bool), 9).any()


def test_all_of_the_influence_is_everything() -> None:
    """mass 1: every slot is computed at every step, and the text is that without a cache."""
    for settings_ in ({}, {"rule": Threshold(above=0.05)}, {"temperature": 1.0}):
        same(trial("full", Rollout(mass=1.0), **settings_), trial("full", Recompute(), **settings_))


def test_work_grows_with_what_is_asked() -> None:
    few, more, all_ = (
        trial("full", Rollout(most=most, mass=mass, gap=0, spread=2.0), blocks=Whole()).loop.tally.layers.sum()
        for most, mass in ((1, 0.0), (3, 0.3), (32, 1.0))
    )
    assert few < more < all_


def test_again_every_so_many_steps() -> None:
    part, often = Rollout(most=1, mass=0.0), Rollout(most=1, mass=0.0, every=2)
    one, two = trial("full", part), trial("full", often)
    assert two.loop.tally.layers.sum() > one.loop.tally.layers.sum()


class TestChoice:
    """One text: two slots of a prompt, eight open ones; two of these are asked for, and one more by influence."""

    def chosen(self, told: list[dict[int, float]], influence: int = 0, stale: tuple[int, ...] = ()) -> list[int]:
        """told: what each evaluation says of slots' confidence."""
        canvas = Canvas.of(prompts([2]), [8], facts())
        canvas.enter(canvas.open, torch.tensor([[2, 10]]))
        part = Rollout(most=2, spread=1.5, mass=0.0, gap=0)
        state = part.start(facts(), KVStore(1, 10, canvas.ids.device))
        assert isinstance(state, RolloutState)
        for values in told:
            confidence = torch.full((1, 10), float("nan"))
            for slot, value in values.items():
                confidence[0, slot] = value
            state.sure(confidence, canvas)
        state.influence = (canvas.place == influence)[None].float()
        changed = torch.isin(canvas.place, torch.tensor(stale, dtype=torch.int64))[None]
        return state.choose(canvas, changed)[0].nonzero()[:, 0].tolist()

    def test_what_is_near_the_known_comes_first(self) -> None:
        assert self.chosen([dict.fromkeys(range(2, 10), 0.5)]) == [0, 2, 3]
        assert self.chosen([dict.fromkeys(range(2, 10), 0.5) | {2: 0.3, 3: 0.3}]) == [0, 2, 3], "though others are surer"

    def test_what_was_sure_comes_first(self) -> None:
        """Far from all that is known the density is next to nothing, so that certainty has to be much higher."""
        low = dict.fromkeys(range(2, 10), 1e-4)
        assert self.chosen([low, {4: 0.9, 5: 0.8}]) == [0, 4, 5]
        assert self.chosen([low | {4: 0.9, 5: 0.8}, {2: 1e-4}]) == [0, 4, 5], "what is not asked about stays as it was"

    def test_what_nobody_knows_of_is_asked(self) -> None:
        assert self.chosen([dict.fromkeys((2, 3), 1e-4)]) == [0, 4, 5]

    def test_what_was_written_and_what_attention_flows_to(self) -> None:
        even = dict.fromkeys(range(2, 10), 0.5)
        assert self.chosen([even], influence=1, stale=(9,)) == [1, 2, 3, 9]
        assert self.chosen([even], influence=3) == [0, 2, 3], "chosen already, so the next one"
