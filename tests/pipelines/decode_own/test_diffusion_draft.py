"""A text diffusion model drafts for a causal one with the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hasten
from hasten.errors import RefusedError
from hasten.pipelines import tiny_models
from hasten.pipelines.decode_own.diffusion_draft import DiffusionDraft
from tests.pipelines.causal_models import build
from tests.pipelines.decode_own.own_contract import drafted, prompts

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")


def test_greedy_texts_are_the_same_and_drafts_are_right() -> None:
    pipe = tiny_models.load("tiny-lm")
    model: Any = pipe.model.requires_grad_(False)
    pipe.tokenizer.padding_side = "left"
    texts = ["import os\n\n\ndef read(path):\n    with open(path) as", "for name in names:\n    print("]
    inputs = dict(pipe.tokenizer(texts, return_tensors="pt", padding=True))
    inputs.pop("token_type_ids", None)
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    text, report = drafted(model, DiffusionDraft(), inputs, max_new_tokens=24, do_sample=False)
    assert torch.equal(plain, text) and report.tokens_per_forward > 1.2


def test_other_tokens_are_refused() -> None:
    model: Any = build("llama").requires_grad_(False)
    with hasten.accelerate(model, hasten.Recipe(draft=DiffusionDraft())), pytest.raises(RefusedError, match="another tokenizer"):
        model.generate(**prompts(1), max_new_tokens=6)
