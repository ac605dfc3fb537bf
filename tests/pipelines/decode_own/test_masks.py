"""Gated multi-token prediction: the adapter says later tokens in masks, and leaves the model's own word as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from hasten.distill.methods.mtp import SamplerHead
from hasten.distill.text.gate import gated
from hasten.pipelines.decode_own.masks import Masks, adapter
from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Facts
from tests.pipelines.causal_models import build
from tests.pipelines.decode_own.own_contract import WIDTH, greedy_is_the_same, restores, sampled_is_lossless

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")
MASK = 2


def host(**more: Any) -> Any:
    model = build("llama", mask_token_id=MASK, **more).requires_grad_(False)
    return model


def student(folder: Path, vocabulary: int = 97) -> Path:
    """A random adapter as peft writes it, and a random sampler head."""
    torch.manual_seed(0)
    wrapped = get_peft_model(host(vocab_size=vocabulary), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    wrapped.save_pretrained(folder)
    head = SamplerHead(WIDTH)
    torch.nn.init.normal_(head.last.weight, std=0.1)
    save_file({name: each.detach().clone() for name, each in head.state_dict().items()}, folder / "sampler.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student(tmp_path_factory.mktemp("mtp"))


def test_greedy_texts_are_the_same(folder: Path) -> None:
    model, part = host(), Masks(path=str(folder), nodes=12, drafts=3)
    greedy_is_the_same(model, part)
    restores(model, part)


def test_sampled_texts_follow_the_models_law(tmp_path: Path) -> None:
    few = host(vocab_size=14)
    assert sampled_is_lossless(few, Masks(path=str(student(tmp_path, 14))), tokens=4) > 0


def test_masks_say_what_they_said_in_training(folder: Path) -> None:
    """States of masks under our hooks are those under the training's own gate, and text nodes are the model's bit for bit."""
    model, part = host(), Masks(path=str(folder))
    ids = torch.tensor([[5, 9, 7, 11, MASK, MASK]])
    inner = get_peft_model(host(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for module, down, up in adapter(part, inner.get_base_model()):
            module.lora_A["default"].weight.copy_(down)
            module.lora_B["default"].weight.copy_(up / 2)  # peft multiplies with alpha / r itself
        with gated(inner.get_base_model(), "default", MASK):
            wanted = inner.get_base_model()(input_ids=ids).logits
        facts = Facts(1, 97, ids.device, False, lambda logits, *_: logits, host=model)
        asked = ids == MASK
        proposal = Proposal(ids, torch.arange(6)[None] - 1, torch.ones_like(asked), prompt=asked)
        with part.start(facts).reading(proposal):
            found = model(input_ids=ids).logits
        plain = model(input_ids=ids[:, :4]).logits
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found[:, :4], plain)
    assert not torch.allclose(found[:, 4:], model(input_ids=ids).logits[:, 4:], atol=1e-3)


def test_scale_is_that_of_the_config(folder: Path) -> None:
    says = json.loads((folder / "adapter_config.json").read_text())
    assert says["lora_alpha"] / says["r"] == 2
    assert len(adapter(Masks(path=str(folder)), host())) == 6
