"""Methods learn the exact map of a mixture: a student that starts as the teacher ends nearer to where quantiles end."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Method
from hasten.distill.methods.lcm import LCM
from hasten.distill.methods.meanflow import MeanFlow
from hasten.distill.methods.progressive import Progressive
from hasten.distill.methods.scm import SCM
from hasten.distill.network.few_steps import FewSteps, sample
from hasten.distill.network.host_call import Condition
from hasten.distill.network.paths import Flow
from hasten.distill.network.roles import Roles, follow
from tests.distill.gaussians import WIDTH, Exact, Mixture, role

STEPS, ROWS = 80, 32
METHODS: dict[str, tuple[Method, float]] = {
    "lcm": (LCM(scale=1, told=False, grid=12, huber=0, decay=0.8), 0.6),
    "scm": (SCM(scale=1, warmup=30, mean=0.5, top=0.3), 0.7),
    "meanflow": (MeanFlow(scale=1, mean=0.0, instant=0.1, whole=0.4, power=0.5), 0.75),
    "progressive": (Progressive(scale=1, first=8), 0.6),
}


class Corrected(nn.Module):
    """The exact velocity, and a small network beside it that starts at zero."""

    def __init__(self, law: Mixture) -> None:
        super().__init__()
        self.exact = Exact(law, Flow()).requires_grad_(False)
        self.time_embed = self.exact.time_embed
        torch.manual_seed(0)
        self.more = nn.Sequential(
            nn.Linear(5, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1)
        ).double()  # fmt: skip
        nn.init.zeros_(self.more[-1].weight)  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        (velocity,) = self.exact(hidden_states, timestep, encoder_hidden_states)
        tau, distance = Flow().angle(timestep), self.time_embed(timestep[:, None])[:, 0]
        told = torch.stack([tau.sin(), tau.cos(), distance], 1)[:, None].expand(-1, WIDTH, -1)
        seen = torch.stack([hidden_states, encoder_hidden_states], 2)
        return (velocity + self.more(torch.cat([seen, told], 2))[..., 0],)


def rows(step: int, law: Mixture) -> Batch:
    """Fresh rows of the law itself."""
    draw = Draw(7, step, range(ROWS))
    zeros = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    z = draw.normal("z", zeros)
    x0 = law.moved(z, torch.full((ROWS,), math.pi / 2).double(), torch.zeros(ROWS).double(), zeros)
    condition = Condition({"encoder_hidden_states": zeros})
    return Batch(condition, condition.rows(torch.tensor([0])), x0, z, (WIDTH,))


@pytest.mark.parametrize("name", METHODS)
def test_one_call_comes_nearer_to_the_exact_end(name: str) -> None:
    (method, share), law = METHODS[name], Mixture()
    made = Roles(teacher=role("teacher", Exact(law, Flow()).requires_grad_(False), Flow()))
    for each in method.trains:
        made[each] = role(each, Corrected(law), Flow())
    state = method.start(Facts(made, STEPS, (WIDTH,)))
    own = [p for p in made["student"].parameters().values() if p.requires_grad]
    heads = [p for label, module in state.heads("student") if label == "weighting" for p in module.parameters()]
    if hasattr(state, "hint"):
        state.hint.module.forward = lambda number: number[:, None]
    optimizer = torch.optim.Adam([*own, *heads], lr=1e-2)
    held = rows(10**6, law)
    assert held.x0 is not None and held.z is not None
    one = FewSteps((math.pi / 2,), "map" if isinstance(method, MeanFlow) else "ode")

    def away() -> float:
        with torch.no_grad():
            found = sample(state.student(), held.z, held.condition, one)  # type: ignore[arg-type]
        return float((found - held.x0).abs().mean())

    before = away()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, 2 * (1 - step / STEPS))
        state.loss("student", rows(step, law), Draw(0, step, range(ROWS)), step, {}).rows.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for target in method.averages:
            follow(made[target], made["student"], state.decay(target))
    after = away()
    print(f"{name}: {before:.3f} -> {after:.3f}")
    assert after < share * before
