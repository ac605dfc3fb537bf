"""Judges: the best opinion is known for Gaussians, the pull leads to the data, and nothing is left on the network."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.distill.loop.draw import Draw
from hasten.distill.methods.heads import Head, Judge, Rule, carried, noised, of_judge, of_student
from hasten.distill.methods.ladd import JUDGE, LADD, LADDState
from hasten.distill.network.host_call import Condition, HostCall
from hasten.distill.network.paths import Flow
from hasten.distill.network.roles import Role
from hasten.errors import ModelError, UsageError
from hasten.pipelines.host import Layout
from tests.distill import toys
from tests.distill.gaussians import Exact, Gaussian
from tests.distill.gaussians import role as exact_role
from tests.distill.test_method_contract import BLOCKS
from tests.distill.timed import host, losses, trainer

each_rule = pytest.mark.parametrize("rule", ["hinge", "softplus"])
ENDLESS = 1e9


# --- two Gaussians ---------------------------------------------------------------------------------------


def laws(x: Tensor) -> tuple[Tensor, Tensor]:
    """Densities of N(0.6, 0.5^2), the data, and N(-0.2, 0.7^2), what was made, at x."""
    return tuple(torch.distributions.Normal(m, s).log_prob(x).exp() for m, s in ((0.6, 0.5), (-0.2, 0.7)))  # type: ignore[return-value]


def expected(logits: Tensor, x: Tensor, rule: Rule) -> Tensor:
    """A judge's expected loss at each x [B], with `logits` [B] there; the other term of the loss is silenced."""
    real, fake = laws(x)
    far = torch.full_like(logits, ENDLESS)[:, None]
    said = [logits[:, None]]
    return real * of_judge(said, [-far], rule) + fake * of_judge([far], said, rule)


def test_the_best_logit_is_the_logarithm_of_the_ratio() -> None:
    x = torch.linspace(-1.5, 2.0, 29, dtype=torch.float64)
    real, fake = laws(x)
    best = (real / fake).log().requires_grad_()
    (slope,) = torch.autograd.grad(expected(best, x, "softplus").sum(), best)
    assert float(slope.abs().max()) < 1e-12
    off = (best + 0.1).detach().requires_grad_()
    (slope,) = torch.autograd.grad(expected(off, x, "softplus").sum(), off)
    assert float(slope.min()) > 0, "and any other is pulled back to it"


def test_the_best_hinge_is_the_likelier_one() -> None:
    x = torch.linspace(-1.5, 2.0, 29, dtype=torch.float64)
    real, fake = laws(x)
    best = (real - fake).sign()
    least = expected(best, x, "hinge")
    for other in (best + 0.1, best - 0.1, -best, 0 * best):
        assert bool((expected(other, x, "hinge") > least).all())


class Ratio(nn.Module):
    """A head that knows log p - log q of the noised laws, in place of one that learns."""

    def __init__(self, tau: Tensor) -> None:
        super().__init__()
        c, n = float(tau[0].cos()), float(tau[0].sin())
        self.laws = [torch.distributions.Normal(c * m, ((c * s) ** 2 + n**2) ** 0.5) for m, s in ((0.6, 0.5), (-0.2, 0.7))]

    def forward(self, features: Tensor) -> Tensor:
        p, q = (law.log_prob(features).sum(-1) for law in self.laws)
        return p - q


class Seen(Exact):
    """A network with a block that passes its input on."""

    def __init__(self) -> None:
        super().__init__(Gaussian(), Flow())
        self.eye = nn.Identity()

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        tau = self.path.angle(timestep)
        self.eye(hidden_states / self.path.scale(tau)[:, None].to(hidden_states.dtype))
        return super().forward(hidden_states, timestep, encoder_hidden_states)


@each_rule
def test_the_pull_is_the_exact_gradient_and_leads_to_the_data(rule: Rule) -> None:
    role = exact_role("teacher", Seen(), Flow())
    fixed = {"encoder_hidden_states": torch.zeros(1, 3, dtype=torch.float64)}
    judge = Judge(Role("teacher", HostCall(**{**_fields(role.host), "fixed": fixed}), None, (), False), ["eye"])
    rows = 9
    tau = torch.full((rows,), 0.6, dtype=torch.float64)
    judge.heads = nn.ModuleList([Ratio(tau)])
    condition = Condition({"encoder_hidden_states": torch.zeros(rows, 3, dtype=torch.float64)})
    made = torch.linspace(-1.2, 0.4, rows, dtype=torch.float64)[:, None].expand(-1, 3).contiguous()
    z = torch.zeros_like(made)
    value, gradient = judge.pull(made, tau, z, condition, rule)
    x = noised(made, tau, z)
    logit = judge.heads[0](x)
    (p, q), c = judge.heads[0].laws, float(tau[0].cos())
    slope = (p.mean - x) / p.variance - (q.mean - x) / q.variance
    weight = (-logit).sigmoid()[:, None] if rule == "softplus" else 1.0
    torch.testing.assert_close(gradient, -weight * slope * c)
    torch.testing.assert_close(value, nn.functional.softplus(-logit) if rule == "softplus" else -logit)
    assert bool((gradient < 0).all()), "downhill is up, towards the data's mean"


def _fields(call: HostCall) -> dict[str, Any]:
    return {name: getattr(call, name) for name in HostCall.__dataclass_fields__}


# --- heads on a network --------------------------------------------------------------------------------


def judge_of(network: nn.Module, shape: tuple[int, ...], blocks: tuple[str, ...] = (), **fixed: Any) -> Judge:
    made = HostCall(network, "site", Layout.of(network), fixed, Flow(), shape, torch.float32, 1.0, None)
    return Judge(Role("teacher", made, None, (), False), blocks, width=8)


@each_rule
def test_what_is_carried_is_what_would_flow(rule: Rule) -> None:
    """The pull that is taken first and carried on is the gradient of one loss through judge and student."""
    made_by = host()
    judge = Judge(Role("teacher", made_by, None, (), False), ("first",))
    for head in judge.heads:
        nn.init.normal_(head.last.weight)
    batch = toys.store().batch(torch.arange(4), Draw(0, 0, range(4)))
    assert batch.x0 is not None and batch.z is not None
    tau = torch.linspace(0.3, 1.2, 4, dtype=torch.float64)
    weight = torch.ones(toys.WIDTH, requires_grad=True)
    made = batch.x0 * weight
    whole = of_student(judge.asked(noised(made, tau, batch.z), tau, batch.condition), rule)
    (direct,) = torch.autograd.grad(whole.sum(), weight, retain_graph=True)
    rows, gradient = judge.pull(made, tau, batch.z, batch.condition, rule)
    torch.testing.assert_close(rows, whole.detach())
    through = carried(rows, made, gradient)
    torch.testing.assert_close(through, rows)
    (late,) = torch.autograd.grad(through.sum(), weight)
    torch.testing.assert_close(late, direct)
    assert all(p.grad is None for p in [*judge.heads.parameters(), *made_by.network.parameters()])


def test_a_new_judge_says_nothing_and_is_the_same_whatever_was_drawn_before() -> None:
    before = torch.get_rng_state()
    one, two = Head(6, 4, 1), Head(6, 4, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.first.weight, two.first.weight) and not torch.equal(one.first.weight, Head(6, 4, 2).first.weight)
    assert not bool(one(torch.randn(2, 3, 6)).any()) and one(torch.randn(2, 3, 6)).shape == (2, 3)


def test_a_head_of_one_channel_is_not_deaf() -> None:
    head = Head(1, 4, 0)
    nn.init.normal_(head.last.weight)
    said = head(torch.tensor([[[0.5]], [[-2.0]]]))
    assert not torch.equal(said[0], said[1])


class Mixed(nn.Module):
    """Blocks of all kinds: a convolution, one that returns two streams, one that turns rows into more rows."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.streams, self.more = nn.Conv2d(2, 6, 1), _Two(), _More()

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        self.streams(self.convolution(sample).flatten(2).transpose(1, 2))
        self.more(sample)
        return (sample * timestep.reshape(-1, 1, 1, 1),)


class _Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :2, :3], x


class _More(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(2, 1, 1, 1)


def test_features_are_tokens_of_what_a_block_returns_and_no_hook_stays() -> None:
    network = Mixed()
    judge = judge_of(network, (2, 3, 5), ("convolution", "streams"))
    x = torch.randn(4, 2, 3, 5)
    with judge.listening() as features:
        network(x, torch.ones(4))
    expected = network.convolution(x).flatten(2).transpose(1, 2)
    assert [tuple(each.shape) for each in features] == [(4, 15, 6)] * 2
    torch.testing.assert_close(features[0], expected)
    assert [tuple(each.shape) for each in judge.logits(features)] == [(4, 15)] * 2
    with pytest.raises(RuntimeError), judge.listening():
        network(torch.randn(4, 3, 3, 5), torch.ones(4))
    assert not any(module._forward_hooks for module in network.modules())


def test_networks_that_cannot_be_listened_to_are_refused() -> None:
    network = Mixed()
    with pytest.raises(ModelError, match=r"Mixed keeps no lists of blocks.*`blocks`"):
        judge_of(network, (2, 3, 5))
    with pytest.raises(UsageError, match=r"Mixed has no block 'stream'.*streams"):
        judge_of(network, (2, 3, 5), ("stream",))
    with pytest.raises(ModelError, match=r"more of Mixed cannot be judged: 1 of them answered, 1 with something else"):
        judge_of(network, (2, 3, 5), ("more",))
    assert not any(module._forward_hooks for module in network.modules())
    judge = judge_of(network, (2, 3, 5), ("streams",))
    with pytest.raises(ModelError, match="1 blocks were listened to, and 2 answers came"):
        judge.logits([torch.zeros(1, 15, 6)] * 2)


def test_four_blocks_of_a_transformer_are_chosen_evenly() -> None:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=7, freq_dim=8, ffn_dim=16,
        num_layers=6,
    )  # fmt: skip
    judge = judge_of(network, (4, 3, 4, 6), encoder_hidden_states=torch.randn(1, 5, 7), return_dict=False)
    assert judge.names == ("blocks.1", "blocks.2", "blocks.3", "blocks.5")
    for head in judge.heads:
        nn.init.normal_(head.last.weight)
    x0, z = torch.randn(2, 2, 4, 3, 4, 6)
    condition = Condition({"encoder_hidden_states": torch.randn(2, 5, 7)})
    tau = torch.tensor([0.4, 1.1], dtype=torch.float64)
    rows, gradient = judge.pull(x0, tau, z, condition, "hinge")
    assert rows.shape == (2,) and gradient.shape == x0.shape and bool(gradient.flatten(1).any(1).all())


# --- in the loop ---------------------------------------------------------------------------------------

def test_rows_that_start_at_pure_noise_are_as_many_as_asked(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    for top in (0.0, 0.5, 1.0):
        made = trainer(LADD(blocks=BLOCKS, calls=4, top=top), tmp_path)
        state = made.state
        assert isinstance(state, LADDState)
        student = made.roles["student"]

        class Watched:
            def velocity(self, x: Tensor, tau: Tensor, condition: Condition, student: Role = student) -> Tensor:
                seen.append(tau)
                return student.velocity(x, tau, condition)

        state.asked = lambda draw: Watched()  # type: ignore[assignment, return-value]
        draw = Draw(0, 0, range(200))
        state.loss("student", made.data.batch(torch.arange(200) % 24, draw), draw, 0, {})
    first = [float((tau == tau.max()).double().mean()) for tau in seen]
    assert first == pytest.approx([0.25, 0.625, 1.0], abs=0.1)


def test_the_judge_learns_to_tell_and_the_student_to_please(tmp_path: Path) -> None:
    """Trained alone, the judge's opinions part; a student that then follows its pull gets better ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        made = trainer(LADD(blocks=BLOCKS, top=1.0), tmp_path, steps=40)
    judge, student = made.players[JUDGE], made.players["student"]

    def trained(phase: str, steps: int) -> list[dict[str, float]]:
        told = []
        for step in range(steps):
            found = dict(zip(made.state.phases(step), losses(made, list(range(24)), step), strict=True))
            found[phase].rows.mean().backward()
            for player in (judge, student):
                assert player.optimizer is not None
                if player.name == phase:
                    player.optimizer.step()
                player.optimizer.zero_grad()
            told.append({"student": float(found["student"].rows.mean()), "gap": _gap(found[JUDGE].metrics)})
        return told

    alone = trained(JUDGE, 20)
    assert alone[0]["gap"] == 0 and alone[-1]["gap"] > 0.1
    pleased = trained("student", 20)
    assert pleased[-1]["student"] < pleased[0]["student"] - 0.05


def _gap(metrics: dict[str, Tensor]) -> float:
    return float(metrics["real"] - metrics["fake"])
