"""What each stage gives a causal video student: clips of a Gaussian process, of which everything is known.

    python benchmarks/causal_clips.py [--steps 100] [--seeds 1]

Frames follow one another with correlation 0.9. The teacher is exact and sees all frames; the student is a small Wan network that
began as a fit of it, and makes chunks of two frames in two calls each. A line of JSON for each way of training: the divergence KL
(in nats, of six frames) between the covariance of 8192 clips of its own and that of the process, the variance of the first and the
last frame (1 is right), and the correlation over the last border between chunks (0.9 is right).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Method
from hasten.distill.methods.causal import Causal
from hasten.distill.methods.self_forcing import Magic141, SelfForcing
from hasten.distill.network.chunks import Chunks, ChunkSteps
from hasten.distill.network.few_steps import sample
from hasten.distill.network.host_call import Condition, HostCall
from hasten.distill.network.paths import HALF_TURN, Flow, spread
from hasten.distill.network.roles import Role, Roles
from hasten.pipelines.host import Layout

PATH, FRAMES, ROWS, COUNT, ALIKE = Flow(), 6, 64, 8192, 0.9
SHAPE = (2, FRAMES, 1, 1)
LAW = ALIKE ** (torch.arange(FRAMES)[:, None] - torch.arange(FRAMES)).abs().double()
"""Covariance of the frames."""

TO_DATA = torch.linalg.eigh(LAW)
ROOT = (TO_DATA[1] * TO_DATA[0].sqrt()) @ TO_DATA[1].T
"""What the teacher's trajectories make of noise, as a matrix on the frames: the symmetric root."""

FORCING: dict[str, Any] = {"calls": 2, "chunk": 2, "ratio": 2, "scale": 1.0}
WAYS: dict[str, tuple[Method, ...]] = {
    "causal, finished frames": (Causal(calls=2, chunk=2),),
    "causal, noisy frames": (Causal(calls=2, chunk=2, context="noisy"),),
    "self-forcing": (SelfForcing(**FORCING),),
    "causal, then self-forcing": (Causal(calls=2, chunk=2), SelfForcing(**FORCING)),
    "magic141": (Magic141(calls=2, ratio=2, scale=1.0),),
    "causal with a first chunk of one, then magic141": (Causal(calls=2, chunk=5, first=1), Magic141(calls=2, ratio=2, scale=1.0)),
}


class Teacher(nn.Module):
    """The process's own velocity of flow matching."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        x, sigma = hidden_states.double(), spread(timestep.double() / 1000, hidden_states.double())
        own, values = torch.einsum("bcfhw,fk->bckhw", x, TO_DATA[1]), TO_DATA[0][:, None, None]
        weight = (1 - sigma) * values / ((1 - sigma).square() * values + sigma.square())
        x0 = torch.einsum("bckhw,fk->bcfhw", own * weight, TO_DATA[1])
        return (((x - x0) / sigma).float(),)


class Together(Draw):
    """One generator for all rows: the networks are so small that a generator for each would be most of the work."""

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator(purpose, 0))

    def uniform(self, purpose: str) -> Tensor:
        return torch.rand(len(self.rows), generator=self._generator(purpose, 0), dtype=torch.float64)

    def below(self, purpose: str, high: int) -> Tensor:
        return torch.randint(high, (len(self.rows),), generator=self._generator(purpose, 0))


def role(name: str, network: nn.Module) -> Role:
    fixed = {"return_dict": False} if isinstance(network, WanTransformer3DModel) else {}
    host = HostCall(network, name, Layout.of(network), fixed, PATH, SHAPE, torch.float32, 1.0, None)
    return Role(name, host, None, (), True)


def nothing(rows: int) -> Condition:
    return Condition({"encoder_hidden_states": torch.zeros(rows, 1, 8)})


def pairs(step: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """(what the teacher makes of noise, the noise)."""
    z = torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(10_000 + step))
    return torch.einsum("fk,bckhw->bcfhw", ROOT.float(), z), z


def fitted(steps: int) -> Any:
    """A network that has learnt the teacher's velocity, all frames at one level: what a pretrained model is."""
    torch.manual_seed(0)
    network: Any = WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=12, in_channels=2, out_channels=2, text_dim=8,
        freq_dim=32, ffn_dim=48, num_layers=2, rope_max_seq_len=16,
    )  # fmt: skip
    student, teacher, optimizer = role("student", network), role("teacher", Teacher()), torch.optim.Adam(network.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        x0, _ = pairs(step)
        tau = (0.02 + 0.98 * torch.rand(ROWS, dtype=torch.float64)) * HALF_TURN
        x = spread(tau.cos(), x0) * x0 + spread(tau.sin(), x0) * torch.randn_like(x0)
        loss = (student.velocity(x, tau, nothing(ROWS)) - teacher.velocity(x, tau, nothing(ROWS))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


@torch.no_grad()
def judged(chunks: Chunks) -> dict[str, float]:
    """Of clips that this student makes."""
    start = torch.randn(COUNT, *SHAPE, generator=torch.Generator().manual_seed(5))

    def noise(number: int, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(100 + number))

    made = sample(chunks, start, nothing(COUNT), chunks.steps, noise).double()
    own = made.permute(0, 1, 3, 4, 2).reshape(-1, FRAMES).T.cov()
    both = torch.linalg.solve(LAW, own)
    divergence = 0.5 * float(both.trace() - FRAMES - torch.logdet(both))
    border = FRAMES - chunks.spans(FRAMES)[-1][1] + chunks.spans(FRAMES)[-1][0]
    alike = own[border - 1, border] / (own[border - 1, border - 1] * own[border, border]).sqrt()
    found = {"kl": divergence, "first": float(own[0, 0]), "last": float(own[-1, -1]), "border": float(alike)}
    return {name: round(value, 3) for name, value in found.items()}


def trained(network: Any, method: Method, steps: int, seed: int) -> tuple[Any, Chunks]:
    """(the student's average, how it is sampled)."""
    roles = Roles(teacher=role("teacher", Teacher()))
    for name in method.trains:
        # A critic begins as a fit of the teacher, not of the student before.
        roles[name] = role(name, copy.deepcopy(network[name]))
    state: Any = method.start(Facts(roles, steps, SHAPE))
    weights = {name: list(roles[name].host.network.parameters()) for name in method.trains}
    for name in weights:
        weights[name] += [p for _, head in state.heads(name) for p in head.parameters()]
    rates = {"student": 1e-3 if method.kind == "causal" else 3e-4, "critic": 1e-3}
    optimizers = {name: torch.optim.Adam(weights[name], betas=(0.9, 0.99)) for name in weights}
    average = copy.deepcopy(roles["student"].host.network).requires_grad_(False)
    for step in range(steps):
        factor = min(1, (step + 1) / 20) * min(1, (steps - step) / (0.3 * steps))
        draw, kept, (x0, z) = Together(seed, step, range(ROWS)), dict[str, Any](), pairs(step + steps * seed)
        for phase in state.phases(step):
            loss = state.loss(phase, Batch(nothing(ROWS), nothing(1), x0, z, SHAPE), draw, step, kept)
            kept |= loss.keep
            loss.rows.mean().backward()
            optimizers[phase].param_groups[0]["lr"] = rates[phase] * factor
            nn.utils.clip_grad_norm_(weights[phase], 1.0)
            optimizers[phase].step()
            optimizers[phase].zero_grad()
        decay = min(0.98, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(roles["student"].host.network.parameters()), 1 - decay)
    return average, Chunks(role("student", average), state.sampler())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    network = fitted(4 * given.steps)
    plain = replace(ChunkSteps.even(2, PATH), chunk=2)
    print(json.dumps({"way": "as it was", **judged(Chunks(role("student", network), plain))}), flush=True)
    for seed in range(given.seeds):
        for way, methods in WAYS.items():
            began, student = time.process_time(), network
            for method in methods:
                student, chunks = trained({"student": student, "critic": network}, method, given.steps, seed)
            seconds = round(time.process_time() - began, 1)
            print(json.dumps({"way": way, "seed": seed, **judged(chunks), "cpu_seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
