"""Distribution matching in the loop: samples as they will be made, what the critic sees, one base for three roles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.distill.loop.draw import Draw
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.method import Loss
from hasten.distill.methods.dmd import DMD, DMDState
from hasten.distill.network.few_steps import sample
from hasten.distill.network.host_call import HostCall
from hasten.distill.network.paths import Flow
from hasten.distill.network.roles import Adapter, Roles
from hasten.errors import ModelError
from hasten.pipelines.host import Layout
from tests.distill import toys
from tests.distill.timed import losses, trainer

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


