"""Consistency methods beyond the contract: what networks are told, and that they are sampled as they were trained."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Facts, Method
from hasten.distill.methods.guidance import Guidance
from hasten.distill.methods.meanflow import MeanFlow
from hasten.distill.network.few_steps import FewSteps, sample
from hasten.distill.network.hint import FlowMap, Hint, Hinted
from hasten.distill.network.host_call import HostCall
from hasten.distill.network.paths import Flow
from hasten.distill.network.roles import Role
from hasten.errors import ModelError, RecipeError, UsageError
from hasten.part import parse
from hasten.pipelines.host import Layout
from tests.distill import toys
from tests.distill.test_method_contract import METHODS
from tests.distill.timed import Timed, trainer

CONSISTENT = ("lcm", "lcm-lora", "scm", "scm-told", "meanflow", "guidance", "guidance-told", "progressive")
each = pytest.mark.parametrize("name", CONSISTENT)


@each
def test_the_student_starts_as_the_teacher_and_is_sampled_as_it_was_trained(tmp_path: Path, name: str) -> None:
    made = trainer(METHODS[name], tmp_path / "a")
    student, steps = made.state.student(), made.state.sampler() or FewSteps((1.5, 0.7), "ode")
    x = torch.randn(3, toys.WIDTH, generator=torch.Generator().manual_seed(0))
    condition = made.data.batch(torch.arange(3), Draw(0, 0, range(3))).condition

    def noise(number: int, x: Tensor) -> Tensor:
        return torch.full_like(x, 0.1 * number)

    def drawn(who: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = sample(who, x, condition, steps, noise)
        return found

    plain = FewSteps(steps.angles, "ode" if steps.how == "map" else steps.how)
    with torch.no_grad():
        teacher = sample(made.roles["teacher"], x, condition, plain, noise)
    torch.testing.assert_close(drawn(student), teacher)
    made.fit()
    assert not torch.allclose(drawn(student), teacher, atol=1e-4)
    assert not any(module._forward_hooks for module in made.roles["teacher"].host.network.modules())
    with torch.no_grad():
        torch.testing.assert_close(sample(made.roles["teacher"], x, condition, plain, noise), teacher)


# --- what a network is told ----------------------------------------------------------------------------


def test_a_hint_changes_nothing_at_first_and_only_while_it_is_on() -> None:
    network = Timed()
    host = HostCall(network, "timed", Layout.of(network), {}, Flow(), (toys.WIDTH,), torch.float32, 1.0, None)
    role, hint = Role("student", host, None, (), True), Hint(network)
    batch = toys.store().batch(torch.arange(4), Draw(0, 0, range(4)))
    assert batch.x0 is not None
    tau = torch.linspace(0.2, 1.4, 4, dtype=torch.float64)
    plain, keys = role.velocity(batch.x0, tau, batch.condition), list(network.state_dict())
    number = torch.arange(4, dtype=torch.float64)
    assert torch.equal(Hinted(role, hint, number).velocity(batch.x0, tau, batch.condition), plain)
    nn.init.normal_(hint.module.last.weight)
    told = Hinted(role, hint, number).velocity(batch.x0, tau, batch.condition)
    assert not torch.equal(told, plain) and torch.equal(role.velocity(batch.x0, tau, batch.condition), plain)
    one = Hinted(role, hint, 2.0).velocity(batch.x0, tau, batch.condition)
    torch.testing.assert_close(one[2], told[2])
    with pytest.raises(RuntimeError), hint.on(network, torch.ones(3)):
        role.velocity(batch.x0, tau, batch.condition)
    assert torch.equal(role.velocity(batch.x0, tau, batch.condition), plain), "off again after an error"
    assert list(network.state_dict()) == keys
    twin = Role("target", dataclasses.replace(host, network=copy.deepcopy(network)), None, (), True)
    torch.testing.assert_close(Hinted(twin, hint, number).velocity(batch.x0, tau, batch.condition), told)
    before = torch.get_rng_state()
    assert torch.equal(Hint(network).module.first.weight, Hint(network).module.first.weight)
    assert torch.equal(torch.get_rng_state(), before), "a hint draws no number of anybody's"


def test_maps_and_other_ways_of_sampling_are_not_mixed_up() -> None:
    network = Timed()
    host = HostCall(network, "timed", Layout.of(network), {}, Flow(), (toys.WIDTH,), torch.float32, 1.0, None)
    role = Role("student", host, None, (), True)
    batch = toys.store().batch(torch.arange(2), Draw(0, 0, range(2)))
    assert batch.z is not None
    with pytest.raises(UsageError, match="'map' does not fit Role"):
        sample(role, batch.z, batch.condition, FewSteps((1.5,), "map"))
    with pytest.raises(UsageError, match="'ode' does not fit FlowMap"):
        sample(FlowMap(role, Hint(network)), batch.z, batch.condition, FewSteps((1.5,), "ode"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kind": "scm", "scale": (3, 2)}, "scale must be a number of at least 0, or a range that rises, got 3 and 2"),
        ({"kind": "scm", "scale": -1}, "scale must be a number of at least 0, or a range that rises, got -1"),
        ({"kind": "progressive", "first": 6, "calls": 4}, "first must be calls x 2, 4, 8.*6 and calls = 4"),
        ({"kind": "progressive", "scale": (1, 2)}, "one guidance scale.*method guidance"),
        ({"kind": "guidance", "scale": 3, "told": True}, "told = true needs a range of guidance scales, got 3 alone"),
        ({"kind": "lcm", "scale": 1}, "told = true needs a range of guidance scales, got 1 alone. Set told = false"),
        ({"kind": "sana-sprint", "told": True}, "told = true needs a range of guidance scales, got 4.5 alone"),
        ({"kind": "meanflow", "tangent": 0.3}, "tangent"),
        ({"kind": "meanflow", "instance": 0.5}, "unknown key 'instance'.*'instant'"),
    ],
)
def test_what_no_method_can_do_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse(Method, given, "config.yaml")


def test_what_a_network_cannot_hear_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Toy has no TimestepEmbedding.*told = false"):
        toys.trainer(MeanFlow(), tmp_path)


@pytest.mark.parametrize(("scale", "warns"), [(1.0, False), (3.0, True), ((1.0, 2.0), True)])
def test_a_network_that_hears_its_guidance_is_not_silently_guided_twice(tmp_path: Path, scale: Any, warns: bool) -> None:
    """FLUX.1-dev, say: data.call.guidance_scale is in what it is told, and method.scale would come on top."""
    made = trainer(Guidance(scale=1), tmp_path)
    made.roles["teacher"].host.network.config = SimpleNamespace(guidance_embeds=True)  # type: ignore[assignment]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Guidance(scale=scale).start(Facts(made.roles, 6, (toys.WIDTH,)))
    told = [str(each.message) for each in said if "method.scale" in str(each.message)]
    assert len(told) == warns and all("Say method.scale=1" in text for text in told)
