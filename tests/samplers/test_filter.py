"""Trained commit rules: what they see, how their files are read, and that both forms do what their weights say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hasten.canvas import DONE
from hasten.errors import UsageError
from hasten.samplers.commit import CommitRule
from hasten.samplers.filter import (
    FIRST_INPUTS,
    INPUTS,
    FilterNet,
    Form,
    Learned,
    LearnedBlock,
    confidences,
    features,
    load,
    neighbours,
)
from tests.contract_text import filter_file
from tests.text_models import open_canvas, picked, scripted


def written(tmp_path: Path, form: Form, stored: dict[str, Tensor], above: float = 0.5) -> str:
    path = tmp_path / "filter.safetensors"
    save_file(stored, path, {"filter": form, "above": str(above)})
    return str(path)


def test_what_a_filter_sees() -> None:
    canvas = open_canvas([2], [6], [(2, 6)])
    canvas.status[0, 3] = DONE
    scores = scripted(canvas, [[0.5, 0.75, 1.0]], second=[[0.25, 0.25, 0.0]])
    seen = features(scores, canvas)[0]
    expected = [
        [0] * 6, [0] * 6,  # the prompt
        [0.5, 0.25, 0.5, 1, 0.25, 0.75], [0, 0, 0, 0, 0.5, 0.75], [0.75, 0.5, 0.25, 1, 0.75, 0.75], [1, 1, 0, 1, 1, 0.75],
        [0] * 6, [0] * 6,  # open, but not in this block
    ]  # fmt: skip
    torch.testing.assert_close(seen, torch.tensor(expected, dtype=torch.float32))


def test_neighbours_stand_in_order() -> None:
    given = torch.arange(1.0, 7).view(1, 3, 2)
    around = neighbours(given)[0].view(3, 2, 5)
    assert around[0].tolist() == [[0, 0, 1, 3, 5], [0, 0, 2, 4, 6]]
    assert around[2].tolist() == [[1, 3, 5, 0, 0], [2, 4, 6, 0, 0]]


def test_confidences_of_a_short_block() -> None:
    canvas = open_canvas([2, 1], [6, 3], [(2, 5), (1, 4)])
    scores = scripted(canvas, [[0.5, 0.25, 0.125], [0.75, 0.5, 0.25]])
    assert confidences(scores, canvas, 4).tolist() == [[0.5, 0.25, 0.125, 0], [0.75, 0.5, 0.25, 0]]


def threshold_weights(at: float, seen: int = FIRST_INPUTS) -> dict[str, Tensor]:
    """A filter of the form "slots" whose logit is 100 (c - at)."""
    net = FilterNet("slots", 1, seen=seen)
    state = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    state["first.weight"][0, 2] = 100.0  # confidence of the slot itself: feature 0, the middle of five
    state["first.bias"][:] = 0.0
    state["second.weight"][:] = 1.0
    state["second.bias"][:] = -100.0 * at
    return state


@pytest.mark.parametrize("seen", [FIRST_INPUTS, INPUTS])
def test_a_filter_that_is_a_threshold(seen: int, tmp_path: Path) -> None:
    """Filters that were trained before there was a sixth input go on as they were."""
    rule = Learned(weights=written(tmp_path, "slots", threshold_weights(0.6, seen)))
    canvas = open_canvas([2, 1], [4, 3])
    scores = scripted(canvas, [[0.5, 0.7, 0.65, 0.1], [0.9, 0.2, 0.61]])
    assert picked(canvas, rule.start().select(scores, canvas)) == [[1, 2], [0, 2]]


def test_the_caller_s_threshold_goes_before_the_file_s(tmp_path: Path) -> None:
    path = written(tmp_path, "slots", threshold_weights(0.6), above=0.999999)
    canvas = open_canvas([2], [2])
    scores = scripted(canvas, [[0.65, 0.7]])
    assert picked(canvas, Learned(weights=path).start().select(scores, canvas)) == [[]]
    assert picked(canvas, Learned(weights=path, above=0.5).start().select(scores, canvas)) == [[0, 1]]


def test_learn2pd_s_filter_sees_the_block_and_nothing_else(tmp_path: Path) -> None:
    """Identity weights of a block of 4: slot i passes when the confidence at i does, written slots do not come out."""
    stored = {
        "first.weight": 100 * torch.eye(4), "first.bias": torch.zeros(4),
        "second.weight": torch.eye(4), "second.bias": torch.full((4,), -60.0),
    }  # fmt: skip
    rule = LearnedBlock(weights=written(tmp_path, "block", stored))
    canvas = open_canvas([2, 3], [6, 3], [(2, 6), (3, 6)])
    canvas.status[0, 4] = DONE
    scores = scripted(canvas, [[0.7, 0.5, 0.8], [0.1, 0.9, 0.65]])
    scores.seen[0, 4], scores.confidence[0, 4] = True, 0.99
    chosen = rule.start().select(scores, canvas)
    assert chosen[0].nonzero()[:, 0].tolist() == [2, 5] and chosen[1].nonzero()[:, 0].tolist() == [4, 5]


def test_a_block_longer_than_the_filter_is_not_guessed_at(tmp_path: Path) -> None:
    stored = {
        "first.weight": torch.zeros(2, 2), "first.bias": torch.ones(2),
        "second.weight": torch.ones(2, 2), "second.bias": torch.ones(2),
    }  # fmt: skip
    canvas = open_canvas([1], [5])
    rule = LearnedBlock(weights=written(tmp_path, "block", stored))
    assert picked(canvas, rule.start().select(scripted(canvas, [[0.9] * 5]), canvas)) == [[0, 1]]


class TestFiles:
    def test_a_missing_one(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"Cannot read the filter .*nowhere.*hasten train filter"):
            Learned(weights=str(tmp_path / "nowhere.safetensors")).start()

    def test_something_else(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(b"no tensors here, just words, and quite a few of them")
        with pytest.raises(UsageError, match="Cannot read the filter"):
            load(path, "slots")

    @pytest.mark.parametrize(("rule", "form"), [(Learned, "block"), (LearnedBlock, "slots")])
    def test_the_other_form(self, rule: type[CommitRule], form: Form) -> None:
        with pytest.raises(UsageError, match=f"of the form '{form}'"):
            rule.model_validate({"weights": filter_file(form)}).start()

    def test_weights_that_are_no_filter(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_file({"w": torch.zeros(2)}, path)
        with pytest.raises(UsageError, match="of the form 'none'"):
            load(path, "slots")

    def test_a_damaged_one(self, tmp_path: Path) -> None:
        stored = threshold_weights(0.5)
        del stored["second.bias"]
        with pytest.raises(UsageError, match="damaged"):
            load(written(tmp_path, "slots", stored), "slots")
