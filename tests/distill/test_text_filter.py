"""Training and calibrating commit filters: labels, the conformal threshold, and a filter that works in the loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.distill.text_filter import Traces, collect, fit, score, threshold, train
from hasten.errors import UsageError
from hasten.recipe import Recipe
from hasten.samplers.commit import Quota, Unmask
from hasten.samplers.filter import FilterNet, Form, Learned, LearnedBlock
from hasten.samplers.text_blocks import Fixed, InBlocks
from tests.text_models import generate, prompts, texts, tiny_llama

BLOCKS = InBlocks(rule=Fixed(size=4), end=None)
RECIPE = Recipe(blocks=BLOCKS)


class TestCollect:
    def test_every_open_slot_of_every_step_is_there(self) -> None:
        """A block of 4 has 4 + 3 + 2 + 1 states; the token of the last of each slot is the final one."""
        traces = collect(tiny_llama(), prompts([3, 5, 4]), 8, RECIPE, batch=2)
        assert len(traces.inputs) == 3 * 2 * 10
        assert bool(traces.valid.all()) and traces.text.unique().tolist() == [0, 1, 2]
        for text in range(3):
            for slot in traces.slot[traces.text == text].unique():
                mine = traces.right[(traces.text == text) & (traces.slot[:, 0] == slot)]
                assert bool(mine[-1]), "what is written at a slot's last state is final"

    def test_labels_are_those_of_sequential_decoding(self) -> None:
        traces = collect(tiny_llama(), prompts([3]), 8, RECIPE)
        assert 0 < int(traces.right.sum()) < len(traces.right), "nothing to tell apart"
        final = texts(generate(tiny_llama(), prompts([3]), 8, Recipe(commit=Unmask(rule=Quota()), blocks=BLOCKS)))[0]
        assert len(final) == 8

    def test_the_oracle_s_states_are_fewer(self) -> None:
        some = prompts([3, 5])
        plain = collect(tiny_llama(), some, 8, RECIPE)
        assert len(collect(tiny_llama(), some, 8, RECIPE, oracle=True).inputs) < len(plain.inputs)

    def test_blocks_as_a_whole(self) -> None:
        traces = collect(tiny_llama(), prompts([3, 5]), 8, RECIPE, form="block")
        assert traces.inputs.shape == (2 * 8, 32) and traces.right.shape == (16, 32)
        assert int(traces.valid.sum()) == 2 * 2 * 10
        assert bool((traces.inputs[:, :4] > 0).all()), "written slots have their confidence, too"
        assert not bool(traces.inputs[:, 4:].any())


def scripted(chance: Tensor, right: Tensor) -> tuple[FilterNet, Traces]:
    """A filter that gives `chance` [texts, slots] to one state of each slot, whose token is `right` [texts, slots]."""
    net = FilterNet("block", 1, 1)
    torch.nn.init.constant_(net.first.weight, 1.0)
    torch.nn.init.zeros_(net.first.bias)
    torch.nn.init.constant_(net.second.weight, 1.0)
    torch.nn.init.constant_(net.second.bias, -20.0)
    rows, slots = chance.shape
    inputs = chance.logit().flatten()[:, None] + 20
    place = torch.arange(slots).repeat(rows)[:, None]
    text = torch.arange(rows).repeat_interleave(slots)
    traces = Traces(inputs, right.flatten()[:, None], torch.ones_like(place, dtype=torch.bool), place, text)
    return net.requires_grad_(False), traces


class TestThreshold:
    def test_exact(self) -> None:
        """9 texts of 10 slots, one wrong in each with chance 0.1, 0.2, ...: k of them allow (0.1 k + 1) / 10."""
        chance, right = torch.full((9, 10), 0.95), torch.ones(9, 10, dtype=torch.bool)
        chance[:, 3], right[:, 3] = torch.arange(1, 10) / 10, False
        net, traces = scripted(chance, right)
        above = threshold(net, traces, 0.1201)  # two may pass: 0.9 and 0.8
        assert 0.7 < above < 0.71 and score(net, traces, above)["recall"] == 1.0
        assert score(net, traces, above)["wrong"] == pytest.approx(2 / (81 + 2))
        assert threshold(net, traces, 0.1001) > 0.9
        assert threshold(net, traces, 0.5) == 0.0 or threshold(net, traces, 0.5) < 1e-6

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10_000), st.sampled_from([0.05, 0.1, 0.2]))
    def test_the_share_that_it_promises(self, seed: int, rate: float) -> None:
        g = torch.Generator().manual_seed(seed)
        chance = torch.rand(40, 7, generator=g).clamp(0.01, 0.99)
        right = torch.rand(40, 7, generator=g) < chance
        net, traces = scripted(chance, right)
        above = threshold(net, traces, rate)
        wrong = ((net(traces.inputs).sigmoid() >= above) & ~traces.right).view(40, 7).float().mean(1)
        assert float(wrong.sum() + 1) / 41 <= rate + 1e-6

    def test_over_many_draws_the_expectation_holds(self) -> None:
        """New texts from the same source: the mean share of wrong slots is below the rate, and not far below it."""
        shares = []
        for seed in range(60):
            g = torch.Generator().manual_seed(seed)
            chance = torch.rand(80, 5, generator=g).clamp(0.01, 0.99)
            right = torch.rand(80, 5, generator=g) < chance
            net, known = scripted(chance[:40], right[:40])
            above = threshold(net, known, 0.1)
            shares.append(((chance[40:] >= above) & ~right[40:]).float().mean())
        mean = torch.stack(shares).mean()
        assert 0.05 < float(mean) < 0.1 + 0.01


class TestFit:
    @pytest.mark.parametrize("form", ["slots", "block"])
    def test_a_filter_from_end_to_end(self, form: Form, tmp_path: Path) -> None:
        out = tmp_path / "filter.safetensors"
        some = prompts([3, 5, 4, 6, 3, 2] * 5)
        card = fit(tiny_llama(), some, 8, RECIPE, out, form=form, false_commits=0.2)
        assert card["filter"] == form and 0 <= card["wrong"] <= 1 and card["texts"] == 30
        rule = Learned(weights=str(out)) if form == "slots" else LearnedBlock(weights=str(out))
        loop = generate(tiny_llama(), some[:4], 8, Recipe(commit=Unmask(rule=rule), blocks=BLOCKS))
        assert all(len(text) == 8 for text in texts(loop))

    def test_it_learns_what_a_threshold_knows(self) -> None:
        """Labels that follow from the confidence alone are learned."""
        traces = collect(tiny_llama(), prompts([3] * 12), 8, RECIPE)
        traces.right = traces.inputs[:, 2:3] > 0.3
        net = train(traces, "slots")
        assert float(((net(traces.inputs) > 0) == traces.right).float().mean()) > 0.97

    @pytest.mark.parametrize(
        ("texts_", "new", "rate", "match"),
        [(5, 8, 0.01, "at least 297 prompts"), (9, 8, 0.0, "between 0 and 1"), (9, 0, 0.3, "new must be at least 1")],
    )
    def test_what_cannot_be_is_said_at_once(
        self, texts_: int, new: int, rate: float, match: str, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match=match):
            fit(tiny_llama(), prompts([3] * texts_), new, RECIPE, tmp_path / "f", false_commits=rate)
