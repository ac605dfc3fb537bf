"""A pretraining on the trainer, on one linear layer: its own optimisers, its own batches, its own export."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.distill.loop.optimizers import Together
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.method import Method
from hasten.distill.pretrain.task import Stages, Task
from hasten.errors import ResumeError, StoppedError, UsageError


def test_trainings_of_different_precision_run_in_one_process_in_any_order(tmp_path: Path) -> None:
    seen = []
    for run, precision in enumerate(("no", "bf16", "no", "bf16")):
        torch.manual_seed(0)
        layer = nn.Linear(3, 5)

        def loss(step: int, layer: nn.Linear = layer) -> Tensor:
            out = layer(torch.ones(2, 3))
            seen.append(out.dtype)
            return out.float().square().mean()

        settings = TrainSettings(steps=1, batch=1, lr=0.1, warmup=0, cooldown=0.5, average=0, precision=precision)  # type: ignore[arg-type]
        task = Task("layer", layer, [torch.optim.SGD(layer.parameters(), lr=0.1)], loss, settings)
        before = layer.weight.detach().clone()
        found = Stages(tmp_path / str(run), 60.0, progress=False).run(task, resume=False)
        assert layer.weight.dtype == torch.float32
        assert not torch.equal(layer.weight, before) and torch.equal(found["weight"], layer.weight)
    assert seen == [torch.float32, torch.bfloat16] * 2


def task_of(end: int | None = None, **more: Any) -> Task:
    """Two optimisers, of which one has momentum; told to end in a step."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 5)

    def loss(step: int) -> Tensor:
        if step == end:
            os.kill(os.getpid(), signal.SIGTERM)
        return layer(torch.full((2, 3), 1.0 + step)).square().mean()

    settings = TrainSettings(**{"steps": 6, "batch": 1, "lr": 0.1, "warmup": 0, "cooldown": 0.5, "average": 0.9, **more})
    optimizers = [torch.optim.SGD([layer.weight], lr=0.01, momentum=0.5), torch.optim.AdamW([layer.bias], lr=0.1)]
    return Task("layer", layer, optimizers, loss, settings, notes=lambda: {"seen": 3.0})


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "checkpoints" / "layer" / "log.jsonl").read_text().splitlines()]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM")
def test_a_pretraining_that_is_told_to_end_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    def trained(out: Path, end: int | None = None, resume: bool = False) -> dict[str, Tensor]:
        return Stages(out, 60.0, progress=False).run(task_of(end), resume)

    whole = trained(tmp_path / "whole")
    with pytest.raises(StoppedError, match="Stopped after step 3 of 6, with a checkpoint"):
        trained(tmp_path / "cut", end=2)
    again = trained(tmp_path / "cut", resume=True)
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    logs = [rows(tmp_path / side) for side in ("whole", "cut")]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]
    assert [row["step"] for row in logs[1]] == list(range(6)) and all(row["seen"] == 3 for row in logs[1])


def test_it_is_the_loop_written_out(tmp_path: Path) -> None:
    """Bit for bit: rates by optimiser, clipping over all weights, the average."""
    made = task_of(clip=0.5)
    found = Stages(tmp_path, 60.0, progress=False).run(made, resume=False)
    by_hand = task_of(clip=0.5)
    weights = list(by_hand.model.parameters())
    average = [weight.detach().clone() for weight in weights]
    for step in range(6):
        factor = by_hand.settings.factor(step)
        for optimizer, peak in zip(by_hand.optimizers, (0.01, 0.1), strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        torch.autograd.backward(by_hand.loss(step))
        nn.utils.clip_grad_norm_(weights, 0.5)
        for optimizer in by_hand.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for kept, weight in zip(average, weights, strict=True):
            kept.lerp_(weight.detach(), 1 - min(0.9, (1 + step) / (10 + step)))
    assert torch.equal(found["weight"], average[0]) and torch.equal(found["bias"], average[1])
    assert torch.equal(made.model.get_parameter("weight"), weights[0]), "the weights are themselves again"


def test_every_checkpoint_is_exported_with_tied_weights_averaged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.Linear(2, 2, bias=False), "two": nn.Linear(2, 2, bias=False)})
    model["two"].weight = model["one"].weight
    model.register_buffer("table", torch.arange(3.0))
    seen: list[int] = []

    def export(weights: dict[str, Tensor], step: int) -> None:
        seen.append(step)
        assert torch.equal(weights["one.weight"], weights["two.weight"]) and torch.equal(weights["table"], torch.arange(3.0))
        assert not torch.equal(weights["one.weight"], model["one"].weight)
        assert (tmp_path / "checkpoints" / "tied" / "latest" / "state.json").is_file(), "kill -9 after an export finds its checkpoint"

    def loss(step: int) -> Tensor:
        made: Tensor = model["two"](torch.ones(1, 2))
        return made.square().sum()

    settings = TrainSettings(steps=5, batch=1, lr=0.1, warmup=0, average=0.9, checkpoint_every=2)
    Stages(tmp_path, 60.0, progress=False).run(Task("tied", model, [torch.optim.SGD(model.parameters(), lr=0.1)], loss, settings, export), False)
    assert seen == [2, 4, 5]


def test_several_optimisers_are_one_and_come_back_as_themselves() -> None:
    one, two = task_of(), task_of()
    ours, other = Together(one.optimizers), Together(two.optimizers)
    for step in range(3):
        torch.autograd.backward(one.loss(step))
        ours.step()
        ours.zero_grad()
    assert [len(group["params"]) for group in ours.param_groups] == [1, 1] and len(ours.state) == 2
    two.model.load_state_dict(one.model.state_dict())
    other.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch would let both write to the same numbers
    for task, optimizer in ((one, ours), (two, other)):
        torch.autograd.backward(task.loss(3))
        optimizer.param_groups[0]["lr"] = 0.5  # is the part's own
        optimizer.step()
    assert all(torch.equal(value, two.model.state_dict()[name]) for name, value in one.model.state_dict().items())
    assert other.parts[0].param_groups[0]["lr"] == 0.5 and other.parts[1].state is other.state


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "" not in Method.members(), "no student's configuration can ask for a pretraining"
    (tmp_path / "checkpoints" / "layer").mkdir(parents=True)
    (tmp_path / "checkpoints" / "layer" / "model.safetensors").touch()
    with pytest.raises(ResumeError, match="is of an older version"):
        Stages(tmp_path, progress=False).run(task_of(), resume=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="Pretraining runs in one process, got 2"):
        Stages(tmp_path)
