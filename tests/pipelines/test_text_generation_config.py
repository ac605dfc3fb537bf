"""`generation_config=`: its fields act as arguments, arguments win, the model's own comes last, and nothing is left out in
silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)

from hasten.errors import UsageError
from hasten.pipelines.text import generation_config as configs
from hasten.pipelines.text.diffusion import TextDiffusionPipeline
from hasten.pipelines.text.gemma_pipeline import DiffusionGemmaPipeline
from hasten.pipelines.text_models.gemma import Denoising
from hasten.recipe import Recipe
from hasten.samplers.commit import Threshold, Unmask
from hasten.samplers.commit_sure import EntropyBound
from tests.pipelines.text_pipes import EOS, PAD, model, pipe, tokenizer
from tests.text_hosts import FAMILIES
from tests.text_hosts.diffusion_gemma import CANVAS

IDS = [[5, 6, 7], [8, 9, 10, 11, 12]]


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(
    "said",
    [
        {"max_new_tokens": 6, "do_sample": True, "temperature": 0.7, "top_k": 5},
        {"max_new_tokens": 6, "temperature": 1.3, "top_p": 0.8},
        {"max_new_tokens": 7, "min_new_tokens": 7, "eos_token_id": [EOS, 3], "pad_token_id": 2},
    ],
)
def test_fields_are_arguments(said: dict[str, Any]) -> None:
    right = pipe().generate(IDS, generator=noise(), **said)
    for config in (said, GenerationConfig(**said), said | {"num_beams": 1, "use_cache": True, "top_h": None}):
        found = pipe().generate(IDS, generator=noise(), generation_config=config)
        assert torch.equal(found.sequences, right.sequences)


def test_other_names_and_the_form_of_the_result() -> None:
    said = {"gen_length": 6, "num_inference_steps": 2, "block_size": 8, "return_dict_in_generate": False}
    found = pipe().generate(IDS, generation_config=said)
    assert torch.equal(found, pipe().generate(IDS, max_new_tokens=6, steps=2, block_length=8).sequences)  # type: ignore[arg-type]
    assert pipe().generate(IDS, generation_config=said, return_dict_in_generate=True).lengths.tolist() == [6, 6]


def test_arguments_win() -> None:
    said = GenerationConfig(max_new_tokens=9, do_sample=True, temperature=2.0, top_k=3)
    greedy = pipe().generate(IDS, max_new_tokens=4)
    for plain in ({"temperature": 0.0}, {"do_sample": False}):
        found = pipe().generate(IDS, max_new_tokens=4, generation_config=said, **plain)
        assert torch.equal(found.sequences, greedy.sequences)
    drawn = pipe().generate(IDS, max_new_tokens=4, temperature=1.5, generator=noise())
    calm = {"do_sample": False, "temperature": None}
    found = pipe().generate(IDS, max_new_tokens=4, temperature=1.5, generator=noise(), generation_config=calm)
    assert torch.equal(found.sequences, drawn.sequences)


def test_what_cannot_be_done_is_named() -> None:
    for said, message in (
        ({"num_beams": 4, "repetition_penalty": 1.2}, r"num_beams = 4; repetition_penalty = 1\.2"),
        ({"max_length": 20}, "take max_new_tokens"),
        ({"temprature": 0.5}, "Did you mean 'temperature'"),
        ({"do_sample": False, "temperature": 0.5}, "contradict"),
        ({"gen_length": 3, "max_new_tokens": 4}, "both were given"),
        ({"top_k": 4}, "the temperature is 0"),
        ({"eos_token_id": 96}, "eos_token_id"),
    ):
        with pytest.raises(UsageError, match=message):
            pipe().generate(IDS, generation_config=said)
    with pytest.raises(UsageError, match="dictionary, got str"):
        pipe().generate(IDS, generation_config="config.json")


def test_the_model_has_the_last_word() -> None:
    own = model()
    own.generation_config = GenerationConfig(do_sample=True, temperature=0.8, top_k=7, eos_token_id=[EOS, 4], pad_token_id=3)
    own.config.pad_token_id = None
    made = TextDiffusionPipeline(own, probe=False)
    assert made.host.facts.eos_ids == (EOS, 4) and made.host.facts.pad_id == 3
    found = made.generate(IDS, max_new_tokens=5, generator=noise())
    right = made.generate(IDS, max_new_tokens=5, generator=noise(), do_sample=True, temperature=0.8, top_k=7)
    assert torch.equal(found.sequences, right.sequences)
    assert "generation_config.json says so" in str(found.report) and "temperature = 0.8" in str(found.report)
    assert "generation_config.json" not in str(right.report)
    calm = made.generate(IDS, max_new_tokens=5, temperature=0.0)
    assert torch.equal(calm.sequences, made.generate(IDS, max_new_tokens=5, generation_config={"do_sample": False}).sequences)
    assert "generation_config.json" not in str(calm.report)


def test_a_temperature_without_do_sample_is_none() -> None:
    own = model()
    own.generation_config.temperature = 0.6
    assert configs.of_model(own) == {} and configs.of_model(object()) == {}


def test_nothing_said_is_nothing() -> None:
    for config in (None, {}, GenerationConfig(), model().generation_config):
        assert not set(configs.settings(config, ("max_new_tokens", "eos_token_id", "pad_token_id"))) - {"eos_token_id", "pad_token_id"}
    assert PAD != EOS


# --- DiffusionGemma --------------------------------------------------------------------------------


def gemma(recipe: Recipe | None = None, **said: Any) -> DiffusionGemmaPipeline:
    own = FAMILIES["diffusion-gemma"](1).model
    for name, value in said.items():
        setattr(own.generation_config, name, value)
    return DiffusionGemmaPipeline(own, tokenizer(), recipe)


SAID = {
    "max_denoising_steps": 3, "t_min": 0.3, "t_max": 0.9, "stability_threshold": 2, "confidence_threshold": 0.5,
    "sampler_config": EntropyBoundSamplerConfig(entropy_bound=2.0),
}  # fmt: skip
MEANT = Denoising(steps=3, cold=0.3, hot=0.9, stable=2, confident=0.5, bound=2.0)


def test_gemma_by_its_own_generation_config() -> None:
    assert gemma().denoising == Denoising()
    made = gemma(**SAID)
    assert made.denoising == MEANT
    given = {"input_ids": IDS, "max_new_tokens": CANVAS, "generator": noise()}
    found = made.generate(**given)
    config = DiffusionGemmaGenerationConfig(**SAID, max_new_tokens=CANVAS, eos_token_id=94, pad_token_id=93)
    for said in (config, SAID | {"max_new_tokens": CANVAS}):
        told = gemma().generate(IDS, generator=noise(), generation_config=said)
        assert torch.equal(found.sequences, told.sequences)
    rule = Recipe(commit=Unmask(rule=EntropyBound(bound=2.0)))
    direct = DiffusionGemmaPipeline(made.model, None, rule, denoising=Denoising(3, 0.9, 0.3, 2, 0.5))
    assert torch.equal(found.sequences, direct.generate(**(given | {"generator": noise()})).sequences)
    few = gemma(**SAID).generate(IDS, max_new_tokens=CANVAS, steps=1, generator=noise())
    assert few.nfe.tolist() == [1, 1]


def test_gemma_says_what_contradicts() -> None:
    rule = Recipe(commit=Unmask(rule=Threshold(above=0.5)))
    said = {"sampler_config": SAID["sampler_config"], "max_new_tokens": CANVAS, "max_denoising_steps": 2}
    with pytest.raises(UsageError, match="both say which slots are accepted"):
        gemma(rule).generate(IDS, generation_config=said)
    won = gemma().generate(IDS, generation_config=said, recipe=rule, generator=noise())
    right = gemma().generate(IDS, max_new_tokens=CANVAS, steps=2, recipe=rule, generator=noise())
    assert torch.equal(won.sequences, right.sequences)
    for wrong, message in (
        ({"sampler_config": 3}, "EntropyBoundSamplerConfig"),
        ({"temperature": 0.5}, "temperature = 0.5"),
        ({"t_min": -1.0}, "temperatures above 0"),
    ):
        with pytest.raises(UsageError, match=message):
            gemma().generate(IDS, generation_config=wrong)


def test_gemma_ends_where_it_is_told_to() -> None:
    free = gemma().generate(IDS, max_new_tokens=CANVAS, steps=2, generator=noise())
    token = int(free.sequences[0, 5 + 2])
    cut = gemma().generate(IDS, max_new_tokens=CANVAS, steps=2, eos_token_id=token, pad_token_id=7, generator=noise())
    assert int(cut.lengths[0]) <= 3 and int(cut.sequences[0, 5 + int(cut.lengths[0]) - 1]) == token
    assert int(cut.lengths.max()) == int(cut.lengths[0]) or int(cut.sequences[0, -1]) == 7
