"""Training and calibrating commit filters: labels, the conformal threshold, and a filter that works in the loop."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.canvas import TextFacts
from hasten.distill.methods.learn2pd import SETTINGS, Learn2PD, fit, train
from hasten.distill.pretrain.filter_bundle import note_filters
from hasten.distill.text.filter import Traces, as_store, collect, held_back, risk, score, threshold
from hasten.distill.text.filter_prompts import CODE_GIVEN, Asked, own
from hasten.errors import RefusedError, UsageError
from hasten.pipelines import tiny_models
from hasten.pipelines.text.diffusion import TextDiffusionPipeline
from hasten.pipelines.text.filters import FILES
from hasten.pipelines.text_models.stamp import same, stamp
from hasten.recipe import Recipe
from hasten.samplers.commit import Quota, Unmask
from hasten.samplers.filter import FilterNet, Form, Learned, LearnedBlock, load
from hasten.samplers.text_blocks import Fixed, InBlocks
from tests.text_models import generate, prompts, texts, tiny_llama

BLOCKS = InBlocks(rule=Fixed(size=4), end=None)
RECIPE = Recipe(blocks=BLOCKS)


class TestCollect:
    def test_every_open_slot_of_every_step_is_there(self) -> None:
        """A block of 4 has 4 + 3 + 2 + 1 states; the token of the last of each slot is the final one."""
        traces = collect(tiny_llama(), prompts([3, 5, 4]), [8] * 3, RECIPE, batch=2)
        assert len(traces.inputs) == 3 * 2 * 10
        assert bool(traces.valid.all()) and traces.text.unique().tolist() == [0, 1, 2]
        for text in range(3):
            for slot in traces.slot[traces.text == text].unique():
                mine = traces.right[(traces.text == text) & (traces.slot[:, 0] == slot)]
                assert bool(mine[-1]), "what is written at a slot's last state is final"

    def test_texts_of_different_lengths(self) -> None:
        """A block of 4 has 10 states, one of 3 has 6, and one of 1 has 1."""
        told: list[str] = []
        traces = collect(tiny_llama(), prompts([3, 5, 4]), [7, 4, 1], RECIPE, batch=2, told=told.append)
        assert [int((traces.text == text).sum()) for text in range(3)] == [16, 10, 1]
        assert told == ["generated 2 of 3 texts", "generated 3 of 3 texts"]

    def test_labels_are_those_of_sequential_decoding(self) -> None:
        traces = collect(tiny_llama(), prompts([3]), [8], RECIPE)
        assert 0 < int(traces.right.sum()) < len(traces.right), "nothing to tell apart"
        final = texts(generate(tiny_llama(), prompts([3]), 8, Recipe(commit=Unmask(rule=Quota()), blocks=BLOCKS)))[0]
        assert len(final) == 8

    def test_the_oracle_s_states_are_fewer(self) -> None:
        some = prompts([3, 5])
        plain = collect(tiny_llama(), some, [8, 8], RECIPE)
        assert len(collect(tiny_llama(), some, [8, 8], RECIPE, oracle=True).inputs) < len(plain.inputs)

    def test_blocks_as_a_whole(self) -> None:
        traces = collect(tiny_llama(), prompts([3, 5]), [8, 8], RECIPE, form="block")
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
        assert risk(net, traces, above) == pytest.approx(2 / 90), "two of nine texts, one slot in ten"
        assert risk(net, traces, 0.0) == pytest.approx(9 / 90), "slots that are never wrong do not count"
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
        assert risk(net, traces, above) == pytest.approx(float(wrong.mean()))
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
        card = fit(tiny_llama(), Asked(some, [8] * 30, ""), RECIPE, out, Learn2PD(form=form, false_commits=0.2))
        assert card["filter"] == form and 0 <= card["wrong"] <= 1 and card["texts"] == 30
        rule = Learned(weights=str(out)) if form == "slots" else LearnedBlock(weights=str(out))
        loop = generate(tiny_llama(), some[:4], 8, Recipe(commit=Unmask(rule=rule), blocks=BLOCKS))
        assert all(len(text) == 8 for text in texts(loop))

    def test_it_learns_what_a_threshold_knows(self) -> None:
        """Labels that follow from the confidence alone are learned."""
        traces = collect(tiny_llama(), prompts([3] * 12), [8] * 12, RECIPE)
        traces.right = traces.inputs[:, 2:3] > 0.3
        net = train(tiny_llama(), as_store(traces, 0), Learn2PD(), SETTINGS.model_copy(update={"steps": 200}))
        assert float(((net(traces.inputs) > 0) == traces.right).float().mean()) > 0.97

    def test_what_is_held_back_is_not_learned(self) -> None:
        traces = collect(tiny_llama(), prompts([3] * 7), [8] * 7, RECIPE)
        rows, kept = as_store(traces, 3), held_back(as_store(traces, 3))
        learned = rows.conditions.rows(rows.prompt).tensors["text"]
        assert len(kept.text.unique()) == 2 and not torch.isin(learned, kept.text).any()
        assert len(learned) + len(kept.text) == len(traces.text)
        assert not torch.equal(held_back(as_store(traces, 4)).text.unique(), kept.text.unique())

    @pytest.mark.parametrize(
        ("texts_", "new", "rate", "match"),
        [(5, 8, 0.01, "at least 297 prompts"), (9, 8, 0.0, "between 0 and 1"), (9, 0, 0.3, "new must be at least 1")],
    )
    def test_what_cannot_be_is_said_at_once(
        self, texts_: int, new: int, rate: float, match: str, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match=match):
            asked = Asked(prompts([3] * texts_), [new] * texts_, "")
            fit(tiny_llama(), asked, RECIPE, tmp_path / "f", Learn2PD.model_construct(false_commits=rate))


class TestStamp:
    def test_one_model_in_any_precision(self) -> None:
        model = tiny_llama().model
        for dtype in (torch.bfloat16, torch.float16):
            assert same(stamp(model), stamp(copy.deepcopy(model).to(dtype)))

    def test_others(self) -> None:
        mine = stamp(tiny_llama().model)
        assert not same(mine, stamp(tiny_llama(seed=1).model))
        assert not same(mine, mine[:-4])
        assert not same(mine, torch.full_like(mine, float("nan"))), "nothing is known of it"

    def test_what_is_offloaded_is_left_out(self) -> None:
        mine = stamp(tiny_llama().model)
        part = mine.clone()
        part[:4] = float("nan")
        assert same(mine, part)
        part[7] *= 1.02
        assert not same(mine, part)


class TestPrompts:
    def test_what_the_model_learned(self, tmp_path: Path) -> None:
        """Seven list tasks to one piece of code, none of them held out; the same for the same seed."""
        for number in range(8):
            (tmp_path / f"m{number}.py").write_text(f"x = [{number}, 1, 2]\n" * (2 if number < 4 else 60))
        _, words = tiny_models.text("tiny-draft")
        facts = TextFacts(2, len(words), words.mask_token_id, context=64)
        data = {"tasks": True, "code": {"source": "here"}}
        asked, again = (own(data, words, 16, facts, 3, tmp_path) for _ in range(2))
        assert asked.about == "14 list tasks and 2 pieces of code"
        assert asked.new == [16] * 14 + [32] * 2 and [len(ids) for ids in asked.prompts[14:]] == [CODE_GIVEN] * 2
        assert all(torch.equal(a, b) for a, b in zip(asked.prompts, again.prompts, strict=True))
        assert own({"tasks": True, "code": None}, words, 7, facts).new == [16] * 7
        with pytest.raises(UsageError, match="--prompts FILE"):
            own({"tasks": False, "code": None}, words, 7, facts)
        for number in range(4, 8):
            (tmp_path / f"m{number}.py").unlink()
        with pytest.raises(UsageError, match="None of these sources has 64 tokens"):
            own(data, words, 16, facts, 3, tmp_path)


class TestBundled:
    """Filters that come with tiny-dllm: they are its own, and work by name."""

    def test_their_checksums_are_in_the_card(self) -> None:
        known = tiny_models.card("tiny-dllm")["sha256"]
        assert set(FILES.values()) < set(known) and all(tiny_models.verify("tiny-dllm").values())
        assert not set(FILES.values()) & set(tiny_models.card("tiny-dllm")["parameters"])

    def test_by_name(self) -> None:
        pipe = tiny_models.load("tiny-dllm")
        for name in ("learned-filter", "learn2pd"):
            output = pipe.generate(prompts=["sort: h c n a . . . . ="], max_new_tokens=16, recipe=name)
            assert output.texts == [" a c h n"] and output.nfe.tolist()[0] < 6

    def test_they_are_nobody_else_s(self) -> None:
        model, words = tiny_models.text("tiny-dllm-block")
        with pytest.raises(UsageError, match="hasten train filter --model tiny-dllm-block --form slots --out filter-slots"):
            TextDiffusionPipeline(model, words, "learned-filter", probe=False)
        own_file = tiny_models.path("tiny-dllm") / FILES["slots"]
        with pytest.raises(RefusedError, match="another model"):
            TextDiffusionPipeline(model, words, f"learned-filter:weights={own_file}", probe=False)

    @pytest.mark.parametrize("form", list(FILES))
    def test_small_and_calibrated(self, form: Form) -> None:
        file = tiny_models.path("tiny-dllm") / FILES[form]
        found = load(file, form)
        assert 0 < found.above < 1 and found.stamp is not None and file.stat().st_size < 16_000

    def test_a_card_takes_them_up(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"no hasten.json"):
            note_filters(tmp_path)
        (tmp_path / "hasten.json").write_text('{"sha256": {"model.safetensors": "1", "filter-block.safetensors": "old"}}')
        (tmp_path / FILES["slots"]).write_bytes(b"x")
        assert note_filters(tmp_path) == [FILES["slots"]]
        text = (tmp_path / "hasten.json").read_text()
        assert '"model.safetensors": "1"' in text and "old" not in text and FILES["slots"] in text
