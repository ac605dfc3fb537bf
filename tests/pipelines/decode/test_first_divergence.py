"""Where drafted texts leave plain ones: nowhere, at a tie, or at a mistake."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import hasten
from hasten.errors import UsageError
from hasten.recipe import Recipe
from hasten.samplers.decode.pace import Steady
from hasten.samplers.decode.proposal import Proposal
from hasten.samplers.decode.protocols import Facts, Target, Verdict, Verifier, VerifierState
from hasten.samplers.decode.verify_match import longest
from hasten.samplers.drafters.look_up import LookUp
from hasten.testing import Divergence, first_divergence
from tests.pipelines.causal_models import build

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")

ALWAYS = Recipe(draft=LookUp(nodes=9), pace=Steady())


def prompts(seed: int) -> dict[str, Tensor]:
    """Two texts that repeat themselves, one of them padded."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(2, 97, (8,), generator=rng).repeat(3) for _ in range(2)])
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


class Trusting(Verifier):
    """The mistake made again: a draft among the model's three best tokens is taken for its best one."""

    kind: ClassVar[str] = "test-trusting"

    def start(self, facts: Facts) -> VerifierState:
        return _TrustingState()


class _TrustingState(VerifierState):
    def verify(self, proposal: Proposal, target: Target) -> Verdict:
        likely = target.law().topk(3, -1).indices
        above = likely.gather(1, proposal.parent.clamp(min=0)[..., None].expand(-1, -1, 3))
        return longest(proposal, proposal.verified & (above == proposal.tokens[..., None]).any(-1), target.best())


def test_equal_texts_diverge_nowhere() -> None:
    model = build("llama").requires_grad_(False)
    assert first_divergence(model, prompts(0), ALWAYS, max_new_tokens=24) == [None, None]


def test_a_mistake_is_found_and_no_rounding_explains_it() -> None:
    model = build("llama").requires_grad_(False)
    inputs = prompts(0)
    recipe = Recipe(draft=LookUp(nodes=9), verify=Trusting(), pace=Steady())
    found = [each for each in first_divergence(model, inputs, recipe, max_new_tokens=40) if each is not None]
    plain = model.generate(**inputs, max_new_tokens=40, do_sample=False)[:, 24:]
    with hasten.accelerate(model, recipe):
        drafted = model.generate(**inputs, max_new_tokens=40, do_sample=False)[:, 24:]
    assert found
    for each in found:
        assert int((plain[each.row] != drafted[each.row]).long().argmax()) == each.at
        assert (each.plain, each.drafted) == (int(plain[each.row, each.at]), int(drafted[each.row, each.at]))
        assert each.lead > 1000 * each.rounding and not each.tied
        assert "look for a mistake" in str(each)


def test_two_equal_tokens_are_a_tie() -> None:
    """In bfloat16 two logits are often the same number, or one rounding apart."""
    model: Any = build("llama").requires_grad_(False).to(torch.bfloat16)
    found: list[Divergence] = []
    for seed in range(40):
        found += [each for each in first_divergence(model, prompts(seed), ALWAYS, max_new_tokens=48) if each is not None]
        if len(found) > 2:
            break
    assert found, "no text of 80 met a tie"
    for each in found:
        assert 0 <= each.lead <= 0.1 and each.tied and each.drafted_lead is not None and each.drafted_lead <= 0.1
        assert "a tie" in str(each)


def test_what_cannot_be_compared_is_refused() -> None:
    model = build("llama").requires_grad_(False)
    with pytest.raises(UsageError, match="do_sample=True"):
        first_divergence(model, prompts(0), ALWAYS, do_sample=True)
    with pytest.raises(UsageError, match="Nothing was drafted"):
        first_divergence(model, prompts(0), ALWAYS, max_new_tokens=4, use_cache=False)
