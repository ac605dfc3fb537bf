"""Three tiers with the right residual; and layers left out for good, which has to be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hasten.drift import Drift
from hasten.errors import RecipeError
from hasten.pipelines.decode_own.alone import Alone
from hasten.pipelines.decode_own.cascade import Cascade
from hasten.pipelines.decode_own.own_model import OwnModel
from hasten.samplers.drafters.look_up import LookUp
from hasten.samplers.drafters_own.medusa import Medusa
from hasten.samplers.drafters_own.skip import ByPlace, FeedForward, Layers, Routers, Skip
from tests.pipelines.causal_models import build
from tests.pipelines.decode_own.own_contract import (
    WIDTH,
    greedy_is_the_same,
    prompts,
    restores,
    sampled_is_lossless,
)

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")

TIERS = Cascade(first=LookUp(nodes=5, width=1), middle=OwnModel(skip=Layers(first=2)))


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama").requires_grad_(False)


def test_greedy_texts_of_three_tiers(model: Any) -> None:
    greedy_is_the_same(model, TIERS)
    restores(model, TIERS)


def test_sampled_texts_of_three_tiers() -> None:
    few = build("llama", vocab_size=14).requires_grad_(False)
    assert sampled_is_lossless(few, TIERS, tokens=4) > 0.1


def test_first_tier_goes_by_text() -> None:
    with pytest.raises(ValueError, match="look-up with width=1"):
        Cascade(first=LookUp(width=2), middle=TIERS.middle)
    with pytest.raises(ValueError, match="look-up with width=1"):
        Cascade(first=Medusa(path="x"), middle=TIERS.middle)


def test_alone_has_to_be_asked_for(model: Any) -> None:
    with pytest.raises(RecipeError, match="allow_lossy"):
        Alone(model, ByPlace())


def written(model: Any, skip: Skip | None, rows: int = 2) -> tuple[Tensor, float]:
    if skip is None:
        return model.generate(**prompts(rows), max_new_tokens=20, do_sample=False), 1.0
    before = {name: set(vars(each)) for name, each in model.named_modules()}
    with Alone(model, skip, allow_lossy=True) as run:
        text = model.generate(**prompts(rows), max_new_tokens=20, do_sample=False)
    assert before == {name: set(vars(each)) for name, each in model.named_modules()}
    return text, run.share


def test_alone_leaves_out_what_it_says(model: Any, tmp_path: Path) -> None:
    plain, _ = written(model, None)
    whole, share = written(model, Layers(keep=(0, 1, 2)))
    assert torch.equal(plain, whole) and share == 1.0
    some, share = written(model, Layers(first=2))
    assert not torch.equal(plain, some) and share == pytest.approx(2 / 3)
    assert 0.3 < written(model, ByPlace(most=1.0, fewest=0.3, length=40))[1] < 1.0
    assert written(model, FeedForward(rule=Drift(limit=2.1, accumulate=False, max_skips=1, warmup=0, tail=0)))[1] < 1.0
    save_file({"weight": torch.zeros(2, WIDTH), "bias": torch.tensor([1.0, -1.0])}, tmp_path / "routers.safetensors")
    routed, share = written(model, Routers(path=str(tmp_path)))
    assert share == pytest.approx(2 / 3) and torch.equal(routed, some)
