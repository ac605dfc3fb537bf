"""What `generate` refuses, in words, and before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from hasten.errors import LimitError, RefusedError, UsageError
from hasten.limits import Limits
from hasten.pipelines.text.diffusion import TextDiffusionPipeline
from hasten.recipe import Recipe
from hasten.samplers.commit import Threshold, Unmask
from tests.pipelines.text_pipes import EOS, MASK, PAD, config, model, tokenizer


class Untouched(LlamaForCausalLM):
    """A model that must not be asked."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        pytest.fail("something was computed before the input was refused")


def subject(words: Any = None, limits: Limits | None = None, **about: Any) -> TextDiffusionPipeline:
    return TextDiffusionPipeline(model(cls=Untouched, **about), words or tokenizer(), probe=False, limits=limits)


IDS = [[1, 2, 3], [4, 5]]

WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "Pass one of input_ids, prompts and messages; got none"),
    ({"input_ids": IDS, "prompts": "w1"}, "got input_ids and prompts"),
    ({"prompts": "w1", "attention_mask": torch.ones(1, 1)}, "attention_mask belongs to input_ids"),
    ({"input_ids": []}, "No prompt was given"),
    ({"prompts": []}, "No prompt was given"),
    ({"prompts": [1, 2]}, "prompts are texts"),
    ({"input_ids": "w1"}, "whole numbers in a tensor or lists"),
    ({"input_ids": torch.ones(1, 2)}, "whole numbers of shape"),
    ({"input_ids": torch.ones(1, 2, 3, dtype=torch.long)}, "whole numbers of shape"),
    ({"input_ids": [[1.5, 2.0]]}, "one list of whole numbers"),
    ({"input_ids": [["w1"]]}, "no list of whole numbers"),
    ({"input_ids": IDS, "attention_mask": torch.ones(2, 3)}, "Lists are not padded"),
    ({"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 2)}, "they must agree"),
    ({"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 0, 1]])}, "within the prompt"),
    ({"input_ids": torch.tensor([[PAD, 1], [1, 2]])}, "Pass attention_mask"),
    ({"input_ids": [[1, 96]]}, "token 96, and the model knows 0 to 95"),
    ({"input_ids": [[1, -1]]}, "token -1"),
    ({"input_ids": [[1, MASK, 2]]}, f"mask token {MASK} at place 1"),
    ({"messages": [{"content": "w1"}]}, "must be a list of turns"),
    ({"input_ids": IDS, "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ({"input_ids": IDS, "max_new_tokens": -3}, "must be at least 1, got -3"),
    ({"input_ids": IDS, "max_new_tokens": 2.5}, "max_new_tokens is a whole number"),
    ({"input_ids": IDS, "max_new_tokens": [4]}, "2 texts and 1 numbers"),
    ({"input_ids": IDS, "max_new_tokens": True}, "must be a whole number"),
    ({"input_ids": IDS, "steps": 0}, "steps must be at least 1"),
    ({"input_ids": IDS, "block_length": -4}, "block_length must be at least 1"),
    ({"input_ids": IDS, "threshold": 1.5}, "threshold must be from 0 to 1"),
    ({"input_ids": IDS, "threshold": float("nan")}, "finite number"),
    ({"input_ids": IDS, "temperature": -1.0}, "temperature must be at least 0"),
    ({"input_ids": IDS, "temperature": 1.0, "top_p": 0.0}, "top_p = 0 leaves no token"),
    ({"input_ids": IDS, "top_k": 5}, "temperature is 0"),
    ({"input_ids": IDS, "do_sample": False, "temperature": 0.5}, "contradict each other"),
    ({"input_ids": IDS, "do_sample": True, "temperature": 0.0}, "contradict each other"),
    ({"input_ids": IDS, "remasking": "low_confidense"}, "Did you mean 'low_confidence'"),
    ({"input_ids": IDS, "max_new_token": 5}, "no argument 'max_new_token'. Did you mean 'max_new_tokens'"),
    ({"input_ids": IDS, "num_beams": 5}, "generate has no argument 'num_beams'"),
    ({"input_ids": IDS, "recipe": "no-such"}, "Unknown recipe"),
    ({"input_ids": IDS, "recipe": "balanced"}, "sets reuse"),
    ({"input_ids": IDS, "output_type": "np"}, "output_type must be text or seq"),
    ({"input_ids": IDS, "streamer": object()}, "2 texts and 1 streamers"),
    ({"input_ids": [[1]], "streamer": object()}, "is no streamer"),
    ({"input_ids": IDS, "stopping_criteria": [3]}, "stopping_criteria are callables"),
    ({"input_ids": IDS, "callback_on_step_end": 3}, "must be callable"),
    ({"input_ids": IDS, "callback_on_step_end_tensor_inputs": ["ids"]}, "there is none"),
    ({"input_ids": IDS, "callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["idz"]}, "Did you mean 'ids'"),
    ({"input_ids": IDS, "generator": [torch.Generator()]}, "2 texts and 1 generators"),
    ({"input_ids": IDS, "mask_token_id": 96}, "mask_token_id"),
    ({"input_ids": IDS, "eos_token_id": [EOS, 200]}, "eos_token_id"),
    ({"input_ids": IDS, "threshold": 0.5, "recipe": Recipe(commit=Unmask(rule=Threshold())), "steps": 4}, "steps=4 was given"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG, ids=[said[:30] for _, said in WRONG])
def test_bad_input_is_refused_before_any_compute(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(").replace(".", r"\.")):
        subject().generate(**arguments)


def test_too_long() -> None:
    with pytest.raises(LimitError, match="2 \\+ 63 tokens, and the model has positions for 64"):
        subject().generate([[1, 2]], max_new_tokens=63)
    with pytest.raises(LimitError, match="The prompt alone is longer"):
        subject().generate([[1] * 65], max_new_tokens=1)
    with pytest.raises(LimitError, match="at most 3 are allowed"):
        subject(limits=Limits(max_batch=3)).generate([[1]] * 4, max_new_tokens=1)
    with pytest.raises(LimitError, match="at most 10 are allowed"):
        subject(limits=Limits(max_tokens=10)).generate([[1] * 4], max_new_tokens=7)
    with pytest.raises(LimitError, match="steps may be 5 at most"):
        subject(limits=Limits(max_steps=5)).generate([[1]], steps=6)


def test_prompts_take_a_tokenizer() -> None:
    bare = TextDiffusionPipeline(model(cls=Untouched), probe=False)
    with pytest.raises(UsageError, match="this pipeline has none"):
        bare.generate(prompts="w1")
    silent = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer, mask_token="<mask>")
    with pytest.raises(UsageError, match="no chat template"):
        subject(silent).generate(messages=[{"role": "user", "content": "w1"}])


def test_a_block_causal_model_has_its_own_blocks() -> None:
    with pytest.raises(UsageError, match="trained with blocks of 4"):
        subject(kind="block").generate(IDS, block_length=8)


def test_a_part_without_the_number_is_told() -> None:
    from hasten.samplers.text_blocks import InBlocks, Whole

    whole = Recipe(blocks=InBlocks(rule=Whole()))
    with pytest.raises(UsageError, match="'whole' has no such number"):
        subject().generate(IDS, block_length=8, recipe=whole)


def test_end_tokens_must_be_known() -> None:
    endless = model(cls=Untouched)
    endless.config.eos_token_id = endless.generation_config.eos_token_id = None
    with pytest.raises(UsageError, match="this model has none"):
        TextDiffusionPipeline(endless, probe=False).generate(IDS, eos_penalty=1.0)


def test_guidance_with_a_cache_that_decides_layer_by_layer() -> None:
    from hasten.caching.kv_values import ValueDrift

    with pytest.raises(RefusedError, match="cfg_scale evaluates each text twice"):
        subject().generate(IDS, cfg_scale=1.0, recipe=Recipe(kv=ValueDrift()))


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(UsageError, match="training mode"):
        TextDiffusionPipeline(model().train())
    assert config().mask_token_id == MASK
