"""Self-speculation: the model with less to do drafts, the whole of it verifies, and the scratch leaves no trace."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hasten.drift import Drift
from hasten.errors import UsageError
from hasten.pipelines.decode_own.own_model import OwnModel
from hasten.samplers.drafters_own.skip import ByPlace, FeedForward, Layers, Routers
from hasten.sparse_attn.text.causal import CausalAttention
from hasten.sparse_attn.text.reader import Recent
from tests.pipelines.causal_models import build
from tests.pipelines.decode_own.own_contract import (
    WIDTH,
    drafted,
    greedy_is_the_same,
    prompts,
    restores,
    sampled_is_lossless,
)

pytestmark = pytest.mark.filterwarnings("ignore:hasten:UserWarning")

WAYS = {
    "exit": OwnModel(skip=Layers(first=2)), "some": OwnModel(skip=Layers(keep=(0, 2)), sure=0.3),
    "by-place": OwnModel(skip=ByPlace(length=30)),
    "ffn": OwnModel(skip=FeedForward(rule=Drift(limit=0.5, accumulate=False, max_skips=1, warmup=0, tail=0))),
    "window": OwnModel(attention=CausalAttention(cache=Recent(window=6), min_tokens=0)),
    "both": OwnModel(skip=Layers(first=2), attention=CausalAttention(cache=Recent(window=6), min_tokens=0)),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama").requires_grad_(False)


@pytest.mark.parametrize("name", WAYS)
def test_greedy_texts_are_the_same(model: Any, name: str) -> None:
    report = greedy_is_the_same(model, WAYS[name])
    assert report.exactness.startswith("exact")
    restores(model, WAYS[name])


@pytest.mark.parametrize("name", ["qwen2-mixed", "mistral-window"])
def test_layers_keep_their_masks(name: str) -> None:
    """A layer left out does not shift which of the others have windows."""
    host = build(name).requires_grad_(False)
    greedy_is_the_same(host, WAYS["some"])


@pytest.mark.parametrize("name", ["exit", "window"])
def test_sampled_texts_follow_the_models_law(model: Any, name: str) -> None:
    assert sampled_is_lossless(model, WAYS[name]) > 0.1


def test_whole_model_drafts_what_it_writes(model: Any) -> None:
    """With nothing left out every draft stands: positions, masks and the taking back are those of decoding."""
    whole = OwnModel(skip=Layers(keep=(0, 1, 2)), nodes=3)
    for rows in (1, 3):
        _, report = drafted(model, whole, prompts(rows), max_new_tokens=25, do_sample=False)
        assert report.tokens_per_forward == 4


def test_routers_decide_by_the_prompt(model: Any, tmp_path: Path) -> None:
    weight = torch.zeros(2, WIDTH)
    save_file({"weight": weight, "bias": torch.tensor([1.0, -1.0])}, tmp_path / "routers.safetensors")
    routed = Routers(path=str(tmp_path))
    state = routed.start(3)
    state.prompt({name: torch.randn(2, 5, WIDTH) for name in routed.needs}, torch.ones(2, 5, dtype=torch.long))
    assert state.runs(9) == [True, True, False]
    greedy_is_the_same(model, OwnModel(skip=routed))
    with pytest.raises(UsageError, match="3 layers, and this one has 4"):
        routed.start(4)


def test_places_run_nested_sets_of_layers() -> None:
    runs = [ByPlace(most=0.9, fewest=0.3, length=40, warm=2).start(10).runs(place) for place in range(60)]
    assert sum(runs[0]) == 9 and sum(runs[-1]) == 3 and all(run[:2] == [True, True] for run in runs)
    assert all(not later or earlier for one, two in itertools.pairwise(runs) for earlier, later in zip(one, two, strict=True))


def test_blocks_left_out_follow_the_gate() -> None:
    state = FeedForward(rule=Drift(limit=0.1, accumulate=False, max_skips=2, warmup=0.2, tail=0.2)).start(10)
    x = torch.ones(1, 1, 4)
    left = []
    for layer in range(10):
        left.append(state.skips_ffn(layer))
        if not left[-1]:
            state.saw_ffn(layer, x, x)
    assert left == [False, False, True, True, False, True, True, False, False, False]


def test_refused() -> None:
    with pytest.raises(ValueError, match="skip, attention or both"):
        OwnModel()
    with pytest.raises(UsageError, match="model of 3 layers"):
        Layers(keep=(1, 2)).start(3)
