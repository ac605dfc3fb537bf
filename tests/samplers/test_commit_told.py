"""Rules that are told what is right: a guide, and the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.canvas import Canvas
from hasten.errors import RecipeError, UsageError
from hasten.recipe import Recipe
from hasten.samplers.commit import Quota, Threshold, Unmask
from hasten.samplers.commit_told import Agreed, Oracle
from hasten.samplers.text_blocks import Fixed, InBlocks
from tests.text_models import (
    EOS_ID,
    VOCAB,
    generate,
    open_canvas,
    picked,
    prompts,
    scripted,
    texts,
    tiny_llama,
)

BLOCKS = InBlocks(rule=Fixed(size=4))


class TestAgreed:
    def test_where_both_say_the_same(self) -> None:
        canvas = open_canvas([2, 1], [4, 3])
        token, guide = [[5, 6, 7, 8], [5, 5, 5]], [[5, 9, 7, -1], [9, 9, 5]]
        scores = scripted(canvas, [[0.1] * 4, [0.2] * 3], token=token, guide=guide)
        assert picked(canvas, Agreed().start().select(scores, canvas)) == [[0, 2], [2]]

    def test_without_a_guide_it_says_what_to_do(self) -> None:
        with pytest.raises(UsageError, match="Pass guide="):
            generate(tiny_llama(), prompts([3]), 4, Recipe(commit=Unmask(rule=Agreed())))

    def test_the_guide_reads_what_is_proposed(self) -> None:
        """It sees a token in every open slot of the block, and what it says decides."""
        asked: list[Tensor] = []

        def guide(ids: Tensor, canvas: Canvas) -> Tensor:
            asked.append(ids[canvas.eligible].clone())
            return torch.where(ids % 2 == 0, ids, -1)

        recipe = Recipe(commit=Unmask(rule=Agreed()), blocks=BLOCKS)
        loop = generate(tiny_llama(), prompts([3, 5]), [8, 6], recipe, guide=guide)
        plain = generate(tiny_llama(), prompts([3, 5]), [8, 6], Recipe(commit=Unmask(rule=Quota()), blocks=BLOCKS))
        assert all(int(ids.min()) > 1 for ids in asked), "no mask is left in what is proposed"
        assert bool((loop.tally.evaluations < plain.tally.evaluations).all())

    def test_a_guide_that_agrees_with_everything_takes_one_step_per_block(self) -> None:
        recipe = Recipe(commit=Unmask(rule=Agreed()), blocks=BLOCKS)
        loop = generate(tiny_llama(), prompts([3, 5]), [8, 4], recipe, guide=lambda ids, canvas: ids)
        assert int(loop.tally.evaluations.max()) <= 2

    def test_one_that_never_agrees_is_sequential(self) -> None:
        recipe = Recipe(commit=Unmask(rule=Agreed()), blocks=BLOCKS)
        never = torch.tensor(-1)
        loop = generate(tiny_llama(), prompts([3, 5]), [8, 6], recipe, guide=lambda ids, canvas: never.expand_as(ids))
        plain = generate(tiny_llama(), prompts([3, 5]), [8, 6], Recipe(commit=Unmask(rule=Quota()), blocks=BLOCKS))
        assert texts(loop) == texts(plain)


class TestOracle:
    def test_what_agrees_is_taken(self) -> None:
        canvas = open_canvas([2, 1], [4, 3])
        scores = scripted(canvas, [[0.1, 0.2, 0.3, 0.4], [0.1, 0.9, 0.5]], token=[[5, 6, 7, 8], [5, 6, 7]])
        state = Oracle(final=((5, 9, 7, 9), (8, 8, 8))).start()
        assert picked(canvas, state.select(scores, canvas)) == [[0, 2], [1]]
        assert scores.token[1, 2] == 8, "where nothing agrees, the surest gets its final token"
        assert scores.token[0, 3] == 6, "and nothing else is touched"

    @pytest.mark.parametrize("size", [4, 16])
    def test_the_text_comes_out(self, size: int) -> None:
        """Whatever the final text, also one that the model would never write; never in more steps than one by one."""
        g = torch.Generator().manual_seed(0)
        final = tuple(tuple(torch.randint(EOS_ID + 1, VOCAB, (n,), generator=g).tolist()) for n in (9, 5))
        recipe = Recipe(commit=Unmask(rule=Oracle(final=final)), blocks=InBlocks(rule=Fixed(size=size)))
        loop = generate(tiny_llama(), prompts([3, 5]), [9, 5], recipe)
        assert texts(loop) == [list(text) for text in final]
        assert bool((loop.tally.evaluations <= torch.tensor([9, 5])).all())

    def test_it_needs_fewer_steps_for_what_the_model_would_write(self) -> None:
        blocks = InBlocks(rule=Fixed(size=8), end=None)
        plain = generate(tiny_llama(), prompts([3, 5]), 16, Recipe(commit=Unmask(rule=Quota()), blocks=blocks))
        final = tuple(tuple(text) for text in texts(plain))
        oracle = Recipe(commit=Unmask(rule=Oracle(final=final)), blocks=blocks)
        loop = generate(tiny_llama(), prompts([3, 5]), 16, oracle)
        assert texts(loop) == texts(plain)
        assert bool((loop.tally.evaluations < plain.tally.evaluations).all())

    def test_a_shorter_final_text(self) -> None:
        """Texts that ended early: what lies behind their end is the engine's, and is cut off."""
        final = ((5, 6, EOS_ID), (7, EOS_ID))
        recipe = Recipe(commit=Unmask(rule=Oracle(final=final)), blocks=BLOCKS)
        assert texts(generate(tiny_llama(), prompts([3, 5]), [9, 5], recipe)) == [[5, 6, EOS_ID], [7, EOS_ID]]

    def test_a_text_too_few(self) -> None:
        recipe = Recipe(commit=Unmask(rule=Oracle(final=((5, 6),))), blocks=BLOCKS)
        with pytest.raises(UsageError, match="knows 1 texts and is asked for 2"):
            generate(tiny_llama(), prompts([3, 5]), 2, recipe)


def test_drafts_are_not_verified_with_what_remembers() -> None:
    from hasten.samplers.scores_history import Credit
    from hasten.samplers.verify import Verifier

    class Check(Verifier):
        """Without a kind, so that it is no member of the family."""

    recipe = Recipe(commit=Unmask(rule=Threshold(), score=Credit()), verify=Check())
    with pytest.raises(RecipeError, match="stand for steps that were not taken"):
        generate(tiny_llama(), prompts([3]), 4, recipe)
