"""The loop of every method: phases, optimisers, averages, log, checkpoints.

All random numbers and the choice of rows are functions of seed and step, so that a checkpoint is weights, optimisers
and a number. Processes of a group each take a share of every batch; gradients are averaged by hand, since accelerate
prepares one network and a training has several roles on it.

Shapes: B rows of a batch, b of this process.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hasten.distill import processes
from hasten.distill.draw import Draw
from hasten.distill.method import Batch, Facts, Method, MethodState
from hasten.distill.players import Player
from hasten.distill.pretrain_loop import learning_rate
from hasten.distill.pretrain_state import replace_folder, truncate_log
from hasten.distill.roles import Roles, follow
from hasten.distill.settings import TrainSettings
from hasten.errors import ResumeError, UsageError


class Rows(Protocol):
    """Data: rows by number."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, draw: Draw) -> Batch:
        """The rows of these numbers, int64 [b]."""
        ...


@dataclass
class Trainer:
    """One training below `out`.

    `latest/` holds a folder per role with weights, average and optimiser, renewed every `checkpoint_seconds` (written
    aside and renamed); `log.jsonl` a line per step. A step's loss that is not finite ends the training with the last
    checkpoint intact.
    """

    method: Method
    roles: Roles
    data: Rows
    settings: TrainSettings
    out: Path
    shape: tuple[int, ...]
    progress: bool = True
    checkpoint_seconds: float = 120.0
    watch: Callable[[int, Trainer], Mapping[str, float]] | None = None
    state: MethodState = field(init=False)
    players: dict[str, Player] = field(init=False)

    def __post_init__(self) -> None:
        if not len(self.data):
            raise UsageError("There is no data to train on: the data set has no rows.")
        if self.settings.checkpointing:
            self.roles.recompute()
        self.state = self.method.start(Facts(self.roles, self.settings.steps, self.shape, self._row))
        self.players = {name: self._player(name) for name in self._names()}
        for player in self.players.values():
            processes.share([*player.parameters.values(), *player.buffers.values(), *player.average.values()])

    def fit(self, resume: bool = False, stop_after: int | None = None) -> int:
        """Train to the end, or to `stop_after` steps. Returns the number of steps done in all.

        Raises `ResumeError` where a checkpoint is incomplete or of another training; `FloatingPointError` where a loss
        is not finite.
        """
        start = self._resume() if resume else 0
        last = min(self.settings.steps, stop_after or self.settings.steps)
        self.out.mkdir(parents=True, exist_ok=True)
        if processes.rank() == 0:
            truncate_log(self.out / "log.jsonl", start)
        first = {name: _copies(player) for name, player in self.players.items()}
        saved = time.monotonic()
        with (self.out / "log.jsonl").open("a") as lines, self._bar(start) as bar:
            for step in range(start, last):
                row = self._step(step)
                self._tell(lines, bar, step, row)
                if step + 1 == last or time.monotonic() - saved > self.checkpoint_seconds:
                    lines.flush()
                    self.save(step + 1)
                    saved = time.monotonic()
        self._warn_still(first, last - start)
        return max(start, last)

    def save(self, step: int) -> None:
        """Write `latest/`, one folder for each role."""

        def write(part: Path) -> None:
            for name, player in self.players.items():
                (part / name).mkdir()
                player.save(part / name)
            (part / "state.json").write_text(json.dumps({"step": step, "method": self.method.model_dump()}, indent=1))

        if processes.rank() == 0:
            replace_folder(self.out / "latest", write)

    # --- one step ---------------------------------------------------------------------------------

    def _step(self, step: int) -> dict[str, float]:
        factor = learning_rate(step, self.settings.steps, self.settings.warmup, self.settings.cooldown)
        told: dict[str, Tensor] = {}
        kept: list[Mapping[str, Any]] = [{} for _ in range(self.settings.accumulate)]
        for phase in self.state.phases(step):
            player = self.players[phase]
            told |= self._phase(player, step, kept)
            _change(player, self._rate(phase) * factor, self.settings.clip, told)
        for name in self.method.averages:
            follow(self.roles[name], self.roles["student"], self.state.decay(name))
        early = (1 + step) / (10 + step)
        self.players["student"].follow(min(self.settings.average, early))
        # One look at the device per step, for all numbers together; all processes see the same, and stop together.
        numbers = processes.average(torch.stack([t.double() for t in told.values()]))
        return dict(zip(told, numbers.tolist(), strict=True))

    def _phase(self, player: Player, step: int, kept: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Gradients of one phase on all parts of the batch; what is to be told of it."""
        told: dict[str, Tensor] = {}
        parts = self._parts(step)
        whole = sum(len(rows) for rows in parts)
        for number, rows in enumerate(parts):
            draw = Draw(self.settings.seed, step, rows, self._device)
            batch = self.data.batch(self._chosen(step, rows), draw)
            with ExitStack() as stack:
                stack.enter_context(self._autocast())
                loss = self.state.loss(player.name, batch, draw, step, kept[number])
            share = len(rows) / whole
            torch.autograd.backward(loss.rows.mean() * share)
            kept[number] = {**kept[number], **loss.keep}
            for name, value in {"loss": loss.rows.mean(), **loss.metrics}.items():
                key = name if player.name == "student" else f"{player.name}.{name}"
                told[key] = told.get(key, torch.zeros((), device=value.device)) + value.detach().float() * share
        _average_gradients(player)
        return told

    def _parts(self, step: int) -> list[range]:
        """Numbers of this process's rows of the batch, in as many parts as are accumulated."""
        size, several = self.settings.batch, processes.count()
        if size % (several * self.settings.accumulate):
            raise UsageError(
                f"batch = {size} does not divide into {several} processes x {self.settings.accumulate} parts."
            )
        own = size // several
        begin, part = processes.rank() * own, own // self.settings.accumulate
        return [range(begin + k * part, begin + (k + 1) * part) for k in range(self.settings.accumulate)]

    def _chosen(self, step: int, rows: range) -> Tensor:
        """Which data stand in these rows: every epoch is a permutation of its own."""
        places = [step * self.settings.batch + row for row in rows]
        size = len(self.data)
        orders = {place // size: None for place in places}
        shuffled = {epoch: Draw(self.settings.seed, epoch, ()).order("epoch", size) for epoch in orders}
        return torch.stack([shuffled[place // size][place % size] for place in places])

    # --- the rest ---------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        heads = [phase for phase in self._phases() if phase not in self.roles]
        return [*(name for name in self.roles if name != "teacher"), *heads]

    def _phases(self) -> list[str]:
        return list(dict.fromkeys(phase for step in range(64) for phase in self.state.phases(step)))

    def _player(self, name: str) -> Player:
        own = dict(self.roles[name].parameters()) if name in self.roles else {}
        buffers: dict[str, Tensor] = {}
        for label, module in self.state.heads(name):
            own |= {f"heads.{label}.{key}": value for key, value in module.named_parameters()}
            buffers |= {f"heads.{label}.{key}": value for key, value in module.named_buffers()}
        if name in self.method.averages:
            for value in own.values():
                value.requires_grad_(False)
            return Player(name, own, None, buffers)
        s = self.settings
        optimizer = torch.optim.AdamW(
            list(own.values()), lr=self._rate(name), betas=s.betas, weight_decay=s.weight_decay,
            foreach=True,
        )  # fmt: skip
        keeps = name == "student" and s.average > 0
        average = {key: value.detach().clone() for key, value in own.items()} if keeps else {}
        return Player(name, own, optimizer, buffers, average)

    def _rate(self, name: str) -> float:
        return self.settings.role_lr.get(name, self.settings.lr)

    def _row(self) -> Batch:
        """The first row of the data."""
        return self.data.batch(torch.zeros(1, dtype=torch.int64), Draw(self.settings.seed, 0, (0,), self._device))

    @property
    def _device(self) -> torch.device:
        return next(self.roles["teacher"].host.network.parameters()).device

    def _autocast(self) -> Any:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _bar(self, start: int) -> Any:
        hidden = not self.progress or processes.rank() > 0
        return tqdm(total=self.settings.steps, initial=start, desc=self.method.kind, disable=hidden, mininterval=2)

    def _tell(self, lines: IO[str], bar: Any, step: int, row: dict[str, float]) -> None:
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"{', '.join(bad)} of {self.method.kind} is not finite at step {step}. Lower the learning rate (now"
                f" {self.settings.lr:g}) and resume from the last checkpoint in '{self.out}'."
            )
        more = dict(self.watch(step, self)) if self.watch is not None else {}
        if processes.rank() == 0:
            rounded = {name: float(f"{value:.6g}") for name, value in (row | more).items()}
            lines.write(json.dumps({"step": step, "time": round(time.time(), 1), **rounded}) + "\n")
        bar.update()
        bar.set_postfix(loss=f"{row.get('loss', float('nan')):.4f}", refresh=False)

    def _resume(self) -> int:
        folder = self.out / "latest"
        if not folder.exists() and (old := folder.with_name("latest.old")).exists():
            old.rename(folder)
        if not (folder / "state.json").is_file():
            raise ResumeError(f"There is no complete checkpoint in '{self.out}'. Start without resume.")
        state = json.loads((folder / "state.json").read_text())
        if state["method"] != self.method.model_dump():
            raise ResumeError(f"'{self.out}' was trained by {state['method']}, not by {self.method.model_dump()}.")
        for name, player in self.players.items():
            player.load(folder / name)
        return int(state["step"])

    def _warn_still(self, first: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        """A weight that no step has moved is a mistake of somebody's: say so."""
        if steps < 3:
            return
        import warnings

        for name, player in self.players.items():
            still = player.still(first[name])
            if still:
                warnings.warn(
                    f"hasten: {len(still)} of {len(player.parameters)} weights of role {name!r} have not moved in {steps}"
                    f" steps, the first: {still[0]}. Their learning rate is too small for their size, or no loss reaches"
                    " them.", stacklevel=3,
                )  # fmt: skip


def _copies(player: Player) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in player.parameters.items()}


def _change(player: Player, rate: float, clip: float, told: dict[str, Tensor]) -> None:
    """One step of the role's optimiser."""
    assert player.optimizer is not None
    for group in player.optimizer.param_groups:
        group["lr"] = rate
    norm = nn.utils.clip_grad_norm_(list(player.parameters.values()), clip)
    told["gradient" if player.name == "student" else f"{player.name}.gradient"] = norm.detach()
    player.optimizer.step()
    player.optimizer.zero_grad(set_to_none=True)


def _average_gradients(player: Player) -> None:
    if processes.count() == 1:
        return
    for parameter in player.parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        processes.average(parameter.grad)
