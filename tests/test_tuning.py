"""Presets are tuned on other prompts and seeds than those they are measured on."""

import pytest

from benchmarks.tune_presets import TUNING
from hasten.cli.bench import own_prompts


@pytest.mark.parametrize("model", sorted(TUNING))
def test_tuning_prompts_and_seeds_are_not_test_prompts(model: str) -> None:
    tested = set(own_prompts(model == "tiny-video"))
    assert not tested & {sample.prompt for sample in TUNING[model]}
    assert min(sample.seed for sample in TUNING[model]) >= 100, "the bench counts its seeds from 0"
