"""Fine-tuning on data of one's own: noise is put on a picture, and the network says what it always says about it.

The plainest way to train: flow matching (arXiv 2210.02747, section 4.1) or the prediction of noise (arXiv 2006.11239,
equation 14), whichever the network was made for, against the data themselves. No teacher is asked. The student is
sampled like the model it came from, in as many steps.

Shapes: B rows; x0, z, network outputs [B, ...] in the network's own scale; tau, alpha, sigma float64 [B].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Data, Facts, Loss, Method, MethodState
from hasten.distill.network.paths import HALF_TURN, Flow, NoisePath, spread
from hasten.errors import UsageError

Times = Literal["usual", "logit-normal", "uniform"]
"""How often each noise level is trained. `usual`: logit-normal for flow matching, uniform for the rest."""


class Lora(Method):
    """The network's own loss on own pictures or clips, with an adapter, or with all weights (`student.full`).

    times: see `Times`. center, width: mean and deviation of the logit of the share of time, for `logit-normal` (arXiv
    2403.03206, section 3.1; 0 and 1 as there). shift > 1 trains noisier levels more often, as the schedulers of large
    models sample them: t s / (1 + (s - 1) t). min_snr: gamma of Min-SNR weights (arXiv 2303.09556, section 3.4), 0 for
    equal ones; flow matching has none.
    """

    kind: ClassVar[str] = "lora"
    data: ClassVar[Data] = "own"
    times: Times = "usual"
    center: float = 0.0
    width: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0)
    min_snr: float = Field(0.0, ge=0)

    def start(self, facts: Facts) -> MethodState:
        """Raises `UsageError` for Min-SNR weights on flow matching."""
        return _LoraState(self, facts)


class _LoraState(MethodState):
    def __init__(self, method: Lora, facts: Facts) -> None:
        super().__init__(facts)
        self.method = method
        self.path = facts.roles["student"].host.path
        if method.min_snr and self.path.output == "flow":
            raise UsageError(
                "method.min_snr weighs predictions of noise, v or data; this network predicts a flow. Leave it out, or"
                " move the times with method.center and method.shift."
            )

    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        assert batch.x0 is not None
        x0, z = batch.x0, draw.normal("z", batch.x0)
        tau = angles(self.method, self.path, draw)
        x = spread(tau.cos(), x0) * x0 + spread(tau.sin(), x0) * z
        told = self.roles["student"].answer(x, tau, batch.condition)
        rows = (told - aim(self.path, x0, z, tau)).square().flatten(1).mean(1)
        if not self.method.min_snr:
            return Loss(rows)
        return Loss(rows * self._weights(tau).to(rows.device, rows.dtype), {"unweighted": rows.detach().mean()})

    def _weights(self, tau: Tensor) -> Tensor:
        """[B]: min(snr, gamma) on the error of data, in the terms of what the network predicts."""
        alpha, sigma = self.path.levels(tau)
        snr = (alpha / sigma).square()
        error_of_data = {"epsilon": 1 / snr, "v_prediction": 1 / (snr + 1), "sample": torch.ones_like(snr)}
        return snr.clamp(max=self.method.min_snr) * error_of_data[self.path.output]


def angles(method: Lora, path: NoisePath, draw: Draw) -> Tensor:
    """Noise levels to train at, as angles. A network with a table of times is asked at those times alone."""
    flow = isinstance(path, Flow)
    if method.times == "logit-normal" or (method.times == "usual" and flow):
        share = torch.sigmoid(method.center + method.width * draw.gaussian("tau"))
    else:
        share = draw.uniform("tau")
    share = method.shift * share / (1 + (method.shift - 1) * share)
    end = float(path.time(torch.tensor([getattr(path, "end", HALF_TURN)], dtype=torch.float64)))
    return path.angle(share * end if flow else (share * (end + 1)).floor().clamp(max=end))


def aim(path: NoisePath, x0: Tensor, z: Tensor, tau: Tensor) -> Tensor:
    """What a network that knew both would say: z - x0, z, alpha z - sigma x0, or x0."""
    if path.output == "flow":
        return z - x0
    if path.output == "epsilon":
        return z
    if path.output == "sample":
        return x0
    alpha, sigma = (spread(level, x0) for level in path.levels(tau))
    return alpha * z - sigma * x0
