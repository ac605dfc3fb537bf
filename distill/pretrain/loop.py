"""The one loop behind every pretraining phase: schedule, averaging, log, checkpoints, progress.

The learning rate warms up, stays, and falls linearly to zero over the last part. Because the plateau does not
depend on the number of steps, a run may be shortened or extended on resuming. An exponential average of the
weights is usable at any time and is what gets exported.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from hasten.distill.loop.ending import ending
from hasten.distill.loop.health import Health
from hasten.distill.loop.log import Log
from hasten.distill.loop.schedule import learning_rate
from hasten.distill.loop.state import load_checkpoint, save_checkpoint
from hasten.distill.pretrain.tiny_attention import BmmAttention
from hasten.errors import StoppedError, UsageError

Weights = dict[str, Tensor]


@dataclass
class Task:
    """One training: a module, its optimisers and its loss as a pure function of the step.

    `cooldown` is the share of the steps over which the rate falls to zero; `ema` the decay of the averaged weights
    (0: no averaging); `export` is called with them at every checkpoint; `notes` are further numbers of the last step
    for the log.
    """

    name: str
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    loss: Callable[[int], Tensor]
    steps: int
    warmup: int
    cooldown: float
    clip: float = 1.0
    ema: float = 0.0
    precision: str = "no"
    export: Callable[[Weights, int], None] | None = None
    notes: Callable[[], dict[str, float]] = dict


def one_process() -> Accelerator:
    """The accelerator of a pretraining: the GPU if there is one, never several processes (`UsageError`).

    It carries no precision: accelerate fixes one for the whole Python process and refuses a second training in
    another, so the loop casts by itself (`Task.precision`).
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.num_processes > 1:
        raise UsageError(
            f"Pretraining runs in one process, got {accelerator.num_processes}. Start it without a launcher."
        )
    return accelerator


def step_seed(seed: int, phase: str, step: int) -> int:
    """The seed of one batch, the same whenever and wherever it is drawn."""
    return zlib.crc32(f"{seed}/{phase}/{step}".encode())


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices inside the transformer blocks (for Muon), everything else (for AdamW)."""
    inner: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and min(parameter.shape) > 8
        (inner if matrix and "blocks." in name else rest).append(parameter)
    return inner, rest


class Loop:
    """Runs tasks below `out`, with a checkpoint at least every `checkpoint_seconds`."""

    def __init__(
        self, accelerator: Accelerator, out: Path, checkpoint_seconds: float = 240.0, progress: bool = True
    ) -> None:
        self.accelerator, self.out = accelerator, out
        self.checkpoint_seconds, self.progress = checkpoint_seconds, progress

    def run(self, task: Task, resume: bool, stop_after: int | None = None) -> Weights:
        """Train to the end (or to `stop_after` steps); returns the averaged weights by parameter name. `StoppedError` when
        it was told to end by SIGTERM, with a checkpoint written."""
        folder, log = self.out / "checkpoints" / task.name, self.out / f"log-{task.name}.jsonl"
        ema = {name: value.detach().clone() for name, value in task.model.state_dict().items()}
        start = 0
        if resume and (folder.exists() or folder.with_name(folder.name + ".old").exists()):
            state = load_checkpoint(folder, model=task.model, ema=ema, optimizers=task.optimizers)
            start = int(state["step"])
        with closing(Log(log, start)) as lines, ending() as ended, self._context(task):
            self._steps(task, start, min(task.steps, stop_after or task.steps), ema, folder, lines, ended)
        return ema

    def _autocast(self, precision: str) -> Any:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=precision == "bf16")

    def _context(self, task: Task) -> Any:
        return BmmAttention() if task.precision == "bf16" else nullcontext()

    def _steps(
        self, task: Task, start: int, last: int, ema: Weights, folder: Path, lines: Log, ended: Callable[[], bool]
    ) -> None:
        peaks = [group["lr"] for optimizer in task.optimizers for group in optimizer.param_groups]
        saved, health = time.monotonic(), Health(lines.earlier)
        bar = tqdm(total=task.steps, initial=start, desc=task.name, disable=not self.progress, mininterval=2)
        for step in range(start, last):
            loss = self._step(task, step, peaks, ema)
            row = {"loss": loss, **task.notes()}
            lines.write(step, row | health.look(step, row))
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            stop = ended()
            if time.monotonic() - saved > self.checkpoint_seconds or step + 1 == last or stop:
                lines.flush()
                save_checkpoint(
                    folder, model=task.model, ema=ema, optimizers=task.optimizers, state={"step": step + 1}
                )
                if task.export is not None:
                    task.export(ema, step + 1)
                saved = time.monotonic()
            if stop and step + 1 < last:
                raise StoppedError(
                    f"Stopped after step {step + 1} of {task.steps} ({task.name}), with a checkpoint. Go on with --resume."
                )
        bar.close()

    def _step(self, task: Task, step: int, peaks: list[float], ema: Weights) -> float:
        factor = learning_rate(step, task.steps, task.warmup, task.cooldown)
        groups = [group for optimizer in task.optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * factor
        with self._autocast(task.precision):
            loss = task.loss(step)
        self.accelerator.backward(loss)
        nn.utils.clip_grad_norm_(task.model.parameters(), task.clip)
        for optimizer in task.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(task.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in task.model.state_dict().items():
                if value.is_floating_point():
                    ema[name].lerp_(value, 1 - decay)
        scalar = float(loss.detach())
        if not math.isfinite(scalar):
            raise FloatingPointError(
                f"the {task.name} loss is {scalar} at step {step}: lower the learning rate and resume from the "
                f"last checkpoint in '{self.out}'."
            )
        return scalar
