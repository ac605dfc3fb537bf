"""The loop behind every pretraining, on one linear layer."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hasten.distill.pretrain.loop import Loop, Task, one_process
from hasten.errors import StoppedError


def test_trainings_of_different_precision_run_in_one_process_in_any_order(tmp_path: Path) -> None:
    seen = []
    for run, precision in enumerate(("no", "bf16", "no", "bf16")):
        torch.manual_seed(0)
        layer = nn.Linear(3, 5)

        def loss(step: int, layer: nn.Linear = layer) -> Tensor:
            out = layer(torch.ones(2, 3))
            seen.append(out.dtype)
            return out.float().square().mean()

        out = tmp_path / str(run)
        out.mkdir()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        task = Task("layer", layer, [optimizer], loss, steps=1, warmup=0, cooldown=0.5, precision=precision)
        before = layer.weight.detach().clone()
        Loop(one_process(), out, 60.0, progress=False).run(task, resume=False, stop_after=None)
        assert layer.weight.dtype == torch.float32
        assert not torch.equal(layer.weight, before)
    assert seen == [torch.float32, torch.bfloat16] * 2


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM")
def test_a_pretraining_that_is_told_to_end_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    def trained(out: Path, end: int | None = None, resume: bool = False) -> dict[str, Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 5)

        def loss(step: int) -> Tensor:
            if step == end:
                os.kill(os.getpid(), signal.SIGTERM)
            return layer(torch.full((2, 3), 1.0 + step)).square().mean()

        out.mkdir(exist_ok=True)
        task = Task("layer", layer, [torch.optim.AdamW(layer.parameters(), lr=0.1)], loss, steps=6, warmup=0, cooldown=0.5, ema=0.9)
        return Loop(one_process(), out, 60.0, progress=False).run(task, resume)

    whole = trained(tmp_path / "whole")
    with pytest.raises(StoppedError, match=r"Stopped after step 3 of 6 \(layer\), with a checkpoint"):
        trained(tmp_path / "cut", end=2)
    again = trained(tmp_path / "cut", resume=True)
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    logs = [[json.loads(line) for line in (tmp_path / side / "log-layer.jsonl").read_text().splitlines()] for side in ("whole", "cut")]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]
    assert [row["step"] for row in logs[1]] == list(range(6))
