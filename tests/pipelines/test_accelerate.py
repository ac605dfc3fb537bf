"""A recipe on real diffusers pipelines: nothing changes unless it should, and everything comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.caching.network import NetworkReuse
from hasten.caching.rules import Every
from hasten.caching.width import StraightWidth, WidthReuse
from hasten.drift import Rule
from hasten.errors import LimitError, ModelError, RecipeError, UsageError
from hasten.recipe import Recipe, ReusePolicy
from hasten.samplers.guidance import GuidanceInterval
from tests import hosts
from tests.contract import parts
from tests.pipelines.accelerated import ALTERNATE, BLOCKS, HOSTS, Host, computed

pytestmark = pytest.mark.filterwarnings("ignore:hasten")


@pytest.fixture(params=sorted(HOSTS))
def host(request: pytest.FixtureRequest) -> Host:
    return Host(request.param)


RECIPES = {"plain": "plain", "network": ALTERNATE, "blocks": BLOCKS, "guidance": "guidance-interval", "auto": "auto:quality=0.2"}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
class TestRestore:
    def test_after_a_run(self, host: Host, recipe: str | Recipe) -> None:
        before = host()
        marks = host.fingerprint()
        with hasten.accelerate(host.pipe, recipe):
            inside = host()
        assert host.fingerprint() == marks
        assert torch.equal(host(), before)
        assert inside.shape == before.shape and bool(torch.isfinite(inside).all())
        if recipe == "plain":
            assert torch.equal(inside, before), "the plain recipe must change no bit"

    def test_after_an_exception_in_the_middle(self, host: Host, recipe: str | Recipe) -> None:
        def fail(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step == 3:
                raise KeyError("the user's own")
            return values

        before, marks = host(), host.fingerprint()
        with pytest.raises(KeyError, match="own"), hasten.accelerate(host.pipe, recipe):
            host(**callback(host, fail))
        assert host.fingerprint() == marks
        assert torch.equal(host(), before)

    def test_second_run_equals_the_first(self, host: Host, recipe: str | Recipe) -> None:
        with hasten.accelerate(host.pipe, recipe):
            discover(host, recipe)
            first = host()
            host(prompt="two cat", seed=5)
            assert torch.equal(host(), first)

    def test_aborted_run_leaves_no_trace_in_the_next(self, host: Host, recipe: str | Recipe) -> None:
        def fail(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            raise KeyError

        with hasten.accelerate(host.pipe, recipe):
            discover(host, recipe)
            clean = host()
        with hasten.accelerate(host.pipe, recipe):
            discover(host, recipe)
            with pytest.raises(KeyError):
                host(prompt="nine", seed=9, **callback(host, fail))
            assert torch.equal(host(), clean)

    def test_new_batch_and_resolution_start_clean(self, host: Host, recipe: str | Recipe) -> None:
        calls: list[dict[str, Any]] = [{}, {"height": 64}, {"prompt": ["two", "a cat"]}, {}]
        expected = []
        for changes in calls:
            with hasten.accelerate(host.pipe, recipe):
                discover(host, recipe)
                expected.append(host(**changes))
        with hasten.accelerate(host.pipe, recipe):
            discover(host, recipe)
            for changes, alone in zip(calls, expected, strict=True):
                assert torch.equal(host(**changes), alone)


def test_first_run_of_block_reuse_equals_the_second() -> None:
    host = Host("wan")
    with hasten.accelerate(host.pipe, BLOCKS):
        assert torch.equal(host(), host())


def discover(host: Host, recipe: str | Recipe) -> None:
    """Block reuse computes a little more in the very first run of a session; see the test above."""
    if recipe is BLOCKS:
        host(num_inference_steps=1)


def callback(host: Host, call: Callable[..., Any]) -> dict[str, Any]:
    """How `host` takes a call at the end of each step: PixArt still has the old interface."""
    if host.name == "pixart":
        return {"callback": lambda step, time, latents: call(host.pipe, step, time, {"latents": latents})}
    return {"callback_on_step_end": call}


# Routers belong to one network and come from a training: tests/distill/test_dydit.py.
@pytest.mark.parametrize("policy", [part for part in parts(ReusePolicy) if part.id != "routed"])
class TestEveryReusePolicy:
    def test_never_skipping_is_bit_identical(self, host: Host, policy: Any) -> None:
        before = host()
        rules = [name for name in type(policy).model_fields if isinstance(getattr(policy, name), Rule)]
        always = policy.model_copy(update=dict.fromkeys(rules, Every(interval=1)))
        if isinstance(policy, WidthReuse):  # it narrows steps and skips none
            always = policy.model_copy(update={"width": StraightWidth(early=1.0)})
        with hasten.accelerate(host.pipe, Recipe(reuse=always)) as run:
            assert torch.equal(host(), before)
        assert computed(run) == set(range(6))

    def test_events_add_up_to_steps_times_branches(self, host: Host, policy: Any) -> None:
        branches = 2 if host.name == "wan" else 1
        half = policy.model_copy(update={"rule": Every(interval=2)})
        with hasten.accelerate(host.pipe, Recipe(reuse=half)) as run:
            host()
        calls = {(event.step, event.branch) for event in run.trace.events}
        assert calls == {(step, branch) for step in range(6) for branch in range(branches)}
        saved = [e for e in run.trace.events if e.action in ("reuse", "forecast") or e.share < 1]
        skipped = {(event.step, event.branch) for event in saved}
        assert skipped and skipped <= {(step, branch) for step in (1, 3, 5) for branch in range(branches)}


def test_skipped_steps_do_not_run_the_network(host: Host) -> None:
    calls = [0]
    inner = list(host.model.children())[-1]
    inner.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    host()
    full, calls[0] = calls[0], 0
    with hasten.accelerate(host.pipe, ALTERNATE):
        host()
    assert calls[0] * 2 == full


def test_inert_recipe_says_so() -> None:
    host = Host("wan")
    with pytest.warns(UserWarning, match="skipped nothing"), hasten.accelerate(host.pipe, "easycache") as run:
        host(num_inference_steps=2)
    assert "skipped nothing" in str(run.report())


def test_cap_on_cached_bytes() -> None:
    host = Host("wan")
    plain = host()
    limits = hasten.Limits(max_cache_bytes=10)
    with pytest.warns(UserWarning, match="cap of 10"), hasten.accelerate(host.pipe, ALTERNATE, limits=limits) as run:
        capped = host()
    assert torch.equal(capped, plain) and run.trace.bytes_held == 0
    with hasten.accelerate(host.pipe, ALTERNATE) as run:
        host()
    one = plain.numel() * plain.element_size()
    assert 4 * one <= run.trace.bytes_peak <= 8 * one, "two branches, two values each"


def test_bare_denoiser_with_scheduler_and_gradients() -> None:
    """Under autograd every call passes through, so that gradients are right."""
    pipe = hosts.small_wan()
    model, scheduler = pipe.transformer, pipe.scheduler

    def loop() -> tuple[Tensor, int]:
        scheduler.set_timesteps(6)
        x, text = torch.ones(1, 16, 2, 4, 4), torch.ones(1, 5, 32)
        for time in scheduler.timesteps:
            v = model(hidden_states=x, timestep=time.expand(1), encoder_hidden_states=text, return_dict=False)[0]
            x = scheduler.step(v, time, x, return_dict=False)[0]
        return x, 0

    plain, _ = loop()
    with hasten.accelerate(model, ALTERNATE, scheduler=scheduler):
        with_grad, _ = loop()
        assert with_grad.requires_grad and torch.equal(with_grad, plain)
    with torch.no_grad(), hasten.accelerate(model, ALTERNATE, scheduler=scheduler) as run:
        assert not torch.equal(loop()[0], plain)
    assert computed(run) == {0, 2, 4}


def test_wrong_hosts_and_recipes() -> None:
    pipe = hosts.small_wan()
    with pytest.raises(ModelError, match="scheduler="):
        hasten.accelerate(pipe.transformer, "plain")
    with pytest.raises(ModelError, match="no denoiser"):
        hasten.accelerate(object(), "plain")
    with pytest.raises(RecipeError, match="Did you mean"):
        hasten.accelerate(pipe, "balancd")
    with pytest.raises(UsageError, match="ddim"):
        hasten.accelerate(pipe, hasten.recipe("fewer-steps").replace({"sampler.name": "ddim"}))
    assert "forward" not in vars(pipe.transformer) and "step" not in vars(pipe.scheduler)
    with pytest.raises(LimitError):
        hasten.Limits().check(num_inference_steps=0)


@pytest.mark.parametrize("host", sorted({*HOSTS} - {"flux"}), indirect=True)
def test_guidance_and_reuse_together(host: Host) -> None:
    """Flux evaluates one branch, and has none to leave out."""
    both = Recipe(name="both", reuse=NetworkReuse(rule=Every(interval=2)), guidance=GuidanceInterval(low=0, high=0))
    with hasten.accelerate(host.pipe, both) as run:
        out = host()
    assert bool(torch.isfinite(out).all())
    assert {e.step for e in run.trace.events if e.action == "reuse"} == {1, 3, 5}
    assert any(e.action == "skip" or e.share < 1 for e in run.trace.events if e.step in (2, 4))


def test_nested_sessions_of_one_pipeline() -> None:
    host = Host("wan")
    before, marks = host(), host.fingerprint()
    with hasten.accelerate(host.pipe, "guidance-interval") as outer, hasten.accelerate(host.pipe, ALTERNATE) as inner:
        host()
    assert host.fingerprint() == marks and torch.equal(host(), before)
    assert len(outer.trace.runs) == len(inner.trace.runs) == 1


def test_inference_mode(host: Host) -> None:
    plain = host()
    with torch.inference_mode(), hasten.accelerate(host.pipe, "plain"):
        assert torch.equal(host(), plain)
    with hasten.accelerate(host.pipe, ALTERNATE):
        expected = host()
    with torch.inference_mode(), hasten.accelerate(host.pipe, ALTERNATE) as run:
        assert torch.equal(host(), expected)
    assert computed(run) == {0, 2, 4}
