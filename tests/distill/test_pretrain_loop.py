"""The loop behind every pretraining, on one linear layer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from hasten.distill.pretrain_loop import Loop, Task, one_process


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
