"""Pretraining as a method of the one trainer: a network that learns from nothing, by a loss that is a function of the step.

There is no teacher and there are no stored rows: what a batch is, a task says itself, by seeds of its own (`step_seed`), by which
the bundled models were made. The trainer gives the rest: clipping, the average, the log, checkpoints, the end by SIGTERM.
The plateau of the learning rate does not depend on the number of steps, so that a run may be shortened or extended on
resuming; the average is usable at any time, and is what gets exported.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hasten.distill.loop import processes
from hasten.distill.loop.draw import Draw
from hasten.distill.loop.ending import check_finished, ending
from hasten.distill.loop.optimizers import Together
from hasten.distill.loop.players import Player
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.trainer import Trainer
from hasten.distill.method import Batch, Facts, Loss, Method, MethodState
from hasten.distill.network.host_call import Condition, HostCall
from hasten.distill.network.roles import Role, Roles
from hasten.distill.pretrain.tiny_attention import BmmAttention
from hasten.errors import ResumeError, UsageError

Weights = dict[str, Tensor]


@dataclass
class Task:
    """One training: a module, its optimisers and its loss as a pure function of the step.

    settings: steps, warm-up, cool-down, clipping, average, precision; its `lr` is for messages, as optimisers bring their own.
    export: called with the averaged weights and the number of steps at every checkpoint. notes: further numbers of the last
    step for the log.
    """

    name: str
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    loss: Callable[[int], Tensor]
    settings: TrainSettings
    export: Callable[[Weights, int], None] | None = None
    notes: Callable[[], dict[str, float]] = dict


def device() -> torch.device:
    """The GPU if there is one. Raises `UsageError` in one of several processes."""
    if processes.launched() > 1:
        raise UsageError(f"Pretraining runs in one process, got {processes.launched()}. Start it without a launcher.")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def step_seed(seed: int, phase: str, step: int) -> int:
    """The seed of one batch, the same whenever and wherever it is drawn."""
    return zlib.crc32(f"{seed}/{phase}/{step}".encode())


@dataclass(frozen=True)
class Stages:
    """Trains tasks below `out`, each in `checkpoints/NAME`, with a checkpoint at least every `checkpoint_seconds`."""

    out: Path
    checkpoint_seconds: float = 240.0
    progress: bool = True
    device: torch.device = field(default_factory=device)

    def run(self, task: Task, resume: bool, stop_after: int | None = None) -> Weights:
        """Train to the end (or to `stop_after` steps); returns the averaged weights by parameter name. `StoppedError` when
        it was told to end by SIGTERM, with a checkpoint written; `ResumeError` as `Trainer.fit`."""
        folder = self.out / "checkpoints" / task.name
        if (folder / "model.safetensors").is_file():
            raise ResumeError(f"'{folder}' is of an older version, which kept other checkpoints. Start in an empty folder.")
        pupil = Pupil(task)
        trainer = Trainer(
            FromNothing(), Roles(teacher=pupil, student=pupil), _NoRows(), task.settings, folder, (), self.progress,
            self.checkpoint_seconds, name=task.name, optimizer=lambda _, weights, rate: Together(task.optimizers),
        )  # fmt: skip
        if task.export is not None:
            export = task.export
            trainer.saved = lambda step: export(averaged(trainer), step)
        begun = (folder / "latest").exists() or (folder / "latest.old").exists()
        with ending() as trainer.ended:
            done = trainer.fit(resume and begun, stop_after)
        check_finished(done, task.settings.steps, stop_after)
        return averaged(trainer)


def averaged(trainer: Trainer) -> Weights:
    """The student's whole state, its weights averaged; a copy."""
    player: Player = trainer.players["student"]
    with player.averaged():
        return {name: value.detach().clone() for name, value in trainer.roles["student"].host.network.state_dict().items()}


@dataclass(frozen=True)
class _Bare:
    """What a role wants of its host in training: the network."""

    network: nn.Module


class Pupil(Role):
    """A network with its task."""

    def __init__(self, task: Task) -> None:
        super().__init__("student", cast(HostCall, _Bare(task.model)), None, (), True)
        self.task = task


class FromNothing(Method):
    """Without a `kind`: no configuration of a student's training can ask for it."""

    def start(self, facts: Facts) -> MethodState:
        return _TaskState(facts)


class _TaskState(MethodState):
    def loss(self, phase: str, batch: Batch, draw: Draw, step: int, kept: Mapping[str, Any]) -> Loss:
        pupil = self.roles["student"]
        assert isinstance(pupil, Pupil)
        with BmmAttention() if pupil.task.settings.precision == "bf16" else nullcontext():
            loss = pupil.task.loss(step)
        return Loss(loss[None], {name: torch.tensor(value) for name, value in pupil.task.notes().items()})


class _NoRows:
    """A task draws its own batches: to the loop they are one row without content."""

    def __len__(self) -> int:
        return 1

    def batch(self, index: Tensor, draw: Draw) -> Batch:
        return Batch(Condition({}), Condition({}))
