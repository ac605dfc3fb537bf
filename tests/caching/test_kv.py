"""KV policies: what all of them keep, windows, and what each of them computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.caching.kv import Dual, Prefix, Recompute, TokenKV, Vicinity, alike, stretches
from hasten.caching.kv_attention import AttentionDrift
from hasten.caching.kv_front import BlockCausal, Freeze, Nested
from hasten.caching.kv_scattered import Delayed, Groups
from hasten.caching.kv_suffix import SparseSuffix
from hasten.caching.kv_values import ValueDrift
from hasten.caching.store import KVStore
from hasten.canvas import Canvas, TextFacts
from hasten.errors import RecipeError, RefusedError
from hasten.pipelines.text import calls
from hasten.samplers.commit import Quota, Threshold
from hasten.samplers.scores import Arbitrary
from hasten.samplers.text_blocks import Fixed, SubBlocks, Whole, Window
from tests.contract_kv import LAYERS, Restless, TokenKVContract, Trial, exact, llama, members, same, trial
from tests.text_models import prompts


class TestContract(TokenKVContract):
    @pytest.fixture(params=members())
    def part(self, request: pytest.FixtureRequest) -> TokenKV:
        part: TokenKV = request.param
        return part


@pytest.mark.parametrize(("kv", "name"), exact())
def test_what_is_called_exact_is(kv: TokenKV, name: str) -> None:
    for case in ({}, {"revise": Restless(budget=1)}, {"rule": Threshold(above=0.05)}, {"temperature": 1.0}):
        same(trial(name, kv, **case), trial(name, Recompute(), **case))


ALWAYS: list[Any] = [
    Prefix(every=1), Dual(every=1), Vicinity(every=1), Vicinity(before=99, after=99), Vicinity(warmup=99), Delayed(every=1),
    Groups(full=99), ValueDrift(prompt_every=1, every=1), ValueDrift(prompt_every=1, every=9, share=1.0),
    ValueDrift(prompt_every=None, every=9, share=1.0), AttentionDrift(every=1), AttentionDrift(every=1, wait=True),
]  # fmt: skip
"""Policies set so that everything is computed at every step."""


class TestLimits:
    @pytest.mark.parametrize("kv", ALWAYS, ids=repr)
    @pytest.mark.parametrize("name", ["full", "block-shifted"])
    def test_with_everything_computed_it_is_recomputation(self, kv: TokenKV, name: str) -> None:
        same(trial(name, kv), trial(name, Recompute()))

    @pytest.mark.parametrize("kv", [Prefix(), Dual(), Freeze(), Nested(), Vicinity(warmup=0)], ids=repr)
    def test_a_block_that_is_the_canvas_is_recomputation(self, kv: TokenKV) -> None:
        nothing = [torch.zeros(0, dtype=torch.int64)] * 2  # of masks alone the surest is a matter of rounding
        one, other = (Trial(llama(), nothing, [7, 5], each, score=Arbitrary(), blocks=Whole()) for each in (kv, Recompute()))
        same(one, other)

    @pytest.mark.parametrize("kv", [Prefix(), Dual(), Freeze(), Delayed(), AttentionDrift(), ValueDrift()], ids=repr)
    def test_elsewhere_it_is_not(self, kv: TokenKV) -> None:
        """On a model in which all see all, what is frozen differs: the tests above can fail."""
        one, other = trial("full", kv), trial("full", Recompute())
        first = [
            float((a - b)[a.isfinite() & b.isfinite()].abs().max()) for a, b in zip(one.seen[1:2], other.seen[1:2], strict=True)
        ]
        assert max(first) > 1e-3


def tokens(done: Trial) -> list[int]:
    return done.loop.tally.tokens.tolist()


def one(name: str, kv: TokenKV, prompt: int, new: int, **settings: Any) -> Trial:
    return Trial(llama(name), prompts([prompt]), [new], kv, **{"rule": Quota(), **settings})


class TestBlockCausal:
    def test_it_computes_blocks_and_nothing_else(self) -> None:
        """6 given, 10 new, blocks of 4: 2 + 4 + 4 slots are written in the blocks [4, 8), [8, 12), [12, 16)."""
        # the prompt with its block, that block again, then twice a full block with the next one and three times this one
        assert tokens(one("block", BlockCausal(), 6, 10)) == [8 + 4 + 2 * (8 + 3 * 4)]

    def test_last_block_needs_no_clean_pass(self) -> None:
        done = one("block", BlockCausal(), 4, 4, rule=Quota(steps=1))
        assert int(done.loop.tally.evaluations[0]) == 1 and tokens(done) == [8]

    @pytest.mark.parametrize("rule", [Whole(), Fixed(size=3, aligned=False), Fixed(size=7), SubBlocks(inner=2), Window(size=3)], ids=repr)
    @pytest.mark.parametrize("name", ["block", "block-shifted"])
    def test_exact_for_blocks_that_are_not_the_model_s(self, name: str, rule: Any) -> None:
        same(trial(name, BlockCausal(), blocks=rule), trial(name, Recompute(), blocks=rule))

    def test_refused_where_all_see_all(self) -> None:
        with pytest.raises(RefusedError, match="'dual'"):
            trial("full", BlockCausal())

    def test_shifted_logits_cost_the_token_before_the_block(self) -> None:
        """The logits of its first slot come from the block before; also when that is written, so that what is read does
        not depend on when it was (drafts of the approximate caches rely on it)."""
        assert tokens(one("block-shifted", BlockCausal(), 4, 4)) == [8 + 3 * (1 + 4)]


class TestWindows:
    def test_dual_computes_the_block_and_prefix_the_rest(self) -> None:
        assert tokens(one("full", Dual(), 6, 8)) == [2 * (14 + 3 * 4)]
        assert tokens(one("full", Prefix(), 6, 8)) == [14 + 3 * 8 + 14 + 3 * 4]

    def test_periodic_refresh(self) -> None:
        assert tokens(one("full", Dual(every=2), 6, 8)) == [2 * (2 * 14 + 2 * 4)]

    def test_vicinity_reaches_both_ways_and_not_beyond_the_text(self) -> None:
        assert tokens(one("full", Vicinity(before=1, after=2, warmup=2), 6, 8)) == [2 * 14 + 2 * 7 + 14 + 3 * 5]

    def test_freeze_takes_the_full_block_along_once(self) -> None:
        assert tokens(one("full", Freeze(), 6, 8)) == [14 + 3 * 8 + 8 + 3 * 4]

    def test_nested_blocks(self) -> None:
        """Outer blocks of 4, inner of 2: the outer one at the first step of an inner one, then the inner one."""
        done = one("block", Nested(), 4, 8, blocks=SubBlocks(inner=2))
        assert tokens(done) == [8 + 2 + 4 + 2 + 8 + 2 + 4 + 2]

    @pytest.mark.parametrize("name", ["block", "block-shifted"])
    def test_nested_blocks_are_exact_across_the_outer_ones(self, name: str) -> None:
        """With inner blocks of one step there is nothing approximate in them."""
        rule = SubBlocks(inner=1)
        same(trial(name, Nested(), blocks=rule), trial(name, Recompute(), blocks=rule))


class TestSparseSuffix:
    def test_near_masks_are_kept_and_far_ones_are_not(self) -> None:
        """Blocks of 4; behind the first one 8 slots, of which distances 0, 1, 2 and 4 are kept."""
        state: Any = SparseSuffix(window=6, decay=2.0).start(TextFacts(1, 9, 1), KVStore(1, 16, torch.device("cpu")))
        assert state.kept.nonzero()[:, 0].tolist() == KEPT
        done = one("full", SparseSuffix(window=6, decay=2.0), 4, 12)
        near, last = len(KEPT), len([d for d in KEPT if d < 4])
        assert tokens(done) == [8 + near + 3 * (4 + near) + 12 + last + 3 * (4 + last) + 16 + 3 * 4]

    def test_what_was_kept_for_an_earlier_block_is_not_read(self) -> None:
        """Slot 19 is at distance 11 of the first block, which is kept, and at 7 of the second, which is not."""
        calls: list[tuple[set[int], set[int]]] = []

        def watch(loop: Any) -> Any:
            def note(layer: int, q: Tensor, keys: Tensor, values: Tensor, now: Any) -> None:
                if layer == 0 and loop.tally.rows[-1][0].since == 0:
                    calls.append((set(now.slots[0].tolist()), set(now.visible[0].any(0).nonzero()[:, 0].tolist())))

            return note

        one("full", SparseSuffix(window=12, decay=2.0), 4, 20, watch=watch)
        assert 19 in calls[0][0] and 19 not in calls[1][0] and 16 in calls[1][0]
        assert all(computed == read for computed, read in calls)

    def test_without_decay_all_of_the_window_is(self) -> None:
        same(trial("full", SparseSuffix(window=99, decay=0.0)), trial("full", Prefix()))


KEPT = [0, 1, 2, 4]


class TestDelayed:
    def test_masks_and_what_was_just_written(self) -> None:
        """Full at steps 0 and 4; else the open slots, and the one written last."""
        done = one("full", Delayed(every=4), 6, 8, blocks=Whole())
        assert tokens(done) == [2 * 14 + sum(8 - step + 1 for step in (1, 2, 3, 5, 6, 7))]

    def test_greedy_leaves_out_masks_of_later_blocks(self) -> None:
        """Blocks of 4: the open slots of the block and the one written last, and what stands next to it."""
        narrow, wide = (one("full", Delayed(every=99, reach=reach), 6, 8) for reach in (0, None))
        assert tokens(narrow) == [14 + (4 + 3 + 2) + (5 + 4 + 3 + 2)]
        assert tokens(narrow)[0] < tokens(wide)[0]
        assert tokens(one("full", Delayed(every=99, reach=1), 6, 8))[0] > tokens(narrow)[0]


class TestGroups:
    def test_local_steps_compute_the_group_alone(self) -> None:
        """One full step, one local: it writes two slots, and computes both."""
        done = one("full", Groups(full=0, local=1), 0, 8, blocks=Whole(), rule=Quota())
        assert tokens(done) == [4 * (8 + 2)]

    def test_what_is_written_locally_was_chosen_in_the_full_step(self) -> None:
        done = one("full", Groups(full=2, local=2), 3, 11, blocks=Whole(), rule=Quota(steps=5))
        canvas = done.loop.canvas
        local = (canvas.committed[0] == 3) | (canvas.committed[0] == 4)
        assert int(local.sum()) == 4 and int((canvas.committed[0] == 2).sum()) == 2
        seen = done.seen[3][0].isfinite()
        assert torch.equal(seen.nonzero(), local.nonzero()), "only the group's open slots have logits"

    def test_a_rule_that_does_not_know_its_numbers_is_refused(self) -> None:
        with pytest.raises(RecipeError, match="quota"):
            one("full", Groups(), 3, 8, rule=Threshold())


class TestGathering:
    def test_texts_of_like_widths_share_a_call(self) -> None:
        assert alike({0: 10, 1: 3, 2: 5, 3: 2, 4: 1}) == [[0, 2], [1, 3], [4]]
        assert alike({}) == []

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_stretches_are_the_slots_they_stand_for(self, data: st.DataObject) -> None:
        """Without sorting, as with it; with shifted logits, the slot before is there in any case."""
        starts = data.draw(st.lists(st.integers(0, 6), min_size=3, max_size=3))
        new = data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=3))
        facts = TextFacts(LAYERS, 9, 1, shifted=data.draw(st.booleans()))
        canvas = Canvas.of([torch.full((start,), 5) for start in starts], new, facts)
        spans = {}
        for text in range(3):
            first = data.draw(st.integers(0, starts[text] + new[text] - 1))
            spans[text] = (first, data.draw(st.integers(first + 1, starts[text] + new[text])))
        canvas.enter(canvas.open, torch.tensor([(max(spans[i][0], starts[i]), spans[i][1]) for i in range(3)]))
        for call in stretches(canvas, canvas.look(), spans):
            wanted = calls.Wanted(canvas.eligible, canvas.slots)
            store = KVStore(3, canvas.slots, torch.device("cpu"))
            quick = calls.plain(call, canvas, wanted, facts, store)
            call.stretch, call.whole = None, False
            sorted_ = calls.plain(call, canvas, wanted, facts, store)
            for text, a, b in zip(call.members, quick.slots.tolist(), sorted_.slots.tolist(), strict=True):
                before = {max(spans[text][0] - 1, 0)} if facts.shifted else set()
                assert [slot for slot in a if slot < canvas.slots] == sorted({slot for slot in b if slot < canvas.slots} | before)
            assert torch.equal(quick.target.sort(1).values, sorted_.target.sort(1).values)
