"""Residual shifting as a scheduler of diffusers' kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.errors import UsageError
from hasten.pipelines.residual_shift import ResidualShiftScheduler, restored
from tests.contract import seeded


def test_it_is_saved_and_loaded_as_any_scheduler(tmp_path: Path) -> None:
    ResidualShiftScheduler(power=0.5, kappa=1.0).save_pretrained(tmp_path)
    loaded = ResidualShiftScheduler.from_pretrained(tmp_path)
    assert loaded.chain == ResidualShiftScheduler(power=0.5, kappa=1.0).chain
    assert loaded.timesteps.tolist() == list(range(15, 0, -1))


def test_rows_have_their_own_times_in_training() -> None:
    scheduler = ResidualShiftScheduler()
    x0, y, noise = (seeded(i, 3, 2, 4, 5) for i in range(3))
    times = torch.tensor([1, 7, 15])
    found = scheduler.add_noise(x0, y, noise, times)
    for row, t in enumerate(times.tolist()):
        torch.testing.assert_close(found[row], scheduler.chain.forward(x0[row], y[row], noise[row], t))


@pytest.mark.parametrize("steps", [1, 4, 15])
def test_a_network_that_knows_the_answer_restores_it(steps: int) -> None:
    x0, y = seeded(0, 2, 1, 8, 8), seeded(1, 2, 1, 8, 8)
    seen: list[float] = []

    def knows(x: torch.Tensor, given: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert torch.equal(given, y) and t.shape == (2,) and torch.isfinite(x).all()
        seen.append(float(t[0]))
        return x0

    scheduler = ResidualShiftScheduler()
    found = restored(knows, scheduler, y, steps, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, x0)
    assert seen[0] == 1 and len(seen) == steps and seen == sorted(seen, reverse=True)
    with pytest.raises(UsageError, match="is over"):
        scheduler.step(x0, 1, found)


def test_the_way_there_has_the_law_of_its_states() -> None:
    """Half way, over many pictures: mean and deviation of x_s given x0 and y."""
    scheduler, rows = ResidualShiftScheduler(), 20_000
    x0, y = torch.full((rows, 1), 0.3, dtype=torch.float64), torch.full((rows, 1), -0.8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(5)
    x = scheduler.chain.forward(x0, y, torch.randn(rows, 1, generator=generator, dtype=torch.float64), 15)
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(x0, t, x, generator).prev_sample
    eta = scheduler.chain.eta[6]
    spread = scheduler.chain.spread(6)
    assert float(x.mean()) == pytest.approx(0.3 + eta * -1.1, abs=4 * spread / rows**0.5)
    assert float(x.std()) == pytest.approx(spread, rel=4 / (2 * rows) ** 0.5)


def test_the_network_sees_numbers_of_about_one() -> None:
    scheduler = ResidualShiftScheduler()
    y = seeded(0, 4, 1, 32, 32)
    x = scheduler.begin(y, torch.Generator().manual_seed(1))
    assert float(x.std()) > 2 and float(scheduler.scale_model_input(x, 15).std()) == pytest.approx(1, abs=0.05)
    again = scheduler.begin(y, torch.Generator().manual_seed(1))
    assert torch.equal(again, x)
