"""Networks and schedulers that two pipelines, two sessions or two threads share: only the named one is touched."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

import hasten
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every
from hasten.recipe import Recipe
from tests.hosts import WAN_CALL, small_wan

ALTERNATE = Recipe(name="alternate", reuse=NetworkReuse(rule=Every(interval=2)))
pytestmark = pytest.mark.filterwarnings("ignore:hasten")


def generate(pipe: Any, prompt: str = "a seven", seed: int = 0, **changes: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type="latent", return_dict=False, **{**WAN_CALL, **changes})[0]


def sibling(pipe: Any, **changes: Any) -> Any:
    """A second pipeline on the same networks."""
    other = WanPipeline(**{**pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), **changes})
    other.set_progress_bar_config(disable=True)
    return other


def test_the_other_pipeline_is_not_accelerated() -> None:
    pipe = small_wan()
    other = sibling(pipe)
    plain = generate(other)
    with hasten.accelerate(pipe, ALTERNATE) as run:
        assert torch.equal(generate(other), plain)
        generate(pipe)
        assert torch.equal(generate(other), plain)
    assert len(run.trace.runs) == 1


def test_both_accelerated_with_different_recipes() -> None:
    pipe = small_wan()
    other = sibling(pipe)
    with hasten.accelerate(pipe, ALTERNATE):
        one = generate(pipe)
    with hasten.accelerate(other, "guidance-interval"):
        two = generate(other)
    with hasten.accelerate(pipe, ALTERNATE), hasten.accelerate(other, "guidance-interval"):
        assert torch.equal(generate(pipe), one)
        assert torch.equal(generate(other), two)
        assert torch.equal(generate(pipe), one)


@pytest.mark.parametrize("prompt", ["two cat", "a seven"])
def test_other_pipeline_called_in_the_middle(prompt: str) -> None:
    pipe = small_wan()
    other = sibling(pipe)
    plain = generate(other, prompt, seed=1)
    with hasten.accelerate(pipe, ALTERNATE):
        alone = generate(pipe)
    found = []

    def call_other(_: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            found.append(generate(other, prompt, seed=1))
        return values

    with hasten.accelerate(pipe, ALTERNATE):
        disturbed = generate(pipe, callback_on_step_end=call_other)
    assert torch.equal(found[0], plain) and torch.equal(disturbed, alone)


def test_other_pipeline_after_an_aborted_run() -> None:
    pipe = small_wan()
    other = sibling(pipe)
    plain = generate(other)

    def fail(_: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise KeyError
        return values

    with hasten.accelerate(pipe, ALTERNATE):
        with pytest.raises(KeyError):
            generate(pipe, callback_on_step_end=fail)
        assert torch.equal(generate(other), plain)


def test_pipeline_that_shares_network_and_scheduler() -> None:
    """What `from_pipe` makes shares all components, so only the pipeline that runs tells whose run it is."""
    pipe = small_wan()
    other = WanPipeline.from_pipe(pipe, torch_dtype=None)
    other.set_progress_bar_config(disable=True)
    assert other.scheduler is pipe.scheduler and other.transformer is pipe.transformer
    plain = generate(other)
    with hasten.accelerate(pipe, ALTERNATE) as run:
        assert torch.equal(generate(other), plain)
        alone = generate(pipe)
        assert torch.equal(generate(other), plain) and torch.equal(generate(pipe), alone)
    assert len(run.trace.runs) == 2 and not torch.equal(alone, plain)


def test_mate_after_an_aborted_run_and_both_accelerated() -> None:
    pipe = small_wan()
    other = sibling(pipe, scheduler=pipe.scheduler)
    plain = generate(other)

    def fail(_: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise KeyError
        return values

    with hasten.accelerate(pipe, ALTERNATE) as first:
        alone = generate(pipe)
        with pytest.raises(KeyError):
            generate(pipe, callback_on_step_end=fail)
        assert torch.equal(generate(other), plain)
        with hasten.accelerate(other, "guidance-interval") as second:
            generate(other)
            assert torch.equal(generate(pipe), alone)
    assert len(first.trace.runs) == 3 and len(second.trace.runs) == 1


def test_loop_of_the_users_own_on_a_shared_scheduler_is_the_hosts() -> None:
    """No pipeline runs here, so there is nobody else to whom the run could belong."""
    pipe = small_wan()
    sibling(pipe, scheduler=pipe.scheduler)
    text = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with hasten.accelerate(pipe, ALTERNATE) as run, torch.no_grad():
        pipe.scheduler.set_timesteps(4)
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(pipe.transformer(x, t.expand(1), text, return_dict=False)[0], t, x)[0]
    assert run.report().computed_fraction == 0.5


def test_sessions_closed_in_the_order_of_opening() -> None:
    pipe = small_wan()
    plain = generate(pipe)
    first, second = hasten.accelerate(pipe, ALTERNATE), hasten.accelerate(pipe, "plain")
    first.close()
    second.close()
    assert "forward" not in vars(pipe.transformer) and "step" not in vars(pipe.scheduler)
    assert torch.equal(generate(pipe), plain)


def test_two_threads_on_one_network() -> None:
    pipe = small_wan()
    other = sibling(pipe)
    plain = generate(other, seed=3)
    found: list[Tensor] = []

    def work() -> None:
        found.extend(generate(other, seed=3) for _ in range(3))

    with hasten.accelerate(pipe, ALTERNATE):
        alone = generate(pipe)
        thread = threading.Thread(target=work)
        thread.start()
        mine = [generate(pipe) for _ in range(3)]
        thread.join()
    assert len(found) == 3 and all(torch.equal(out, plain) for out in found)
    assert all(torch.equal(out, alone) for out in mine)


@pytest.mark.parametrize("recipe", ["first-block-cache", "pyramid-attention-broadcast", "easycache", "guidance-interval"])
def test_copy_of_an_accelerated_network_is_plain(recipe: str) -> None:
    pipe = small_wan()
    plain = generate(pipe)
    names = {name: set(vars(module)) for name, module in pipe.transformer.named_modules()}
    with hasten.accelerate(pipe, recipe):
        accelerated = generate(pipe)
        twin, blocks = copy.deepcopy(pipe.transformer), copy.deepcopy(pipe.transformer.blocks)
        assert torch.equal(generate(pipe), accelerated)
        assert torch.equal(generate(sibling(pipe, transformer=twin)), plain)
    assert {name: set(vars(module)) for name, module in twin.named_modules()} == names
    assert type(blocks) is torch.nn.ModuleList and blocks[0] is not pipe.transformer.blocks[0]


def test_copy_and_pickle_of_an_accelerated_pipeline_are_plain() -> None:
    pipe = small_wan()
    plain = generate(pipe)
    with hasten.accelerate(pipe, "first-block-cache"):
        generate(pipe)
        twin = copy.deepcopy(pipe)
        again = pickle.loads(pickle.dumps(pipe.transformer))
    assert torch.equal(generate(twin), plain) and torch.equal(generate(sibling(pipe, transformer=again)), plain)
    for owner in (twin.scheduler, twin.transformer, again):
        assert not {"step", "forward", "blocks", "__getstate__"} & set(vars(owner))


def test_saved_weights_are_the_hosts_own() -> None:
    pipe = small_wan()
    names, values = list(pipe.transformer.state_dict()), list(pipe.transformer.state_dict().values())
    with hasten.accelerate(pipe, "first-block-cache"):
        generate(pipe)
        state = pipe.transformer.state_dict()
        assert list(state) == names and all(a is b or torch.equal(a, b) for a, b in zip(state.values(), values, strict=True))
        assert sum(1 for _ in pipe.transformer.modules()) == sum(1 for _ in pipe.transformer.named_modules())
