"""Whatever is sent is a valid request or one clear error; nothing else ever comes out of reading it."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten import limits as core
from hasten.errors import LimitError
from hasten.ui.engine import (
    Compare,
    Generate,
    Limits,
    Request,
    RequestError,
    Text,
    Train,
    Tune,
    read,
    to_json,
)
from hasten.ui.engine.request import KINDS

PICTURE = {"kind": "generate", "model": "tiny-video", "prompt": "a seven"}
WHOLE = [
    PICTURE, PICTURE | {"recipe": "auto:psnr=35", "steps": 20, "guidance": 2, "width": 64, "height": 32, "frames": 17, "seed": 2**60},
    {"kind": "compare", "model": "folder:wan/1.3b", "prompt": "a cat", "recipes": ["balanced", "fast"]},
    {"kind": "text", "model": "tiny-dllm", "prompt": "sort: a b =", "length": 16},
    {"kind": "decode", "model": "folder:llm", "prompt": "a", "recipe": "dyspec:nodes=5", "length": 20, "temperature": 0.7, "top_k": 9},
    {"kind": "tune", "model": "tiny-image", "prompts": ["a", "b", "c", "d"], "budget": "psnr>=35", "seconds": 60.0},
    {"kind": "train", "method": "pairs", "model": "tiny-flux", "settings": {"train.steps": 10, "method.calls": 4, "student.full": True}},
    {"kind": "download", "model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"},
]  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4), max_leaves=12,
)  # fmt: skip
keys = st.sampled_from(sorted({name for kind in KINDS.values() for name in kind.model_fields}) + ["path", "output"])
words = st.sampled_from(["tiny-video", "a seven", "balanced", "psnr>=30", "generate", "train", "plain\n", "../../etc/passwd", "kind: a", "{}"])
almost = st.builds(
    lambda start, more: {**start, **more}, st.sampled_from(WHOLE), st.dictionaries(keys, json_values | words, max_size=3)
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(json_values | almost | st.binary(max_size=40) | st.text(max_size=40))
def test_any_json_is_a_request_or_a_clear_error(data: Any) -> None:
    try:
        found = read(data)
    except RequestError as error:
        assert isinstance(error, LimitError) and str(error).endswith((".", "?", "!", "'", ")")) and len(str(error)) < 5000
        assert error.what and error.allowed and error.next_step
    else:
        assert isinstance(found, get_args(Request)) and read(to_json(found)) == found


@pytest.mark.parametrize("whole", WHOLE, ids=lambda each: each["kind"])
def test_whole_requests_are_read_from_every_form(whole: dict[str, Any]) -> None:
    found = read(whole)
    assert found == read(json.dumps(whole)) == read(json.dumps(whole).encode()) == read(found)
    assert found.kind == whole["kind"] and type(found) is KINDS[whole["kind"]]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"kind": "paint"}, "kind"), ({"prompt": "x" * 5000}, "prompt"), ({"prompt": "  "}, "prompt"), ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"), ({"seed": "1"}, "seed"), ({"seed": True}, "seed"), ({"steps": 0}, "steps"), ({"steps": 201}, "steps"),
    ({"width": 4}, "width"), ({"width": 100_000}, "width"), ({"frames": 10**9}, "frames"), ({"guidance": float("nan")}, "guidance"),
    ({"guidance": float("inf")}, "guidance"), ({"guidance": 1e30}, "guidance"), ({"path": "/etc/passwd"}, "path"), ({"promt": "a"}, "promt"),
    ({"model": "../x"}, "model"), ({"model": "/etc"}, "model"), ({"model": "a/../b"}, "model"), ({"model": "folder:../x"}, "model"),
    ({"model": "a/b/c"}, "model"), ({"model": "x\x00"}, "model"), ({"lora": "../x"}, "lora"), ({"lora": "a/b"}, "lora"),
    ({"recipe": "/tmp/recipe.yaml"}, "recipe"), ({"recipe": "recipe.yaml"}, "recipe"), ({"recipe": "balancd"}, "recipe"), ({"recipe": ""}, "recipe"),
    ({"recipe": "adapter:\n  path: /etc/x.safetensors\n"}, "recipe"), ({"recipe": "a: &a [1]\nb: *a\n"}, "recipe"),
    ({"recipe": "x: " + "[" * 40}, "recipe"), ({"recipe": "!!python/object:os.system x: y"}, "recipe"), ({"prompt": None}, "prompt"),
    ({"width": 4096, "height": 4096, "frames": 1000}, "width x height x frames"), ({"preview": 1}, "preview"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "field"), WRONG)
def test_the_first_wrong_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(PICTURE | change)
    assert caught.value.what == field


def test_nearest_name_is_offered() -> None:
    with pytest.raises(RequestError, match="Did you mean 'prompt'"):
        read(PICTURE | {"promt": "a"})
    with pytest.raises(RequestError, match="balanced"):
        read(PICTURE | {"recipe": "balancd"})


def test_paths_are_in_no_field_of_any_kind() -> None:
    names = {name for kind in KINDS.values() for name in kind.model_fields}
    assert not [name for name in names if any(part in name for part in ("path", "file", "folder", "dir", "output"))]


def test_comparisons_name_each_recipe_once() -> None:
    compared = {"kind": "compare", "model": "tiny-video", "prompt": "a"}
    for recipes in (["balanced", "balanced"], ["plain"], [], ["balanced"] * 9):
        with pytest.raises(RequestError):
            read(compared | {"recipes": recipes})
    found = read(compared | {"recipes": ["fast", "easycache:limit=0.1"]})
    assert isinstance(found, Compare) and len(found.recipes) == 2


@pytest.mark.parametrize(("settings", "field"), [
    ({"data.folder": "/etc"}, "data.folder"), ({"student.start": "/x"}, "student.start"), ({"data.prompts": "/etc/passwd"}, "data.prompts"),
    ({"train.lr": 0}, "train.lr"), ({"train.lr": "1e-4"}, "train.lr"), ({"train.report_to": "tensorboard"}, "train.report_to"),
    ({"method.recipe": "/x"}, "method.recipe"), ({"train.schedule": "other"}, "train.schedule"), ({"student.full": 1}, "student.full"),
    ({"train.batch": 1e9}, "train.batch"),
])  # fmt: skip
def test_only_safe_settings_of_a_training_are_taken(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, match="settings"):
        read({"kind": "train", "method": "pairs", "model": "tiny-flux", "settings": settings})


def test_recipes_may_be_yaml_text() -> None:
    import hasten

    text = hasten.recipe("balanced").to_yaml()
    found = read(PICTURE | {"recipe": text})
    assert isinstance(found, Generate) and found.recipe == text


def test_requests_and_limits_are_frozen() -> None:
    found = read(PICTURE)
    with pytest.raises(ValueError, match="frozen"):
        found.model = "other"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        Limits().max_side = 1  # type: ignore[misc]


def test_limits_are_the_core_ones_and_tighter() -> None:
    ours, whole = Limits(), core.Limits()
    assert isinstance(ours, core.Limits)
    for field in fields(core.Limits):
        mine, theirs = getattr(ours, field.name), getattr(whole, field.name)
        assert (mine is None and theirs is None) or mine <= theirs


def test_every_limit_of_studies_holds() -> None:
    four = ["a", "b", "c", "d"]
    tune = {"kind": "tune", "model": "tiny-image", "prompts": four}
    assert isinstance(read(tune), Tune)
    for change in ({"prompts": four[:3]}, {"seconds": 0.0}, {"seconds": 1e9}, {"prompts": ["x"] * 300}, {"budget": "x" * 100}):
        with pytest.raises(RequestError):
            read(tune | change)
    with pytest.raises(RequestError):
        read({"kind": "train", "method": "pairs", "model": "tiny-flux", "minutes": 0.0})
    assert isinstance(read({"kind": "train", "method": "pairs", "model": "tiny-flux", "minutes": 1}), Train)
    with pytest.raises(RequestError):
        read({"kind": "text", "model": "tiny-dllm", "prompt": "a", "length": 10**6})
    assert isinstance(read({"kind": "text", "model": "tiny-dllm", "prompt": "a", "length": 5}), Text)


def test_a_request_may_not_be_larger_than_allowed() -> None:
    with pytest.raises(RequestError, match="at most"):
        read(b" " * 10**6)
    with pytest.raises(RequestError):
        read("[" * 100_000)
    deep: Any = "x"
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(RequestError):
        read(PICTURE | {"prompt": deep})
