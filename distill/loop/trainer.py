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
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hasten.distill.loop import direction, processes, sharding
from hasten.distill.loop.draw import Draw
from hasten.distill.loop.health import Health
from hasten.distill.loop.log import Log
from hasten.distill.loop.optimizers import optimizer_of
from hasten.distill.loop.players import Player
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.sharding import Share
from hasten.distill.loop.state import replace_folder
from hasten.distill.method import Batch, Facts, Method, MethodState
from hasten.distill.network.roles import Roles
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
    checkpoint intact. watch: looks at the training after each step, in every process; its numbers join the log. ended: asked
    after each step whether to write a checkpoint and stop; it is enough that one process is told so. saved: told
    the number of steps behind each checkpoint. name: of the training where its method's does not say it. optimizer: of a role's
    weights, by the settings and the role's learning rate.
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
    ended: Callable[[], bool] = lambda: False
    saved: Callable[[int], None] | None = None
    name: str = ""
    optimizer: Callable[[TrainSettings, Iterable[nn.Parameter], float], torch.optim.Optimizer] = optimizer_of
    state: MethodState = field(init=False)
    players: dict[str, Player] = field(init=False)
    headings: direction.Headings = field(init=False, default_factory=direction.Headings)

    def __post_init__(self) -> None:
        if not len(self.data):
            raise UsageError("There is no data to train on: the data set has no rows.")
        if self.settings.checkpointing:
            self.roles.recompute()
        self.state = self.method.start(Facts(self.roles, self.settings.steps, self.shape, self._row))
        for name in self._names():
            own, buffers = self._own(name)
            processes.share([*own.values(), *buffers.values()])
        if self.settings.shard:
            sharding.shard(self.roles)
        self.players = {name: self._player(name) for name in self._names()}

    def fit(self, resume: bool = False, stop_after: int | None = None) -> int:
        """Train to the end, or to `stop_after` steps. Returns the number of steps done in all.

        Raises `ResumeError` where a checkpoint is incomplete or of another training; `FloatingPointError` where a loss
        is not finite.
        """
        start = self.restore() if resume else 0
        last = min(self.settings.steps, stop_after or self.settings.steps)
        self.out.mkdir(parents=True, exist_ok=True)
        first = {name: _copies(player) for name, player in self.players.items()}
        saved, done = time.monotonic(), start
        with closing(self._log(start)) as log, self._bar(start) as bar:
            health = Health(log.earlier)
            while done < last:
                row, stop, late = self._step(done, time.monotonic() - saved > self.checkpoint_seconds)
                self._tell(log, bar, done, row, health)
                done += 1
                if done == last or stop or late:
                    log.flush()
                    self.save(done)
                    if self.saved is not None:
                        self.saved(done)
                    saved = time.monotonic()
                if stop:
                    return done
        self._warn_still(first, last - start)
        return max(start, done)

    def save(self, step: int) -> None:
        """Write `latest/`, one folder for each role. Every process must call this: weights in parts are gathered."""

        def write(part: Path) -> None:
            for name, player in self.players.items():
                (part / name).mkdir()
                player.save(part / name)
            state = {"step": step, "method": self.method.model_dump(), "headings": self.headings.held}
            (part / "state.json").write_text(json.dumps(state, indent=1))

        if processes.rank() == 0:
            replace_folder(self.out / "latest", write)
        elif self.settings.shard:
            for player in self.players.values():
                player.save(None)

    def held(self) -> dict[str, int]:
        """Bytes that this process holds, by kind; `base` are the weights that nothing trains."""
        own = {id(p) for player in self.players.values() for p in player.parameters.values()}
        networks = {id(role.host.network): role.host.network for role in self.roles.values()}
        base = sharding.held(p for n in networks.values() for p in n.parameters() if id(p) not in own)
        kinds = [player.held() for player in self.players.values()]
        return {"base": base, **{kind: sum(each[kind] for each in kinds) for kind in kinds[0]}}

    # --- one step ---------------------------------------------------------------------------------

    def _step(self, step: int, late: bool) -> tuple[dict[str, float], bool, bool]:
        """(numbers for the log, whether to stop behind this step, whether a checkpoint is due)."""
        told: dict[str, Tensor] = {}
        kept: list[Mapping[str, Any]] = [{} for _ in range(self.settings.accumulate)]
        for phase in self.state.phases(step):
            player = self.players[phase]
            told |= self._phase(player, step, kept)
            start = "" if phase == "student" else f"{phase}."
            if self.settings.shard:
                sharding.rest(self.roles)
            told[f"{start}gradient"] = player.change(self.settings.factor(step), self.settings.clip)
        for name in self.method.averages:
            _follow(self.players[name], self.players["student"], self.state.decay(name))
        early = (1 + step) / (10 + step)
        self.players["student"].follow(min(self.settings.average, early))
        # One look at the device per step, for all numbers together; all processes see the same, and stop together.
        flags = [torch.tensor(float(flag), device=self._device) for flag in (self.ended(), late)]
        flat = processes.average(torch.cat([t.double().reshape(-1) for t in (*told.values(), *flags)])).cpu()
        every, (stop, slow) = self.settings.checkpoint_every, flat[-2:].tolist()
        due = (step + 1) % every == 0 if every else slow > 0
        return direction.numbers(told, flat[:-2], self.headings), stop > 0, due

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
                stack.enter_context(self.roles.styled(draw))
                loss = self.state.loss(player.name, batch, draw, step, kept[number])
            share = len(rows) / whole
            torch.autograd.backward(loss.rows.mean() * share)
            kept[number] = {**kept[number], **loss.keep}
            for name, value in {"loss": loss.rows.mean(), **loss.metrics}.items():
                key = name if player.name == "student" else f"{player.name}.{name}"
                told[key] = told.get(key, torch.zeros((), device=value.device)) + value.detach().float() * share
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

    def _own(self, name: str) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
        """Weights of a role and of its heads, and the heads' buffers."""
        own = dict(self.roles[name].parameters()) if name in self.roles else {}
        buffers: dict[str, Tensor] = {}
        for label, module in self.state.heads(name):
            own |= {f"heads.{label}.{key}": value for key, value in module.named_parameters()}
            buffers |= {f"heads.{label}.{key}": value for key, value in module.named_buffers()}
        return own, buffers

    def _player(self, name: str) -> Player:
        own, buffers = self._own(name)
        shares = {key: Share.of(value) for key, value in own.items()} if self.settings.shard else {}
        if name in self.method.averages:
            for value in own.values():
                value.requires_grad_(False)
            return Player(name, own, None, buffers, shares={key: share for key, share in shares.items() if share.cut})
        changed = [share.own for share in shares.values()] or list(own.values())
        player = Player(name, own, self.optimizer(self.settings, changed, self._rate(name)), buffers, shares=shares)
        if name == "student" and self.settings.average > 0:
            player.average = {key: value.clone() for key, value in player.current().items()}
        return player

    def _rate(self, name: str) -> float:
        return self.settings.role_lr.get(name, self.settings.lr)

    def _row(self, count: int = 1) -> Batch:
        """The first row of the data, or the first ones."""
        rows = range(min(count, len(self.data)))
        return self.data.batch(torch.tensor(rows), Draw(self.settings.seed, 0, rows, self._device))

    @property
    def _device(self) -> torch.device:
        return next(self.roles["teacher"].host.network.parameters()).device

    def _autocast(self) -> Any:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _bar(self, start: int) -> Any:
        hidden = not self.progress or processes.rank() > 0
        return tqdm(total=self.settings.steps, initial=start, desc=self.name or self.method.kind, disable=hidden, mininterval=2)

    def _log(self, start: int) -> Log:
        about = {"method": self.method.model_dump(), "train": self.settings.model_dump(mode="json")}
        return Log(self.out / "log.jsonl" if processes.rank() == 0 else None, start, self.settings.report_to, about)

    def _tell(self, log: Log, bar: Any, step: int, row: dict[str, float], health: Health) -> None:
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"{', '.join(bad)} of {self.name or self.method.kind} is not finite at step {step}. Lower the learning rate (now"
                f" {self.settings.lr:g}) and resume from the last checkpoint in '{self.out}'."
            )
        more = dict(self.watch(step, self)) if self.watch is not None else {}
        if self.settings.shard:
            sharding.rest(self.roles)
        if processes.rank() == 0:
            log.write(step, row | more | health.look(step, row | more))
        bar.update()
        bar.set_postfix(loss=f"{row.get('loss', float('nan')):.4f}", refresh=False)

    def restore(self, to_train: bool = True) -> int:
        """Take everything from the last checkpoint; its number of steps. to_train: optimisers, too, which are most of what a
        training holds, and of no use to an export. Raises `ResumeError` as `fit` does."""
        folder = self.out / "latest"
        if not folder.exists() and (old := folder.with_name("latest.old")).exists():
            old.rename(folder)
        if not (folder / "state.json").is_file():
            raise ResumeError(f"There is no complete checkpoint in '{self.out}'. Start without resume.")
        state = json.loads((folder / "state.json").read_text())
        if state["method"] != self.method.model_dump():
            raise ResumeError(f"'{self.out}' was trained by {state['method']}, not by {self.method.model_dump()}.")
        for name, player in self.players.items():
            player.load(folder / name, to_train)
        self.headings = direction.Headings(state.get("headings"))  # older checkpoints have none
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
    return {name: value.clone() for name, value in player.current().items()}


@torch.no_grad()
def _follow(target: Player, student: Player, decay: float) -> None:
    """target <- decay target + (1 - decay) student, weight by weight; heads of the student have no counterpart."""
    own, new = (
        sharding.local({n: p for n, p in player.parameters.items() if not n.startswith("heads.")}) for player in (target, student)
    )
    torch._foreach_lerp_(own, new, 1 - decay)
