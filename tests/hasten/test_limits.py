from __future__ import annotations

from typing import Any

import pytest

from hasten.errors import LimitError, UsageError
from hasten.limits import Limits


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"prompts": []}, "No prompt"),
        ({"prompts": ["a", " \n"]}, "Prompt 2 is empty"),
        ({"prompts": ["x" * 4001]}, "4001 characters"),
        ({"prompts": ["a"] * 1025}, "1025 prompts"),
        ({"height": 0}, "height must lie"),
        ({"width": 8193}, "8,193"),
        ({"height": 64.0}, "whole number"),
        ({"height": True}, "whole number"),
        ({"num_frames": -1}, "num_frames"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "1,001"),
        ({"height": 8192, "width": 8192, "num_frames": 100}, "pixels; at most"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"guidance_scale": float("-inf")}, "finite"),
    ],
)
def test_broken_limit_is_named(request_: dict[str, Any], said: str) -> None:
    with pytest.raises(LimitError, match=said) as caught:
        Limits().check(**request_)
    assert isinstance(caught.value, UsageError) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"prompts": ["a"], "height": 1, "width": 1, "num_frames": 1, "num_inference_steps": 1, "guidance_scale": 0.0},
        {"prompts": ["x" * 4000] * 1024, "height": 8192, "width": 8192, "num_inference_steps": 1000},
        {"height": 2160, "width": 3840, "num_frames": 129, "guidance_scale": -2.0},
    ],
)
def test_the_bounds_themselves_are_allowed(request_: dict[str, Any]) -> None:
    Limits().check(**request_)


def test_own_limits() -> None:
    with pytest.raises(LimitError):
        Limits(max_side=100).check(height=101)
    Limits(max_side=100).check(height=100)
