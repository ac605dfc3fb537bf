"""Consistency methods in the loop: resumed bit for bit, every weight reached, told networks, sampled as trained."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.distill.loop.draw import Draw
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.method import Method
from hasten.distill.methods.guidance import Guidance
from hasten.distill.methods.lcm import LCM, LCMLoRA
from hasten.distill.methods.meanflow import MeanFlow
from hasten.distill.methods.progressive import Progressive
from hasten.distill.methods.scm import SCM
from hasten.distill.network.few_steps import FewSteps, sample
from hasten.distill.network.hint import FlowMap, Hint, Hinted
from hasten.distill.network.host_call import HostCall
from hasten.distill.network.paths import Flow, NoisePath, VariancePreserving
from hasten.distill.network.roles import Adapter, Role, Roles
from hasten.errors import ModelError, RecipeError, UsageError
from hasten.part import parse
from hasten.pipelines.host import Layout
from tests.distill import toys
from tests.distill.test_trainer import same, weights

TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
METHODS: dict[str, Method] = {
    "lcm": LCM(scale=(1, 3)),
    "lcm-lora": LCMLoRA(scale=(1, 3), grid=10),
    "scm": SCM(scale=2, warmup=2, top=0.2),
    "scm-told": SCM(scale=(1, 3), told=True, adaptive=False, tangent=0.05),
    "meanflow": MeanFlow(scale=2, instant=0.3, whole=0.3),
    "guidance": Guidance(scale=2),
    "guidance-told": Guidance(scale=(1, 3), told=True),
    "progressive": Progressive(first=4),
}
each = pytest.mark.parametrize("name", METHODS)


class TimestepEmbedding(nn.Module):
    """As in diffusers: two layers, found by its class's name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(2, 12), nn.Linear(12, 16)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(features)))


class Timed(nn.Module):
    """hidden_states [B, 5], timestep [B], encoder_hidden_states [B, 5] -> [B, 5], modulated by the time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2 * toys.WIDTH, 16), nn.Linear(16, toys.WIDTH)
        self.time_embed = TimestepEmbedding()

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        turn = timestep[:, None] / 300
        vector = self.time_embed(torch.cat([turn.sin(), turn.cos()], 1))
        return (self.last((self.first(torch.cat([hidden_states, encoder_hidden_states], 1)) + vector).tanh()),)


def trainer(method: Method, out: Path, full: bool = False, path: NoisePath | None = None, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    network = Timed()
    host = HostCall(network, "timed", Layout.of(network), {}, path or Flow(), (toys.WIDTH,), torch.float32, 1.0, None)
    roles = Roles.of_copies(host, method.trains) if full else Roles.on_one_base(host, method.trains, Adapter(rank=4))
    chosen = TrainSettings(**{"steps": 6, "batch": 8, "lr": 1e-2, "warmup": 2, **settings})
    return Trainer(method, roles, toys.store(), chosen, out, (toys.WIDTH,), progress=False)


@pytest.mark.parametrize("full", [False, True], ids=["adapters", "copies"])
@each
def test_a_resumed_training_is_the_same_and_every_weight_has_moved(tmp_path: Path, name: str, full: bool) -> None:
    method = METHODS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a weight that nothing moves is one
        assert trainer(method, tmp_path / "whole", full).fit() == 6
    trainer(method, tmp_path / "cut", full).fit(stop_after=3)
    assert trainer(method, tmp_path / "cut", full).fit(resume=True) == 6
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@each
def test_gradients_reach_every_trained_weight_within_three_steps(tmp_path: Path, name: str) -> None:
    made = trainer(METHODS[name], tmp_path / "a")
    reached: set[str] = set()
    player = made.players["student"]
    for step in range(3):
        rows = range(8)
        draw = Draw(0, step, rows)
        made.state.loss("student", made.data.batch(torch.arange(8), draw), draw, step, {}).rows.mean().backward()
        reached |= {n for n, p in player.parameters.items() if p.grad is not None and bool(p.grad.any())}
        assert player.optimizer is not None
        player.optimizer.step()
        player.optimizer.zero_grad()
    assert reached == set(player.parameters)


@each
def test_a_batch_may_be_cut_into_parts(tmp_path: Path, name: str) -> None:
    trainer(METHODS[name], tmp_path / "one", lr=1e-3, steps=2).fit()
    trainer(METHODS[name], tmp_path / "four", lr=1e-3, steps=2, accumulate=4).fit()
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    for key, value in one.items():
        if "/weights/" in key:
            torch.testing.assert_close(four[key], value, rtol=1e-3, atol=1e-4, msg=key)


@each
@pytest.mark.parametrize("output", ["epsilon", "v_prediction", "sample"])
def test_variance_preserving_networks_are_trained_too(tmp_path: Path, name: str, output: Any) -> None:
    made = trainer(METHODS[name], tmp_path / "a", path=VariancePreserving(TABLE, output), steps=2)
    made.fit()
    assert made.state.sampler() is None or made.state.sampler().angles[0] <= made.roles["student"].host.path.end  # type: ignore[union-attr, attr-defined]


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
        ({"kind": "meanflow", "tangent": 0.3}, "tangent"),
        ({"kind": "meanflow", "instance": 0.5}, "unknown key 'instance'.*'instant'"),
    ],
)
def test_what_no_method_can_do_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse(Method, given, "config.yaml")


def test_what_a_network_cannot_hear_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="told = true needs a range of guidance scales, got 3 alone"):
        trainer(Guidance(scale=3, told=True), tmp_path)
    with pytest.raises(ModelError, match=r"Toy has no TimestepEmbedding.*told = false"):
        toys.trainer(MeanFlow(), tmp_path)


@pytest.mark.parametrize("full", [False, True], ids=["adapters", "copies"])
@each
def test_half_precision_loses_no_gradient(tmp_path: Path, name: str, full: bool) -> None:
    """Evaluations in bf16, some of them without gradient before those with; weights stay float32."""
    made = trainer(METHODS[name], tmp_path / "a", full, precision="bf16", lr=1e-3)
    if getattr(METHODS[name], "tangent", "exact") != "exact":
        with pytest.raises(UsageError, match="rounding, not a tangent"):
            made.fit()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made.fit()
    assert all(p.dtype == torch.float32 for p in made.players["student"].parameters.values())
