"""Distribution matching: the student's samples are moved to where the teacher finds them likelier than their own law does.

Yin et al., Improved Distribution Matching Distillation (DMD2), arXiv 2405.14867, sections 4.1 to 4.5; the gradient: DMD,
arXiv 2311.18828, equations 7 and 8. At x = cos(tau) x0 + sin(tau) z of a sample x0 of the student,

    g = (x0_critic(x) - x0_teacher(x)) / mean |x0 - x0_teacher(x)|,      L = |x0 - sg(x0 - g)|^2 / 2

where the critic is a diffusion model of the student's own samples (trained on them, `ratio` times as often as the student)
and x0_teacher is guided. Before it is divided, g is tan^2(tau) times the gradient of KL(student || teacher) at level tau.
With several calls a sample is made as it will be made later: by the student's own calls from noise, up to an exit that is
drawn for the whole batch ("backward simulation"); gradients pass the last call alone, and none is made after it.

What differs from the papers: the critic is told by which exit a sample came (`told`). One that is not models the mixture of
all exits, and then only the mixture is matched: an early exit that makes too little variety is made up for by a last
one that makes too much, and it is the last one that is used (docs/training-images.md has the measurement). The critic's further turns in
a step see fresh samples. The judge's gradient reaches the student through its sample, added to g.

Shapes: B rows; x, x0, z, F [B, ...]; tau float64 [B] radians; an exit is the number of the student's last call, from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Data, Facts, Loss, Method, MethodState
from hasten.distill.methods.heads import Judge, carried, noised, of_judge
from hasten.distill.network.few_steps import FewSteps
from hasten.distill.network.guided_teacher import GuidedTeacher
from hasten.distill.network.hint import Hint, Hinted
from hasten.distill.network.host_call import Condition
from hasten.distill.network.paths import NoisePath, turned
from hasten.distill.network.roles import Role

LEAST = 1e-6
"""Of the mean distance that a gradient is divided by: a sample that the teacher leaves as it is needs no change."""


class DMD(Method):
    """A student whose samples have the teacher's distribution, from prompts alone.

    scale: guidance of the teacher. calls, how: how the student is sampled. ratio: trainings of the critic for each of the
    student. low, high: shares of the network's own time between which samples are compared. told: the critic hears by which
    exit a sample came (with several calls). last: how many times as often as each other exit the last one is trained.
    """

    kind: ClassVar[str] = "dmd"
    composable: ClassVar[bool] = True
    trains: ClassVar[tuple[str, ...]] = ("student", "critic")
    data: ClassVar[Data] = "prompts"
    scale: float = Field(3.0, ge=0)
    calls: int = Field(1, ge=1)
    how: Literal["consistency", "ode"] = "consistency"
    ratio: int = Field(5, ge=1)
    low: float = Field(0.02, gt=0, lt=1)
    high: float = Field(0.98, gt=0, lt=1)
    told: bool = True
    last: int = Field(1, ge=1)

    def start(self, facts: Facts) -> MethodState:
        return DMDState(self, facts)


class DMDGAN(DMD):
    """DMD with a judge on the critic's features, who knows data: what the teacher has never learnt can be learnt, too.

    weight: of the judge's pull on the student. judged: of the judge's loss beside the critic's own. blocks, width: as in
    `ladd`.
    """

    kind: ClassVar[str] = "dmd-gan"
    composable: ClassVar[bool] = False
    data: ClassVar[Data] = "latents"
    weight: float = Field(5e-3, ge=0)
    judged: float = Field(1e-2, gt=0)
    blocks: tuple[str, ...] = ()
    width: int = Field(64, ge=1)

    def start(self, facts: Facts) -> MethodState:
        return _JudgedState(self, facts)


class Rollout:
    """How the student comes to its sample in training: its own calls from noise. For causal video (Self-Forcing,
    arXiv 2506.08009) another class takes this one's place, whose `until` goes on from the frames that are there."""

    def __init__(self, student: Role, steps: FewSteps, shape: tuple[int, ...]) -> None:
        self.student, self.steps, self.shape = student, steps, shape

    def made(self, batch: Batch, draw: Draw, purpose: str, exit: int, graph: bool) -> Tensor:
        """x0 [B, ...] of the call `exit`. graph: whether that call can be differentiated; those before it never can."""
        x, tau = self.until(batch, draw, purpose, exit)
        with nullcontext() if graph else torch.no_grad():
            return self.student.data(x, tau, batch.condition)

    @torch.no_grad()
    def until(self, batch: Batch, draw: Draw, purpose: str, exit: int) -> tuple[Tensor, Tensor]:
        """(x, tau) of which the student is asked in this call, after those before it."""
        host = self.student.host
        like = torch.empty(len(batch), *self.shape, dtype=torch.promote_types(host.dtype, torch.float32), device=draw.device)
        x = z = draw.normal(f"{purpose}.start", like)
        for number in range(exit):
            tau, after = self._angle(number, like), self._angle(number + 1, like)
            velocity = self.student.velocity(x, tau, batch.condition)
            x0 = turned(x, velocity, tau)
            if self.steps.how == "consistency":
                z = draw.normal(f"{purpose}.again.{number}", like)
                x = noised(x0, after, z)
            else:
                x = turned(x, velocity, tau - after)
        return x, self._angle(exit, like)

    def _angle(self, number: int, like: Tensor) -> Tensor:
        return torch.full((len(like),), self.steps.angles[number], dtype=torch.float64, device=like.device)


class DMDState(MethodState):
    """The student's loss, and the critic's on the same sample and on fresh ones."""

    def __init__(self, method: DMD, facts: Facts) -> None:
        super().__init__(facts)
        self.method = method
        path = facts.roles["student"].host.path
        self.steps = FewSteps.even(method.calls, path, method.how)
        self.rollout = Rollout(facts.roles["student"], self.steps, facts.shape)
        self.teacher = GuidedTeacher(facts, (method.scale, method.scale), told=False)
        self.hint = Hint(facts.roles.of("critic").host.network) if method.told and method.calls > 1 else None

    def phases(self, step: int) -> Sequence[str]:
        return ("student", *("critic",) * self.method.ratio)

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        if phase == "student":
            exit = self.exit(draw, "student")
            made = self.rollout.made(batch, draw, "student", exit, graph=True)
            return self.matched(made, exit, batch, draw)
        turn = int(kept.get("dmd.turn", 0))
        if turn == 0 and "dmd.made" in kept:
            made, exit = kept["dmd.made"], int(kept["dmd.exit"])
        else:
            exit = self.exit(draw, f"critic.{turn}")
            made = self.rollout.made(batch, draw, f"critic.{turn}", exit, graph=False)
        loss = self.scored(made, exit, batch, draw, turn)
        return Loss(loss.rows, loss.metrics, {"dmd.turn": turn + 1})

    def matched(self, made: Tensor, exit: int, batch: Batch, draw: Draw) -> Loss:
        """The student's loss on its sample."""
        tau, z = self._level("student", made, draw)
        fake, real = self.seen(made.detach(), tau, z, exit, batch)
        gap, apart = fake - real, (made.detach() - real).abs().flatten(1).mean(1)
        aim = made.detach() - gap / apart.clamp(min=LEAST).reshape(-1, *[1] * (gap.ndim - 1))
        rows = (made - aim).flatten(1).square().mean(1) / 2
        metrics = {"gap": gap.flatten(1).square().mean(1).sqrt().mean(), "apart": apart.mean()}
        return Loss(rows, metrics, {"dmd.made": made.detach(), "dmd.exit": exit})

    @torch.no_grad()
    def seen(self, made: Tensor, tau: Tensor, z: Tensor, exit: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """(x0 as the critic sees it, x0 as the guided teacher does) of a sample at this level."""
        x = noised(made, tau, z)
        fake = self.critic(exit).velocity(x, tau, batch.condition)
        return turned(x, fake, tau), turned(x, self.teacher.velocity(self.method.scale, x, tau, batch), tau)

    def scored(self, made: Tensor, exit: int, batch: Batch, draw: Draw, turn: int) -> Loss:
        """The critic's loss on a sample: that of any diffusion model, without guidance."""
        tau, z = self._level(f"critic.{turn}", made, draw)
        said = self.critic(exit).velocity(noised(made, tau, z), tau, batch.condition)
        return Loss((said - noised(z, tau, -made)).flatten(1).square().mean(1))

    def critic(self, exit: int) -> Role | Hinted:
        """The critic, told of which exit's samples it is to speak."""
        critic = self.roles["critic"]
        return critic if self.hint is None else Hinted(critic, self.hint, float(exit))

    def exit(self, draw: Draw, purpose: str) -> int:
        """The number of the student's last call in this training."""
        calls = self.method.calls
        return min(draw.one_below(f"{purpose}.exit", calls - 1 + self.method.last), calls - 1)

    def _level(self, purpose: str, like: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """(tau float64 [B], z [B, ...]) at which samples are looked at, evenly in the network's own time."""
        share = self.method.low + (self.method.high - self.method.low) * draw.uniform(f"{purpose}.time")
        path = self.roles["student"].host.path
        return path.angle(share * _end(path)).to(like.device), draw.normal(f"{purpose}.noise", like.detach())

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        return [("exit", self.hint.module)] if role == "critic" and self.hint is not None else []

    def sampler(self) -> FewSteps:
        return self.steps


class _JudgedState(DMDState):
    """With a judge, who is trained with the critic, and whose features are the critic's."""

    def __init__(self, method: DMDGAN, facts: Facts) -> None:
        super().__init__(method, facts)
        self.weights = method.weight, method.judged
        self.judge = Judge(facts.roles["critic"], method.blocks, method.width)

    def matched(self, made: Tensor, exit: int, batch: Batch, draw: Draw) -> Loss:
        own = super().matched(made, exit, batch, draw)
        tau, z = self._level("judge", made, draw)
        speak = self.critic(exit).velocity
        rows, gradient = self.judge.pull(made, tau, z, batch.condition, "softplus", speak)
        pulled = gradient.flatten(1).square().mean(1).sqrt().mean()
        metrics = own.metrics | {"judge": rows.mean(), "judge.pull": pulled}
        return Loss(own.rows + self.weights[0] * carried(rows, made, gradient), metrics, own.keep)

    def scored(self, made: Tensor, exit: int, batch: Batch, draw: Draw, turn: int) -> Loss:
        """Sample and data in one evaluation, at one level and with one noise."""
        assert batch.x0 is not None
        tau, z = self._level(f"critic.{turn}", made, draw)
        x = torch.cat([noised(each, tau, z) for each in (made, batch.x0)])
        twice = Condition.join([batch.condition, batch.condition])
        with self.judge.listening() as features:
            said = self.critic(exit).velocity(x, torch.cat([tau, tau]), twice)[: len(made)]
        fake, real = ([part[k] for part in map(_halves, self.judge.logits(features))] for k in (0, 1))
        judged = of_judge(real, fake, "softplus")
        rows = (said - noised(z, tau, -made)).flatten(1).square().mean(1)
        return Loss(rows + self.weights[1] * judged, {"judged": judged.mean(), "score": rows.mean()})

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        return [*super().heads(role), *([("judge", self.judge.heads)] if role == "critic" else [])]


def _halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    one, two = rows.chunk(2)
    return one, two


def _end(path: NoisePath) -> float:
    """The network's time at its noisiest."""
    angle = getattr(path, "end", torch.pi / 2)
    return float(path.time(torch.tensor([angle], dtype=torch.float64)))
