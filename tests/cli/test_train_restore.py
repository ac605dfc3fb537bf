"""`hasten train restore`: a network and a scheduler that load again, and clear words for what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def test_a_restorer_is_trained_and_loads_again(hasten: Callable[..., Any], tmp_path: Path) -> None:
    from hasten.distill.restoration import RestorationNet
    from hasten.pipelines.residual_shift import ResidualShiftScheduler, restored

    out = tmp_path / "restorer"
    ran = hasten("train", "restore", "--out", out, "--steps", 2, "--batch", 4, "--json", "-")
    assert ran.code == 0, ran.err
    (row,) = ran.json["rows"]
    assert row["steps"] == 2 and 0 < row["loss"] < 1
    network = RestorationNet.from_pretrained(out / "network").eval()
    scheduler = ResidualShiftScheduler.from_pretrained(out / "scheduler")
    assert scheduler.chain.kappa == 1.0
    found = restored(network, scheduler, torch.zeros(1, 1, 32, 32), 2, torch.Generator().manual_seed(0))
    assert torch.isfinite(found).all()


def test_it_goes_on_from_its_checkpoint(hasten: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "restorer"
    assert hasten("train", "restore", "--out", out, "--steps", 2, "--batch", 4).code == 0
    ran = hasten("train", "restore", "--out", out, "--steps", 2, "--batch", 4, "--resume", "--json", "-")
    assert ran.code == 0 and ran.json["rows"][0]["loss"] is None, "all was done"
    nowhere = hasten("train", "restore", "--out", tmp_path / "nowhere", "--resume")
    assert nowhere.code == 2 and "there is no folder" in nowhere.sentence


def test_data_that_are_not_there_are_named(hasten: Callable[..., Any], tmp_path: Path) -> None:
    ran = hasten("train", "restore", "--out", tmp_path / "out", "--data", tmp_path / "nothing")
    assert ran.code == 2 and "There is no data folder" in ran.sentence and not (tmp_path / "out").exists()
