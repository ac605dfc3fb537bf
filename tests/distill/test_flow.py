"""Fine-tuning: the loss is the network's own, at the times asked for, with the weights asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Facts
from hasten.distill.methods.flow import Lora, angles
from hasten.distill.network.paths import Flow, NoisePath, VariancePreserving
from hasten.errors import UsageError
from tests.distill import toys

BETAS = torch.linspace(1e-3, 0.03, 50, dtype=torch.float64)
TABLE = (1 - BETAS).cumprod(0)


def paths() -> list[NoisePath]:
    outputs: list[Any] = ["epsilon", "v_prediction", "sample"]
    return [Flow(), Flow(1.0), *(VariancePreserving(TABLE, output) for output in outputs)]


def known(path: NoisePath, x0: Tensor, z: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """(the network's input, its best answer) written as in the papers, from times and not from angles."""
    if isinstance(path, Flow):
        sigma = (time / path.unit)[:, None]
        return (1 - sigma) * x0 + sigma * z, z - x0
    alpha_bar = TABLE[time.round().long()][:, None]
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    best = {"epsilon": z, "v_prediction": alpha * z - sigma * x0, "sample": x0}
    return alpha * x0 + sigma * z, best[path.output]


@pytest.mark.parametrize("path", paths(), ids=lambda path: f"{path.output}-{getattr(path, 'unit', 50):g}")
def test_the_loss_is_the_networks_own(path: NoisePath) -> None:
    method = Lora()
    roles = toys.roles(method, full=True, path=path)
    network = roles["student"].host.network.double()
    roles["student"].host.__dict__["dtype"] = torch.float64
    draw = Draw(3, 5, range(6))
    batch = toys.store().batch(torch.arange(6), draw)
    batch.x0 = batch.x0.double() if batch.x0 is not None else None
    batch.condition.tensors["encoder_hidden_states"] = batch.condition.tensors["encoder_hidden_states"].double()
    rows = method.start(Facts(roles, 10, (toys.WIDTH,))).loss("student", batch, draw, 5, {}).rows
    assert batch.x0 is not None
    time = path.time(angles(method, path, draw))
    x, best = known(path, batch.x0, draw.normal("z", batch.x0), time)
    said = network(x, time, batch.condition.tensors["encoder_hidden_states"])[0]
    torch.testing.assert_close(rows, (said - best).square().mean(1), rtol=1e-9, atol=0)


def test_times_are_those_of_the_network() -> None:
    draw = Draw(0, 0, range(4000))
    table = VariancePreserving(TABLE)
    asked = table.time(angles(Lora(), table, draw))
    torch.testing.assert_close(asked, asked.round(), rtol=0, atol=1e-6)
    assert asked.round().unique().tolist() == list(range(50))
    share = Flow().time(angles(Lora(), Flow(), draw)) / 1000
    logit = torch.logit(share)
    assert abs(float(logit.mean())) < 0.06 and abs(float(logit.std()) - 1) < 0.05
    moved = Flow().time(angles(Lora(center=0.5, width=0.3), Flow(), draw)) / 1000
    assert abs(float(torch.logit(moved).mean()) - 0.5) < 0.02 and abs(float(torch.logit(moved).std()) - 0.3) < 0.02
    even = Flow().time(angles(Lora(times="uniform"), Flow(), draw)) / 1000
    assert abs(float(even.mean()) - 0.5) < 0.02 and abs(float(even.std()) - 12**-0.5) < 0.02
    shifted = Flow().time(angles(Lora(times="uniform", shift=3.0), Flow(), draw)) / 1000
    torch.testing.assert_close(shifted, 3 * even / (1 + 2 * even))


@pytest.mark.parametrize("output", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_the_data(output: Any) -> None:
    """Whatever the network predicts, an error of its data counts min(snr, gamma) times."""
    path = VariancePreserving(TABLE, output)
    draw = Draw(1, 1, range(12))
    batch = toys.store().batch(torch.arange(12), draw)
    losses = []
    for gamma in (0.0, 2.5):
        method = Lora(min_snr=gamma)
        state = method.start(Facts(toys.roles(method, path=path), 10, (toys.WIDTH,)))
        losses.append(state.loss("student", batch, draw, 1, {}).rows)
    alpha, sigma = path.levels(angles(Lora(), path, draw))
    snr = alpha.square() / sigma.square()
    weight = torch.minimum(snr, torch.full_like(snr, 2.5)) * {
        "epsilon": sigma.square() / alpha.square(), "v_prediction": sigma.square(), "sample": torch.ones_like(snr)
    }[output]  # fmt: skip
    torch.testing.assert_close(losses[1], losses[0] * weight.float(), rtol=1e-4, atol=1e-7)


def test_min_snr_is_refused_for_flows() -> None:
    method = Lora(min_snr=5.0)
    with pytest.raises(UsageError, match="min_snr weighs predictions of noise, v or data; this network predicts a flow"):
        method.start(Facts(toys.roles(method), 10, (toys.WIDTH,)))


@pytest.mark.parametrize("full", [False, True])
def test_training_lowers_the_loss(tmp_path: Path, full: bool) -> None:
    """Against the same draws before and after, so that luck has no part in it."""
    done = toys.trainer(Lora(), tmp_path / "a", full=full, steps=150, lr=2e-2)

    def now() -> float:
        draw = Draw(9, 9, range(24))
        with torch.no_grad():
            return float(done.state.loss("student", done.data.batch(torch.arange(24), draw), draw, 0, {}).rows.mean())

    before = now()
    teacher = [value.detach().clone() for value in done.roles["teacher"].host.network.parameters()]
    done.fit()
    assert now() < 0.9 * before
    if full:
        assert all(torch.equal(a, b) for a, b in zip(teacher, done.roles["teacher"].parameters().values(), strict=True))
