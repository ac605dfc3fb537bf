"""Adversarial distillation: a judge with the teacher's eyes tells samples of the student from data.

Latent Adversarial Diffusion Distillation, Sauer et al., arXiv 2403.12015, section 3; beside continuous-time consistency:
SANA-Sprint, Chen et al., arXiv 2503.09641, section 3.3 and equation 12 (sCM + 0.5 adversarial). With D the heads on the
frozen teacher's features of x0 at a noise level tau that is drawn,

    judge:   [relu(1 - D(x0)) + relu(1 + D(made))] / 2        student:   -D(made)        (hinge)

What differs: the student is asked at the angles at which it will be sampled, the first of them more often (SANA-Sprint's
"max-time weighting" replaces an angle of sCM's own); no mismatched captions as further fakes, since a neighbour's caption
would make a row's loss depend on the batch; log tan(tau) has the mean -0.6 - log(0.5) for data of unit deviation; `heads.py`
says what differs in the heads.

Shapes: B rows; x0, z [B, ...]; tau float64 [B].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts, Loss, Method, MethodState
from hasten.distill.methods.heads import Judge, Rule, carried, noised, of_judge
from hasten.distill.methods.scm import SCM, SCMState
from hasten.distill.network.few_steps import FewSteps
from hasten.distill.network.hint import Hinted
from hasten.distill.network.paths import turned
from hasten.distill.network.roles import Role

JUDGE = "judge"
"""The phase, and the role of heads alone, that is the discriminator."""

Asked = Callable[[Draw], Role | Hinted]
"""The student of one step, told what it is told there."""


class LADD(Method):
    """A student whose samples, made noisy again, look to the teacher's blocks like data.

    calls: with how many the student is sampled. top: share of the rows that start at pure noise (the others at each of
    the angles alike). mean, spread: of log tan(tau) where samples are judged. rule: `hinge` or `softplus`. blocks: names
    of the modules that have heads; () for four of the network's. width: of a head.
    """

    kind: ClassVar[str] = "ladd"
    calls: int = Field(1, ge=1)
    top: float = Field(0.5, ge=0, le=1)
    mean: float = 0.1
    spread: float = Field(1.0, gt=0)
    rule: Rule = "hinge"
    blocks: tuple[str, ...] = ()
    width: int = Field(64, ge=1)

    def start(self, facts: Facts) -> LADDState:
        return LADDState(self, facts, lambda draw: facts.roles["student"])


class LADDState(MethodState):
    """The student's loss and the judge's, on one sample of the student in each step."""

    def __init__(self, method: LADD, facts: Facts, asked: Asked) -> None:
        super().__init__(facts)
        self.method, self.asked = method, asked
        self.judge = Judge(facts.roles["teacher"], method.blocks, method.width)
        self.steps = FewSteps.even(method.calls, facts.roles["student"].host.path)
        self.angles = torch.tensor(self.steps.angles, dtype=torch.float64)

    def phases(self, step: int) -> Sequence[str]:
        return ("student", JUDGE)

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        assert batch.x0 is not None
        if phase == JUDGE:
            return self._judged(batch.x0, kept["ladd.made"], batch, draw)
        angles = self.angles.to(batch.x0.device)
        tau = torch.where(draw.uniform("ladd.top") < self.method.top, angles[0], angles[draw.below("ladd.call", len(angles))])
        x = noised(batch.x0, tau, draw.normal("ladd.noise", batch.x0))
        made = turned(x, self.asked(draw).velocity(x, tau, batch.condition), tau)
        level, z = self._renoised("student", made, draw)
        rows, gradient = self.judge.pull(made, level, z, batch.condition, self.method.rule)
        metrics = {"pull": gradient.flatten(1).square().mean(1).sqrt().mean()}
        return Loss(carried(rows, made, gradient), metrics, {"ladd.made": made.detach()})

    def _judged(self, x0: Tensor, made: Tensor, batch: Batch, draw: Draw) -> Loss:
        """Data and sample at one level, with one noise: only what differs between them is left to tell them apart."""
        tau, z = self._renoised(JUDGE, x0, draw)
        with torch.no_grad():
            features = [self._seen(noised(each, tau, z), tau, batch) for each in (x0, made)]
        real, fake = (self.judge.logits(each) for each in features)
        rows = of_judge(real, fake, self.method.rule)
        means = {name: torch.stack([each.mean() for each in said]).mean() for name, said in (("real", real), ("fake", fake))}
        return Loss(rows, means)

    def _seen(self, x: Tensor, tau: Tensor, batch: Batch) -> list[Tensor]:
        with self.judge.listening() as features:
            self.judge.role.velocity(x, tau, batch.condition)
        return features

    def _renoised(self, whose: str, like: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """(tau float64 [B], z [B, ...]) at which a judge looks."""
        m = self.method
        tau = (m.mean + m.spread * draw.gaussian(f"ladd.{whose}.time")).exp().atan()
        return tau.to(like.device), draw.normal(f"ladd.{whose}.noise", like.detach())

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        return [("judge", self.judge.heads)] if role == JUDGE else []

    def sampler(self) -> FewSteps:
        return self.steps


class SanaSprint(SCM):
    """Continuous-time consistency with a judge beside it: consistency keeps the variety, the judge the sharpness.

    All of `scm`, and `adversary`: the judge's part, with `weight`. Both are sampled in `calls` of scm.
    """

    kind: ClassVar[str] = "sana-sprint"
    composable: ClassVar[bool] = False
    adversary: LADD = LADD()
    weight: float = Field(0.5, ge=0)

    def start(self, facts: Facts) -> MethodState:
        return _SprintState(self, facts)


class _SprintState(SCMState):
    def __init__(self, method: SanaSprint, facts: Facts) -> None:
        super().__init__(method, facts)
        self.weight = method.weight
        adversary = method.adversary.model_copy(update={"calls": method.calls})
        self.ladd = LADDState(adversary, facts, lambda draw: self.teacher.student(self.teacher.draw(draw)))

    def phases(self, step: int) -> Sequence[str]:
        return self.ladd.phases(step)

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        other = self.ladd.loss(phase, batch, draw, step, kept)
        if phase == JUDGE:
            return other
        own = super().loss(phase, batch, draw, step, kept)
        metrics = own.metrics | other.metrics | {"adversary": other.rows.detach().mean()}
        return Loss(own.rows + self.weight * other.rows, metrics, other.keep)

    def heads(self, role: str) -> Iterable[tuple[str, nn.Module]]:
        return [*super().heads(role), *self.ladd.heads(role)]
