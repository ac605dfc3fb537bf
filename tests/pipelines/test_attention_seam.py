"""The attention seam on real pipelines: reached per instance and thread, restored exactly."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from diffusers.models import attention_dispatch
from torch import Tensor, nn

import hasten
from tests.hosts import small_wan
from tests.pipelines.attention_recipes import FULL, PART, STOOD_FOR, changed
from tests.pipelines.attention_runs import SITES, generate, off
from tests.pipelines.seam_contract import state_of

pytestmark = pytest.mark.filterwarnings("ignore:hasten")


@pytest.fixture(scope="module")
def wan() -> WanPipeline:
    return small_wan(layers=2)


@pytest.fixture(scope="module")
def plain(wan: WanPipeline) -> Tensor:
    return generate(wan)


# --- what is computed -------------------------------------------------------------------------------


def test_everything_read_is_dense_attention(wan: WanPipeline, plain: Tensor) -> None:
    before = state_of(wan.transformer)
    with hasten.accelerate(wan, FULL) as session:
        found = generate(wan)
    assert off(found, plain) < 1e-5
    assert [call.site for call in session.trace.attention] == SITES * 2 * 4, "both branches of four steps"
    assert [(call.step, call.branch) for call in session.trace.attention[:8:2]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert state_of(wan.transformer) == before and torch.equal(generate(wan), plain)


def test_runs_of_a_session_start_clean(wan: WanPipeline, plain: Tensor) -> None:
    """Nothing that one run has selected serves the next, although selections last for four steps."""
    recipe = changed(STOOD_FOR, refresh=4)
    with hasten.accelerate(wan, recipe) as session:
        first, other, again = generate(wan), generate(wan, seed=1), generate(wan)
    with hasten.accelerate(wan, recipe):
        assert torch.equal(generate(wan, seed=1), other)
    assert torch.equal(first, again) and off(first, plain) > 1e-4
    runs = [[(c.step, c.branch, c.density, c.recall) for c in session.trace.attended(number)] for number in (0, 2)]
    assert runs[0] == runs[1] and all(0 < recall <= 1 for *_, recall in runs[0])  # type: ignore[operator]


def test_another_resolution_is_learned_anew(wan: WanPipeline) -> None:
    expected = generate(wan, height=48)
    with hasten.accelerate(wan, FULL) as session:
        generate(wan)
        assert off(generate(wan, height=48), expected) < 1e-5
    assert {call.tokens for call in session.trace.attention} == {8, 12}
    assert sum("one extra evaluation" in note for note in session.trace.notes) == 1


def test_first_steps_are_the_hosts_own_attention(wan: WanPipeline, plain: Tensor) -> None:
    with hasten.accelerate(wan, changed(PART, warm=1.0)) as session:
        assert torch.equal(generate(wan), plain)
    assert {call.action for call in session.trace.attention} == {"dense"}


def test_selections_are_reused_and_shared(wan: WanPipeline) -> None:
    with hasten.accelerate(wan, changed(PART, refresh=2, share_branches=True)) as session:
        generate(wan)
    reused = [(call.step, call.branch) for call in session.trace.attention if call.reused and call.layer == 0]
    assert reused == [(0, 1), (1, 0), (1, 1), (2, 1), (3, 0), (3, 1)]


@pytest.fixture
def backends() -> Iterator[Any]:
    """diffusers' registry of backends, whose active one models change when they are given one of their own."""
    registry = attention_dispatch._AttentionBackendRegistry
    active = registry._active_backend
    yield registry
    registry._active_backend = active


@pytest.mark.parametrize("everywhere", [False, True])
def test_dense_steps_run_on_the_users_backend(
    wan: WanPipeline, plain: Tensor, backends: Any, everywhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    math, calls = attention_dispatch.AttentionBackendName._NATIVE_MATH, []
    monkeypatch.setitem(backends._backends, math, _counted(backends._backends[math], calls))
    if everywhere:
        backends.set_active_backend(math)
    else:
        wan.transformer.set_attention_backend(math.value)
    expected, alone = generate(wan), len(calls)
    with hasten.accelerate(wan, changed(FULL, warm=0.5)):
        found = generate(wan)
    half = len(calls) - alone
    with hasten.accelerate(wan, changed(FULL, warm=1.0)):
        assert torch.equal(generate(wan), expected)
    wan.transformer.reset_attention_backend()
    assert off(found, expected) < 1e-5
    assert alone == 32 and half == 16 + 8 and len(calls) == 32 + 24 + 32, "cross-attention is always the user's"


def _counted(function: Any, calls: list[int]) -> Any:
    @functools.wraps(function)
    def call(**named: Any) -> Any:
        calls.append(1)
        return function(**named)

    return call


def test_a_backend_chosen_meanwhile_stays_chosen(wan: WanPipeline, plain: Tensor, backends: Any) -> None:
    processor = wan.transformer.blocks[0].attn1.processor
    with hasten.accelerate(wan, changed(PART, warm=1.0)):
        assert isinstance(wan.transformer.blocks[0].attn1.processor, type(processor))
        wan.transformer.set_attention_backend("_native_math")
        math = generate(wan)
    assert processor._attention_backend == "_native_math" and wan.transformer.blocks[0].attn1.processor is processor
    assert torch.equal(generate(wan), math)
    wan.transformer.reset_attention_backend()
    backends.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)
    assert torch.equal(generate(wan), plain)


# --- whose calls they are ---------------------------------------------------------------------------


def test_another_pipeline_on_the_same_network_is_left_alone(wan: WanPipeline, plain: Tensor) -> None:
    other = WanPipeline(**wan.components)
    other.set_progress_bar_config(disable=True)
    with hasten.accelerate(wan, PART) as session:
        assert torch.equal(generate(other), plain)
        assert not torch.equal(generate(wan), plain)
    assert len(session.trace.runs) == 1


def test_another_thread_is_left_alone(wan: WanPipeline) -> None:
    call = {
        "hidden_states": torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500]), "encoder_hidden_states": torch.ones(1, 5, 32), "return_dict": False,
    }  # fmt: skip
    found: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.append(wan.transformer(**call)[0])

    work()
    inside = threading.Event()

    class Meeting(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> None:
            if not inside.is_set():
                inside.set()
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()

    hook = wan.transformer.blocks[0].attn1.to_q.register_forward_hook(lambda *_: Meeting()())
    with hasten.accelerate(wan, PART):
        generate(wan)
    hook.remove()
    assert len(found) == 2 and torch.equal(*found)


def test_copies_are_plain(wan: WanPipeline) -> None:
    with hasten.accelerate(wan, PART):
        twin = copy.deepcopy(wan.transformer)
    kinds = {type(module.attn1.processor) for module in twin.blocks}
    assert kinds == {type(wan.transformer.blocks[0].attn1.processor)}
    assert "_hasten" not in str([vars(module) for module in twin.modules()])


def test_a_run_that_breaks_off_leaves_nothing(wan: WanPipeline, plain: Tensor) -> None:
    before = state_of(wan.transformer)

    def stop(pipe: Any, index: int, *_: Any) -> dict[str, Any]:
        if index == 1:
            raise KeyboardInterrupt
        return {}

    with hasten.accelerate(wan, changed(PART, refresh=4)) as session:
        first = generate(wan)
        with pytest.raises(KeyboardInterrupt):
            generate(wan, seed=1, callback_on_step_end=stop)
        assert torch.equal(generate(wan), first)
    assert [len(list(session.trace.attended(number))) for number in range(3)] == [16, 8, 16]
    assert state_of(wan.transformer) == before and torch.equal(generate(wan), plain)


class Weighted(nn.Module):
    """A processor with weights of its own, as IP-Adapter's are."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5), requires_grad=False)
        self.inner = [inner]

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.gain * self.inner[0](attn, hidden_states, *args, **kwargs)


def test_processors_that_are_modules_and_such_that_are_functions() -> None:
    pipe = small_wan(layers=3)
    for block in pipe.transformer.blocks[:2]:
        block.attn1.processor = Weighted(block.attn1.processor)
    third = pipe.transformer.blocks[2].attn1
    original = third.processor
    third.processor = lambda attn, *args, **kwargs: original(attn, *args, **kwargs)
    plain, before, weights = generate(pipe), state_of(pipe.transformer), list(pipe.transformer.state_dict())
    with hasten.accelerate(pipe, FULL) as session:
        found = generate(pipe)
        assert list(pipe.transformer.state_dict()) == weights and "blocks.0.attn1.processor.gain" in weights
    assert off(found, plain) < 1e-5
    assert {call.site for call in session.trace.attention} == set(SITES)
    assert any("from which no class can be derived" in note for note in session.trace.notes)
    assert state_of(pipe.transformer) == before and torch.equal(generate(pipe), plain)
