"""Distribution matching: the exact gradient of KL, samples as they will be made, one base for three roles."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hasten.distill.loop.draw import Draw
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.method import Batch, Facts, Loss, Method
from hasten.distill.methods.dmd import DMD, DMDGAN, DMDState
from hasten.distill.network.few_steps import sample
from hasten.distill.network.host_call import Condition, HostCall
from hasten.distill.network.paths import Flow, NoisePath, VariancePreserving, spread
from hasten.distill.network.roles import Adapter, Roles
from hasten.errors import ModelError
from hasten.pipelines.host import Layout
from tests.distill import gaussians, toys
from tests.distill.gaussians import WIDTH, Exact, Gaussian
from tests.distill.test_consistency_training import TABLE, Timed
from tests.distill.test_trainer import same, weights

S, MU, EMPTY = 0.4, 0.5, -0.4
"""The data's deviation, its mean, and the mean of the empty prompt."""

PATHS: dict[str, NoisePath] = {"flow": Flow(), "v": VariancePreserving(TABLE, "v_prediction")}


# --- Gaussians: everything is known ---------------------------------------------------------------------


class About(Exact):
    """Exact for N(mean, scale^2), whatever the prompt."""

    def __init__(self, scale: float, mean: float, path: NoisePath) -> None:
        super().__init__(Gaussian(scale), path)
        self.mean = mean

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        return super().forward(hidden_states, timestep, torch.full_like(hidden_states, self.mean))


class Affine(nn.Module):
    """A generator whose sample is a x + b."""

    def __init__(self, a: float, b: float, path: NoisePath) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (a, b))
        self.path = path

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        tau = self.path.angle(timestep)
        cos, sin, r, p, q = (
            spread(v, hidden_states) for v in (tau.cos(), tau.sin(), self.path.scale(tau), *self.path.factors(tau))
        )
        x = hidden_states / r
        return (((cos * x - self.a * x - self.b) / sin - p * x) / q,)


class Nodes(Draw):
    """Instead of chance, the 400 points of a quadrature over the sample's noise and that of its level; angles given."""

    share = 0.5

    def __init__(self) -> None:
        one, weight = np.polynomial.hermite_e.hermegauss(20)
        self.points = torch.cartesian_prod(*[torch.tensor(one)] * 2)
        self.weight = torch.cartesian_prod(*[torch.tensor(weight / math.sqrt(2 * math.pi))] * 2).prod(1)
        super().__init__(0, 0, range(len(self.points)))

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        return self.points[:, [0 if purpose.endswith(".start") else 1]].expand(-1, WIDTH)

    def uniform(self, purpose: str) -> Tensor:
        return torch.full((len(self.points),), self.share, dtype=torch.float64)


def prompts(rows: int) -> Batch:
    def about(mean: float, rows: int) -> Condition:
        return Condition({"encoder_hidden_states": torch.full((rows, WIDTH), mean, dtype=torch.float64)})

    return Batch(about(MU, rows), about(EMPTY, 1), None, None, (WIDTH,))


def known(a: float, b: float, path: NoisePath, critic: tuple[float, float] | None = None, scale: float = 1.0) -> Any:
    """The state of a training whose student makes a z + b of pure noise z, and whose critic is exact for that."""
    roles = Roles(teacher=gaussians.role("teacher", Exact(Gaussian(S), path).requires_grad_(False), path))
    roles["student"] = gaussians.role("student", Affine(a, b, path), path)
    roles["critic"] = gaussians.role("critic", About(*(critic or (a, b)), path), path)
    return DMD(scale=scale).start(Facts(roles, 10, (WIDTH,)))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_the_gap_is_the_gradient_of_the_divergence(path: NoisePath, scale: float, share: float) -> None:
    """(x0_critic - x0_teacher) by the student's weights is tan^2 times the gradient of KL, in closed form."""
    a, b, draw = 0.7, 0.1, Nodes()
    state, batch = known(a, b, path, scale=scale), prompts(len(draw.points))
    made = state.rollout.made(batch, draw, "student", 0, graph=True)
    tau = torch.full((len(batch),), share, dtype=torch.float64)
    fake, real = state.seen(made.detach(), tau, draw.normal("level", made), 0, batch)
    ((made * (fake - real)).mean(1) * draw.weight).sum().backward()
    student = state.roles["student"].host.network
    # What the sampler starts from is nearly pure noise: x = cos z + sin z of the table's end is scaled by 1 anyway.
    c, n, mean = math.cos(share), math.sin(share), EMPTY + scale * (MU - EMPTY)
    real_square, fake_square = (c * S) ** 2 + n**2, (c * a) ** 2 + n**2
    by_a = c**2 * a * (1 / real_square - 1 / fake_square)
    by_b = c**2 * (b - mean) / real_square
    torch.testing.assert_close(float(student.a.grad), (n / c) ** 2 * by_a, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(float(student.b.grad), (n / c) ** 2 * by_b, rtol=1e-9, atol=1e-12)


def test_nothing_pulls_a_student_that_matches_and_only_that_one() -> None:
    draw = Nodes()
    batch = prompts(len(draw.points))
    rows = {law: known(*law, Flow()).loss("student", batch, draw, 0, {}).rows for law in ((S, MU), (0.5, MU), (S, 0.6))}
    assert float(rows[S, MU].max()) < 1e-20
    assert all(float(rows[law].mean()) > 1e-4 for law in ((0.5, MU), (S, 0.6)))


def test_the_loss_divides_by_the_distance_to_the_teachers_data_row_by_row() -> None:
    draw = Nodes()
    state, batch = known(0.7, 0.1, Flow()), prompts(len(draw.points))
    loss = state.loss("student", batch, draw, 0, {})
    made = loss.keep["dmd.made"]
    tau, z = state._level("student", made, draw)
    fake, real = state.seen(made, tau, z, 0, batch)
    g = (fake - real) / (made - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(loss.rows, g.square().mean(1) / 2)
    loss.rows.sum().backward()
    torch.testing.assert_close(state.roles["student"].host.network.b.grad, g.mean(1).sum())
    assert float(loss.metrics["gap"]) == pytest.approx(float((fake - real).square().mean(1).sqrt().mean()))


def test_the_critics_loss_is_least_for_the_law_of_the_samples() -> None:
    draw = Nodes()
    batch = prompts(len(draw.points))
    slope = {}
    for law in ((0.7, 0.1), (0.7, 0.2)):
        state = known(0.7, 0.1, Flow(), critic=law)
        (state.loss("critic", batch, draw, 0, {}).rows * draw.weight).sum().backward()
        slope[law] = float(state.roles["critic"].host.network.off.grad.abs().max())
    assert slope[0.7, 0.1] < 1e-12 and slope[0.7, 0.2] > 1e-2


# --- in the loop ---------------------------------------------------------------------------------------

METHODS: dict[str, Method] = {
    "dmd": DMD(scale=2),
    "dmd-4": DMD(calls=4, ratio=2, last=2),
    "dmd-ode": DMD(calls=3, how="ode", told=False, scale=1),
    "dmd-gan": DMDGAN(calls=2, ratio=2, blocks=("first", "last"), weight=0.1, judged=0.5),
}
each = pytest.mark.parametrize("name", METHODS)


def host(path: NoisePath | None = None) -> HostCall:
    torch.manual_seed(0)
    network, fixed = Timed(), {"encoder_hidden_states": torch.zeros(1, toys.WIDTH)}
    return HostCall(network, "timed", Layout.of(network), fixed, path or Flow(), (toys.WIDTH,), torch.float32, 1.0, None)


def trainer(method: Method, out: Path, full: bool = False, path: NoisePath | None = None, **settings: Any) -> Trainer:
    """A training of a network of two layers; prompts alone where the method wants no more."""
    made = host(path)
    roles = Roles.of_copies(made, method.trains) if full else Roles.on_one_base(made, method.trains, Adapter(rank=4))
    data = toys.store() if method.data == "latents" else replace(toys.store(), x0=None, z=None)
    chosen = TrainSettings(**{"steps": 6, "batch": 8, "lr": 1e-2, "warmup": 2, **settings})
    return Trainer(method, roles, data, chosen, out, (toys.WIDTH,), progress=False)


def resumes(method: Method, out: Path, full: bool) -> None:
    """Whole and cut trainings are the same bit for bit, and every weight has moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a weight that nothing moves is one
        assert trainer(method, out / "whole", full).fit() == 6
    trainer(method, out / "cut", full).fit(stop_after=3)
    assert trainer(method, out / "cut", full).fit(resume=True) == 6
    assert same(weights(out / "whole"), weights(out / "cut"))


def cut(method: Method, out: Path) -> None:
    """A batch in four parts trains as in one."""
    trainer(method, out / "one", lr=1e-3, steps=2).fit()
    trainer(method, out / "four", lr=1e-3, steps=2, accumulate=4).fit()
    one, four = weights(out / "one"), weights(out / "four")
    for key, value in one.items():
        if "/weights/" in key:
            torch.testing.assert_close(four[key], value, rtol=1e-3, atol=1e-4, msg=key)


def losses(made: Trainer, rows: list[int], step: int = 0) -> list[Loss]:
    """The losses of one step's phases, on these rows alone."""
    draw, kept, found = Draw(0, step, rows), dict[str, Any](), []
    batch = made.data.batch(torch.tensor(rows), draw)
    for phase in made.state.phases(step):
        found.append(made.state.loss(phase, batch, draw, step, kept))
        kept |= found[-1].keep
    return found


def rows_alone(method: Method, out: Path) -> None:
    """A row's loss is its own: in another order, in a smaller batch."""
    made = trainer(method, out)
    made.fit(stop_after=2)
    whole, part = losses(made, list(range(6))), losses(made, [4, 1])
    for one, two in zip(whole, part, strict=True):
        torch.testing.assert_close(one.rows[[4, 1]], two.rows, rtol=1e-4, atol=1e-5)
        assert one.rows.shape == (6,) and one.rows.dtype == torch.float32 and bool((one.rows[1:] != one.rows[0]).all())


def one_role_each(method: Method, out: Path) -> None:
    """A phase's loss changes its own role, of which it reaches every weight in three steps."""
    made = trainer(method, out)
    reached: dict[str, set[str]] = {name: set() for name in made.players}
    for step in range(3):
        draw, kept = Draw(0, step, range(8)), dict[str, Any]()
        for phase in made.state.phases(step):
            loss = made.state.loss(phase, made.data.batch(torch.arange(8), draw), draw, step, kept)
            kept |= loss.keep
            loss.rows.mean().backward()
            for name, player in made.players.items():
                moved = {n for n, p in player.parameters.items() if p.grad is not None and bool(p.grad.any())}
                assert name == phase or not moved, f"{phase} pulls {name}"
                reached[name] |= moved
            optimizer = made.players[phase].optimizer
            assert optimizer is not None
            optimizer.step()
            optimizer.zero_grad()
    assert reached == {name: set(player.parameters) for name, player in made.players.items()}


@pytest.mark.parametrize("full", [False, True], ids=["adapters", "copies"])
@each
def test_a_resumed_training_is_the_same_and_every_weight_has_moved(tmp_path: Path, name: str, full: bool) -> None:
    resumes(METHODS[name], tmp_path, full)


@each
def test_a_batch_may_be_cut_into_parts(tmp_path: Path, name: str) -> None:
    cut(METHODS[name], tmp_path)


@each
def test_a_rows_loss_does_not_depend_on_its_neighbours(tmp_path: Path, name: str) -> None:
    rows_alone(METHODS[name], tmp_path)


@each
def test_a_phase_trains_its_role_alone_and_all_of_it(tmp_path: Path, name: str) -> None:
    one_role_each(METHODS[name], tmp_path)


@each
@pytest.mark.parametrize("output", ["epsilon", "sample"])
def test_variance_preserving_networks_are_trained_too(tmp_path: Path, name: str, output: Any) -> None:
    trainer(METHODS[name], tmp_path, path=VariancePreserving(TABLE, output), steps=2).fit()


# --- how a sample is made ------------------------------------------------------------------------------


def calls_of(network: nn.Module) -> list[int]:
    """Rows of each evaluation from now on."""
    seen: list[int] = []
    network.register_forward_hook(lambda _, __, answer: seen.append(len(answer[0])))
    return seen


@pytest.mark.parametrize("how", ["consistency", "ode"])
def test_the_student_is_rolled_out_as_it_will_be_sampled_and_no_further(tmp_path: Path, how: Any) -> None:
    made = trainer(DMD(calls=3, how=how), tmp_path)
    state, draw = made.state, Draw(0, 0, range(5))
    assert isinstance(state, DMDState)
    nn.init.normal_(next(iter(made.players["student"].parameters.values())))
    batch = made.data.batch(torch.arange(5), draw)
    seen = calls_of(state.roles["student"].host.network)
    for exit in range(3):
        seen.clear()
        state.rollout.made(batch, draw, "student", exit, graph=False)
        assert seen == [5] * (exit + 1)
    x = draw.normal("student.start", torch.empty(5, toys.WIDTH))

    def noise(number: int, like: Tensor) -> Tensor:
        return draw.normal(f"student.again.{number}", like)

    with torch.no_grad():
        later = sample(state.roles["student"], x, batch.condition, state.sampler(), noise)
    torch.testing.assert_close(state.rollout.made(batch, draw, "student", 2, graph=False), later)


def test_gradients_pass_the_last_call_alone(tmp_path: Path) -> None:
    made = trainer(DMD(calls=3), tmp_path, full=True)
    state, draw = made.state, Draw(0, 0, range(5))
    assert isinstance(state, DMDState)
    batch, student = made.data.batch(torch.arange(5), draw), state.roles["student"]
    weight = next(iter(student.parameters().values()))
    (through,) = torch.autograd.grad(state.rollout.made(batch, draw, "s", 2, graph=True).sum(), weight)
    x, tau = state.rollout.until(batch, draw, "s", 2)
    assert not x.requires_grad
    (last,) = torch.autograd.grad(student.data(x, tau, batch.condition).sum(), weight)
    assert torch.equal(through, last) and bool(last.any())


class Told(Draw):
    """`one_below` says how far it was asked to go, and what it was told to say."""

    def __init__(self, said: int) -> None:
        super().__init__(0, 0, ())
        self.said = said

    def one_below(self, purpose: str, high: int) -> int:
        assert self.said < high
        return self.said


def test_the_last_exit_may_be_trained_more_often(tmp_path: Path) -> None:
    state = trainer(DMD(calls=4, last=3), tmp_path).state
    assert isinstance(state, DMDState)
    assert [state.exit(Told(n), "s") for n in range(6)] == [0, 1, 2, 3, 3, 3]
    with pytest.raises(AssertionError):
        state.exit(Told(6), "s")


def test_the_critic_takes_the_students_sample_once_and_then_fresh_ones(tmp_path: Path) -> None:
    made = trainer(DMD(calls=1, ratio=3), tmp_path)
    seen: list[Tensor] = []
    state = made.state
    assert isinstance(state, DMDState)
    scored = state.scored

    def watched(sample: Tensor, *rest: Any) -> Loss:
        seen.append(sample)
        return scored(sample, *rest)

    state.scored = watched  # type: ignore[method-assign]
    student = losses(made, list(range(4)))[0]
    assert len(seen) == 3 and torch.equal(seen[0], student.keep["dmd.made"])
    assert not torch.equal(seen[1], seen[0]) and not torch.equal(seen[2], seen[1])


def test_the_critic_is_told_the_exit_and_a_network_that_cannot_hear_it_is_refused(tmp_path: Path) -> None:
    made = trainer(DMD(calls=4), tmp_path)
    state = made.state
    assert isinstance(state, DMDState) and state.hint is not None
    nn.init.normal_(state.hint.module.last.weight)
    batch = made.data.batch(torch.arange(3), Draw(0, 0, range(3)))
    x, tau = torch.ones(3, toys.WIDTH), torch.full((3,), 0.7, dtype=torch.float64)
    said = [state.critic(exit).velocity(x, tau, batch.condition) for exit in (0, 1, 0)]
    assert torch.equal(said[0], said[2]) and not torch.equal(said[0], said[1])
    with pytest.raises(ModelError, match=r"Toy has no TimestepEmbedding.*told = false"):
        toys.trainer(DMD(calls=4), tmp_path)
    assert toys.trainer(DMD(calls=4, told=False), tmp_path).fit() == 6


# --- memory --------------------------------------------------------------------------------------------


def held(made: Trainer) -> dict[str, int]:
    """Bytes by role: the base or the teacher, and what each trained role has of its own with its optimiser's state."""
    found = {}
    for name, player in made.players.items():
        assert player.optimizer is not None
        for parameter in player.parameters.values():
            parameter.grad = torch.empty_like(parameter)
        player.optimizer.step()
        state = [t for slots in player.optimizer.state.values() for t in slots.values()]
        found[name] = sum(t.numel() * t.element_size() for t in [*player.parameters.values(), *state])
    own = {id(p) for player in made.players.values() for p in player.parameters.values()}
    base = {id(p): p for role in made.roles.values() for p in role.host.network.parameters() if id(p) not in own}
    return found | {"teacher": sum(p.numel() * p.element_size() for p in base.values())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_one_base_weights_and_optimisers_take_two_fifths_of_what_copies_take(tmp_path: Path, dtype: torch.dtype) -> None:
    """The network of Wan 2.1 1.3B without numbers: three roles, their optimisers after a step, counted tensor by tensor."""
    from diffusers import WanTransformer3DModel

    method = DMD(calls=4)
    total: dict[bool, Mapping[str, int]] = {}
    for full in (False, True):
        with torch.device("meta"):
            network = WanTransformer3DModel(
                num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30, qk_norm="rms_norm_across_heads"
            ).to(dtype)
            assert 1.2e9 < sum(p.numel() for p in network.parameters()) < 1.6e9
            shape = (16, 21, 60, 104)
            made = HostCall(network, "transformer", Layout.of(network), {}, Flow(), shape, dtype, 1.0, None)
            roles = Roles.of_copies(made, method.trains) if full else Roles.on_one_base(made, method.trains, Adapter(64, 64.0))
        total[full] = held(Trainer(method, roles, toys.store(), TrainSettings(average=0), tmp_path, shape, progress=False))
    shared, copies = (sum(total[full].values()) for full in (False, True))
    assert total[False].keys() == total[True].keys() == {"teacher", "student", "critic"}
    assert shared <= 0.4 * copies, f"{shared / 2**30:.2f} of {copies / 2**30:.2f} GiB: {total}"
    assert total[False]["teacher"] > total[False]["student"] > 0


