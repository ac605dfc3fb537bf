"""Inside diffusers' `LLaDA2Pipeline`: hasten's scheduler, and a cache that is exact or not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import hasten
from hasten.caching.kv import Dual
from hasten.caching.kv_front import BlockCausal
from hasten.errors import RefusedError, UsageError
from hasten.pipelines.text.llada2 import LLaDA2Session
from hasten.pipelines.text.scheduler import RecipeScheduler
from hasten.recipe import Recipe
from hasten.samplers.commit import Either, Quota, Threshold, Unmask
from hasten.samplers.commit_told import Agreed
from hasten.samplers.revise import RevisePolicy
from hasten.samplers.revise_edit import Edit
from hasten.samplers.revise_erase import Remask
from hasten.samplers.revise_unsure import Lapse, Outbid
from hasten.samplers.scores import Margin
from hasten.samplers.text_blocks import Fixed, InBlocks, Whole
from tests.pipelines.text_pipes import EOS, MASK, PAD, model, tokenizer

BLOCK, IDS = 4, torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
CALL: dict[str, Any] = {
    "input_ids": IDS, "gen_length": 14, "block_length": BLOCK, "num_inference_steps": 4, "eos_early_stop": False,
    "editing_threshold": None, "output_type": "seq", "threshold": 0.3,
}  # fmt: skip
KEEP = Recipe(name="keep", kv=BlockCausal())
SURE = Recipe(name="sure", commit=Unmask(rule=Threshold(above=0.3)))


class BlockLlama(LlamaForCausalLM):
    """Turns a 2-D mask into a block-causal one, as the released models do."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 2:
            number = torch.arange(input_ids.shape[1]) // BLOCK
            sees = (number[:, None] >= number) & attention_mask.bool()[:, None, None]
            attention_mask = sees | torch.eye(input_ids.shape[1], dtype=torch.bool)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **(more | {"use_cache": False}))


class FullLlama(LlamaForCausalLM):
    """Reads its whole window in all directions: the prompt changes with every step."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask.bool()[:, None, None].expand(-1, 1, input_ids.shape[1], -1)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **(more | {"use_cache": False}))


def pipeline(cls: Any = BlockLlama, scheduler: Any = None) -> LLaDA2Pipeline:
    made = LLaDA2Pipeline(
        model=model("block", BLOCK, cls=cls), scheduler=scheduler or BlockRefinementScheduler(block_length=BLOCK),
        tokenizer=tokenizer(),
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def calls(pipe: LLaDA2Pipeline) -> list[int]:
    """Tokens of each evaluation of the model from now on."""
    seen: list[int] = []
    pipe.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append((kwargs.get("input_ids", *args)).shape[1]), with_kwargs=True)
    return seen


# --- the cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [BlockLlama, LlamaForCausalLM], ids=["block-causal", "causal"])
@pytest.mark.parametrize("more", [{}, {"editing_threshold": 0.05}, {"eos_early_stop": True, "eos_token_id": EOS}])
def test_the_cache_gives_the_pipelines_own_texts(cls: Any, more: dict[str, Any]) -> None:
    pipe = pipeline(cls)
    right = pipe(**(CALL | more)).sequences
    with hasten.accelerate(pipe, KEEP) as run:
        assert isinstance(run, LLaDA2Session)
        assert torch.equal(pipe(**(CALL | more)).sequences, right)
        assert torch.equal(pipe(**(CALL | more)).sequences, right)
    report = run.report()
    assert run.cached is not None
    assert run.cached.works
    assert report.cache == "block-causal"
    assert report.computed_fraction < 0.6
    assert not report.notes
    assert len(report.generations) == 2
    assert report.generations[1].computed < report.generations[0].computed, "the prompt was known the second time"


def test_padding_is_no_key() -> None:
    pipe = pipeline()
    ids = torch.tensor([[PAD, PAD, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
    given = CALL | {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    right = pipe(**given).sequences
    assert not torch.equal(right, pipe(**(CALL | {"input_ids": ids})).sequences)
    with hasten.accelerate(pipe, KEEP) as run:
        assert torch.equal(pipe(**given).sequences, right)
        pipe(**(CALL | {"input_ids": ids}))
        assert torch.equal(pipe(**given).sequences, right), "another mask makes other keys"
        assert run.cached is not None
        assert run.cached.works
        assert run.cached.mask is not None
        other = torch.ones_like(run.cached.mask)
        assert run.cached._changed(run.cached.ids, other) == 0  # type: ignore[arg-type]
        assert run.cached._changed(run.cached.ids, run.cached.mask) == other.shape[1]  # type: ignore[arg-type]


def test_other_texts_in_between_do_not_remain() -> None:
    pipe = pipeline()
    others = [CALL | {"input_ids": IDS.flip(0)}, CALL | {"input_ids": IDS[:1]}, CALL | {"gen_length": 30}]
    right = [pipe(**call).sequences for call in others]
    with hasten.accelerate(pipe, KEEP):
        for _ in range(2):
            pipe(**CALL)
            assert all(torch.equal(pipe(**call).sequences, want) for call, want in zip(others, right, strict=True))


def test_a_model_that_sees_all_is_left_to_itself() -> None:
    pipe = pipeline(FullLlama)
    right = pipe(**CALL).sequences
    with hasten.accelerate(pipe, KEEP) as run:
        assert torch.equal(pipe(**CALL).sequences, right)
    report = run.report()
    assert "not block-causal when LLaDA2Pipeline calls it" in str(report)
    assert report.cache == "recompute"
    assert report.computed_fraction == 1


def test_the_pipeline_is_restored() -> None:
    pipe = pipeline()
    own, scheduler, right = pipe.model, pipe.scheduler, pipe(**CALL).sequences
    with pytest.raises(KeyboardInterrupt), hasten.accelerate(pipe, KEEP | SURE):
        assert isinstance(pipe.scheduler, RecipeScheduler)
        assert pipe.device == torch.device("cpu")
        pipe(**CALL, callback_on_step_end=_interrupts)
    assert pipe.model is own
    assert pipe.scheduler is scheduler
    assert "step" not in vars(scheduler)
    assert torch.equal(pipe(**CALL).sequences, right)
    assert isinstance(pipe.components["model"], nn.Module)


def _interrupts(*args: Any) -> Any:
    raise KeyboardInterrupt


def test_what_cannot_act_is_refused() -> None:
    pipe = pipeline()
    with pytest.raises(RefusedError, match="only exact caches"):
        hasten.accelerate(pipe, Recipe(name="dual", kv=Dual()))
    with pytest.raises(UsageError, match="blocks of one size"):
        hasten.accelerate(pipe, Recipe(name="blocks", blocks=InBlocks(rule=Whole())))
    assert not hasattr(pipe, "_hasten_shadows")


# --- the scheduler ------------------------------------------------------------------------------------


def test_the_recipe_decides() -> None:
    pipe = pipeline(scheduler=RecipeScheduler.of(SURE, BLOCK))
    seen: list[Tensor] = []

    def look(owner: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        chosen, odds, open_slots = tensors["transfer_index"], tensors["sampled_probs"], tensors["active_block"]
        assert not (chosen & ~open_slots).any()
        assert chosen[open_slots.any(1)].any(1).all()
        sure = open_slots & (odds >= 0.3)
        assert torch.equal(chosen[sure.any(1)], sure[sure.any(1)])
        seen.append(chosen)
        return {}

    names = ["transfer_index", "sampled_probs", "active_block"]
    output = pipe(**CALL, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names).sequences
    assert output.shape == (2, 14)
    assert MASK not in output
    assert len(seen) <= 14


def test_threshold_with_quota_is_diffusers_own_rule() -> None:
    """LLaDA2's rule is `Either(Threshold, Quota)`, with > in place of >=."""
    rule = Recipe(commit=Unmask(rule=Either(rules=(Threshold(above=0.3), Quota()))))
    ours, theirs = pipeline(scheduler=RecipeScheduler.of(rule, BLOCK)), pipeline()
    assert torch.equal(ours(**CALL).sequences, theirs(**CALL).sequences)


def test_a_full_block_is_not_evaluated_again() -> None:
    ours, theirs = pipeline(scheduler=RecipeScheduler.of(SURE, BLOCK)), pipeline()
    mine, other = calls(ours), calls(theirs)
    ours(**CALL)
    theirs(**CALL)
    assert len(mine) < len(other)


def test_edits_replace_written_tokens() -> None:
    recipe = SURE.model_copy(update={"revise": Edit(above=0.05)})
    pipe = pipeline(scheduler=RecipeScheduler.of(recipe, BLOCK))
    edits = []

    def look(owner: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        edits.append(int(tensors["editing_transfer_index"].sum()))
        return {}

    pipe(**CALL, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["editing_transfer_index"])
    assert sum(edits) > 0
    assert len(edits) < 14 * 17


@pytest.mark.parametrize("revise", [Outbid(), Lapse(eta=0.6), Remask(below=1.0)])
def test_what_is_taken_back_is_written_again(revise: RevisePolicy) -> None:
    """And as many slots besides are written in the same step, so that the block takes no more evaluations than it has slots."""
    recipe = Recipe(commit=Unmask(rule=Quota(steps=5)), revise=revise)
    pipe, gone, steps = pipeline(scheduler=RecipeScheduler.of(recipe, BLOCK)), [0], [0]

    def look(owner: Any, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        gone[0] += int(tensors["editing_transfer_index"].sum())
        steps[0] += 1
        return {}

    output = pipe(**CALL, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["editing_transfer_index"]).sequences
    assert gone[0] > 0 and MASK not in output
    assert steps[0] <= 14


def test_texts_of_a_batch_do_not_know_of_each_other() -> None:
    pipe = pipeline(scheduler=RecipeScheduler.of(Recipe(commit=Unmask(rule=Threshold(above=0.3), score=Margin())), BLOCK))
    together = pipe(**CALL).sequences
    for row in range(2):
        assert torch.equal(pipe(**(CALL | {"input_ids": IDS[row : row + 1]})).sequences[0], together[row])


def test_noise_differs_from_block_to_block() -> None:
    scheduler = RecipeScheduler.of(SURE)
    scheduler.set_timesteps(1, block_length=16)
    masks, flat = torch.full((1, 16), MASK), torch.zeros(1, 16, 96)
    blocks = [
        scheduler.step(flat, 0, masks, mask_token_id=MASK, temperature=1.0, generator=torch.Generator(), return_dict=False)[3]
        for _ in range(2)
    ]
    assert not torch.equal(*blocks)


def test_noise_is_the_generators() -> None:
    pipe = pipeline(scheduler=RecipeScheduler.of(SURE, BLOCK))

    def sample(seed: int) -> Tensor:
        noise = torch.Generator().manual_seed(seed)
        found: Tensor = pipe(**CALL, temperature=1.0, generator=noise).sequences
        return found

    assert torch.equal(sample(3), sample(3))
    assert not torch.equal(sample(3), sample(4))
    assert torch.equal(pipe(**CALL, temperature=1.0, sampling_method="greedy").sequences, pipe(**CALL).sequences)


def test_it_is_saved_and_read(tmp_path: Any) -> None:
    scheduler = RecipeScheduler.of(SURE, BLOCK)
    scheduler.save_pretrained(tmp_path)
    again = RecipeScheduler.from_pretrained(tmp_path)
    assert again.commit == scheduler.commit
    assert again.config.block_length == BLOCK
    assert RecipeScheduler.of(Recipe(blocks=InBlocks(rule=Fixed(size=7)))).config.block_length == 7
    assert RecipeScheduler("credit").commit.score.kind == "credit"
    assert torch.equal(pipeline(scheduler=again)(**CALL).sequences, pipeline(scheduler=scheduler)(**CALL).sequences)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (KEEP | SURE, "sets kv, which a scheduler cannot do"),
        (Recipe(commit=Unmask(rule=Agreed())), "asks a guiding model"),
        (Recipe(blocks=InBlocks(rule=Whole())), "blocks of one size"),
    ],
)
def test_a_recipe_that_is_more_than_a_scheduler(recipe: Recipe, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        RecipeScheduler.of(recipe)


def test_uniform_noise_is_refused() -> None:
    with pytest.raises(RefusedError, match="no mask token"):
        RecipeScheduler.of(SURE).step(torch.zeros(1, 4, 8), 0, torch.zeros(1, 4, dtype=torch.long))
