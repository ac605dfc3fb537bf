"""The small restorer: what damages a picture, what the network sees, and that it learns."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from hasten.distill.data.moving_digits import load_digits
from hasten.distill.restoration import Damage, RestorationNet, Restoring, pictures, train
from hasten.errors import LimitError, StoppedError, UsageError
from hasten.pipelines.residual_shift import restored


def test_damage_keeps_flat_pictures_and_is_a_function_of_its_generator() -> None:
    flat = torch.full((2, 1, 32, 32), -1.0)
    g = torch.Generator().manual_seed(0)
    torch.testing.assert_close(Damage(noise=0.0)(flat, g), flat)
    clean, prompts = pictures(load_digits("sklearn"), 4, seed=1)
    assert clean.shape == (4, 1, 32, 32) and len(prompts) == 4 and clean.min() >= -1 and clean.max() > 0.5
    one, two = [Damage()(clean, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(one, two)
    assert (one - clean).square().mean() > 0.02, "it is damage"


def test_the_network_starts_at_the_degraded_picture_and_sees_all_it_is_given(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = RestorationNet(width=16, dilations=(1, 2)).eval()
    g = torch.Generator().manual_seed(0)
    x, y, t = torch.randn(3, 1, 6, 10, generator=g), torch.randn(3, 1, 6, 10, generator=g), torch.tensor([0.1, 0.5, 1.0])
    with torch.no_grad():
        network.out.bias.zero_()
        torch.testing.assert_close(network(x, y, t), y)
        network.out.weight.normal_(generator=g)
        told = network(x, y, t)
        assert not torch.allclose(told, network(x + 1, y, t)) and not torch.allclose(told, network(x, y, t * 0.3))
        network.save_pretrained(tmp_path)
        assert torch.equal(RestorationNet.from_pretrained(tmp_path)(x, y, t), told)
        with pytest.raises(LimitError, match="must be even, got 6 x 9"):
            network(x[..., :9], y[..., :9], t)


def test_it_learns_to_restore(tmp_path: Path) -> None:
    losses: list[float] = []
    settings = Restoring(steps=60, batch=8)
    network, scheduler = train(tmp_path, "sklearn", settings, told=lambda step, loss: losses.append(loss))
    assert len(losses) == 60 and sum(losses[-9:]) < 0.6 * sum(losses[:9])
    clean, _ = pictures(load_digits("sklearn"), 16, seed=10**6, split="test")
    y = settings.damage(clean, torch.Generator().manual_seed(1))
    found = restored(network, scheduler, y, 1, torch.Generator().manual_seed(2))
    assert (found - clean).square().mean() < 0.9 * (y - clean).square().mean()
    log = [json.loads(line) for line in (tmp_path / "checkpoints" / "restorer" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 60 and log[-1]["loss"] == pytest.approx(losses[-1], rel=1e-4)


def same(one: RestorationNet, other: RestorationNet) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_same_seed_learns_the_same_and_so_does_one_that_was_interrupted(tmp_path: Path) -> None:
    settings = Restoring(steps=6, batch=4)
    whole, _ = train(tmp_path / "whole", "sklearn", settings)
    part, _ = train(tmp_path / "parts", "sklearn", settings, stop_after=3)
    assert not same(part, whole)
    steps: list[int] = []
    resumed, _ = train(tmp_path / "parts", "sklearn", settings, resume=True, told=lambda step, loss: steps.append(step))
    assert steps == [3, 4, 5] and same(resumed, whole)
    assert same(RestorationNet.from_pretrained(tmp_path / "parts" / "network"), whole)
    other, _ = train(tmp_path / "other", "sklearn", Restoring(steps=6, batch=4, seed=1))
    assert not same(other, whole)


def test_told_to_end_it_ends_with_a_checkpoint(tmp_path: Path) -> None:
    settings = Restoring(steps=4, batch=2)

    def end(step: int, loss: float) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError):
        train(tmp_path, "sklearn", settings, told=end)
    assert not (tmp_path / "network").exists()
    resumed, _ = train(tmp_path, "sklearn", settings, resume=True)
    assert same(resumed, train(tmp_path / "whole", "sklearn", settings)[0])


def test_settings_that_train_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="steps and batch of 1 or more"):
        Restoring(steps=0)
