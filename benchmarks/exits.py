"""Why four-step distribution matching fails where one step does not: what one critic of all exits is trained on.

    python benchmarks/exits.py [--steps 400] [--seeds 1]

A mixture of two Gaussians in one dimension: the teacher is exact, student and critic are small networks that begin as fits
of it, and samples are compared with the mixture's quantiles. Prints a line of JSON for each way of training: Wasserstein
distance (order 1) of the samples after each of the student's calls, before and after; the last number counts.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts
from hasten.distill.methods.dmd import DMD, DMDState
from hasten.distill.network.few_steps import FewSteps, sample
from hasten.distill.network.host_call import Condition, HostCall
from hasten.distill.network.paths import HALF_TURN, Flow, spread
from hasten.distill.network.roles import Role, Roles
from hasten.pipelines.host import Layout
from tests.distill.gaussians import Mixture

PATH, LAW, ROWS, COUNT = Flow(), Mixture(), 256, 8192
WAYS: tuple[dict[str, Any], ...] = (
    {"calls": 4, "told": False}, {"calls": 4, "told": True}, {"calls": 4, "told": False, "last": 3},
    {"calls": 4, "told": True, "last": 3}, {"calls": 1},
)  # fmt: skip


class TimestepEmbedding(nn.Module):
    """Of the name that hints look for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(16, width), nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(features)))


class Net(nn.Module):
    """x [B, 1] and its time [B] -> the velocity of flow matching [B, 1]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.time_embed = TimestepEmbedding(width)
        self.first, self.one, self.two = nn.Linear(1, width), nn.Linear(width, width), nn.Linear(width, width)
        self.last = nn.Linear(width, 1)
        self.register_buffer("rates", torch.logspace(-0.3, 1.3, 8))

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        turn = timestep[:, None] / 1000 * self.rates
        vector = self.time_embed(torch.cat([turn.sin(), turn.cos()], 1).float())
        inner = self.first(hidden_states)
        for layer in (self.one, self.two):
            inner = inner + layer(nn.functional.silu(inner + vector))
        return (self.last(nn.functional.silu(inner + vector)),)


class Teacher(nn.Module):
    """The mixture's own velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        tau = PATH.angle(timestep)
        x = hidden_states.double() / spread(PATH.scale(tau), hidden_states.double())
        p, q = (spread(factor, x) for factor in PATH.factors(tau))
        return (((LAW.velocity(x, tau, torch.zeros_like(x)) - p * x) / q).float(),)


class Together(Draw):
    """One generator for all rows: the networks are so small that a generator for each would be most of the work."""

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator(purpose, 0))

    def uniform(self, purpose: str) -> Tensor:
        return torch.rand(len(self.rows), generator=self._generator(purpose, 0), dtype=torch.float64)


def role(name: str, network: nn.Module) -> Role:
    host = HostCall(network, name, Layout.of(network), {}, PATH, (1,), torch.float32, 1.0, None)
    return Role(name, host, None, (), True)


def nothing(rows: int) -> Condition:
    return Condition({"encoder_hidden_states": torch.zeros(rows, 1)})


def quantiles() -> Tensor:
    """The mixture's, at the middles of COUNT equal shares."""
    shares = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    still = torch.zeros(COUNT, dtype=torch.float64)
    return LAW.moved(torch.special.ndtri(shares)[:, None], still + HALF_TURN, still, still[:, None])[:, 0]


def fitted(steps: int = 2500) -> Net:
    """A network that has learnt the teacher's velocity: what a pretrained model is."""
    torch.manual_seed(0)
    network, teacher, data = Net(), role("teacher", Teacher()), quantiles().float()
    student, optimizer = role("student", network), torch.optim.Adam(network.parameters(), 2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        x0, tau = data[torch.randint(COUNT, (512,))][:, None], torch.rand(512, dtype=torch.float64) * HALF_TURN
        x = spread(tau.cos(), x0) * x0 + spread(tau.sin(), x0) * torch.randn_like(x0)
        loss = (student.velocity(x, tau, nothing(512)) - teacher.velocity(x, tau, nothing(512))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


@torch.no_grad()
def distances(network: nn.Module, state: DMDState) -> list[float]:
    """Of the samples after each call, from the mixture."""
    start, found = torch.randn(COUNT, 1, generator=torch.Generator().manual_seed(5)), []
    for calls in range(1, state.method.calls + 1):
        steps = FewSteps(state.steps.angles[:calls], state.method.how)

        def noise(number: int, x: Tensor) -> Tensor:
            return torch.randn(x.shape, generator=torch.Generator().manual_seed(100 + number))

        made = sample(role("student", network), start, nothing(COUNT), steps, noise)
        found.append(round(float((made.double().flatten().sort().values - quantiles()).abs().mean()), 4))
    return found


def trained(network: Net, way: dict[str, Any], steps: int, seed: int) -> dict[str, Any]:
    """Train in this way; what came out."""
    roles = Roles(teacher=role("teacher", Teacher()), student=role("student", copy.deepcopy(network)))
    roles["critic"] = role("critic", copy.deepcopy(network))
    state = DMD(scale=1.0, **way).start(Facts(roles, steps, (1,)))
    assert isinstance(state, DMDState)
    weights = {name: list(roles[name].host.network.parameters()) for name in ("student", "critic")}
    weights["critic"] += [p for _, head in state.heads("critic") for p in head.parameters()]
    rates = {"student": 3e-4, "critic": 1e-3}
    optimizers = {name: torch.optim.Adam(weights[name], rates[name], betas=(0.9, 0.99)) for name in weights}
    average = copy.deepcopy(roles["student"].host.network).requires_grad_(False)
    before, began = distances(average, state), time.process_time()
    for step in range(steps):
        factor = min(1, (step + 1) / 20) * min(1, (steps - step) / (0.3 * steps))
        draw, kept = Together(seed, step, range(ROWS)), dict[str, Any]()
        for phase in state.phases(step):
            loss = state.loss(phase, Batch(nothing(ROWS), nothing(1)), draw, step, kept)
            kept |= loss.keep
            loss.rows.mean().backward()
            optimizers[phase].param_groups[0]["lr"] = rates[phase] * factor
            nn.utils.clip_grad_norm_(weights[phase], 1.0)
            optimizers[phase].step()
            optimizers[phase].zero_grad()
        decay = min(0.99, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in weights["student"]], 1 - decay)
    seconds = round(time.process_time() - began, 1)
    return {**way, "seed": seed, "start": before, "end": distances(average, state), "cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    assert math.isclose(float(quantiles().mean()), float((LAW.share * LAW.centres).sum()), abs_tol=1e-3)
    network = fitted()
    for seed in range(given.seeds):
        for way in WAYS:
            print(json.dumps(trained(network, way, given.steps, seed)), flush=True)


if __name__ == "__main__":
    main()
