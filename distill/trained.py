"""A finished training, opened again: the student with its trained weights, whatever method it is of.

Shapes: none of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hasten.distill.data.store import Store
from hasten.distill.loop.trainer import Trainer
from hasten.distill.network.few_steps import FewSteps, OwnWay
from hasten.distill.network.hint import FlowMap, Hinted
from hasten.distill.network.host_call import HostCall, learn
from hasten.distill.network.quantised import Quantised
from hasten.distill.network.roles import Role
from hasten.distill.pretrain.config import parse_as
from hasten.distill.train_config import TrainConfig
from hasten.distill.training import cast
from hasten.errors import UsageError
from hasten.pipelines import loading, tiny_models


@dataclass(frozen=True)
class Trained:
    """student: with its averaged weights, where there are any. steps: how it is sampled, None for "as its teacher". call: the
    arguments of the pipeline that it was trained for."""

    config: TrainConfig
    pipe: Any
    call: dict[str, Any]
    student: Role | Hinted | FlowMap | OwnWay | Quantised
    steps: FewSteps | None
    trainer: Trainer

    @property
    def host(self) -> HostCall:
        """How the student's network is called."""
        roles = self.trainer.roles
        return roles.get("student", roles["teacher"]).host


def open_trained(folder: Path) -> Trained:
    """The training in `folder`, of any method for pictures and clips (of a chain: its last stage's folder).

    Raises `UsageError` where there is none, or one of a text model.
    """
    file = folder / "config.json"
    if not file.is_file() or not (folder / "latest").is_dir():
        raise UsageError(f"There is no training in '{folder}': config.json and latest/ are needed.")
    config = parse_as(TrainConfig, json.loads(file.read_text()), str(file))
    if config.method.data == "tokens":
        raise UsageError(f"'{folder}' trained a text model ({config.method.kind}), which makes no pictures.")
    if config.method.kind == "dcgen":
        raise UsageError(f"'{folder}' made a model of its own: open '{folder / 'student'}' as any pipeline.")
    dtype = "float32" if config.student.full else None
    pipe = loading.open_pipeline(config.model, lora=config.student.base_lora, quiet=True, dtype=dtype)
    call = tiny_models.call_defaults(pipe) | config.data.call
    rows = Store.load(Path(config.data.file) if config.data.file else folder / "data.safetensors")
    host, _ = learn(pipe, [rows.prompts[0]], **call)
    trainer = Trainer(config.method, cast(config, pipe, host, rows.conditions), rows, config.train, folder, host.shape, progress=False)
    for name, player in trainer.players.items():
        player.load(folder / "latest" / name)
    player = trainer.players["student"]
    with torch.no_grad():
        for name, value in player.average.items():
            player.parameters[name].copy_(value)
    return Trained(config, pipe, call, trainer.state.student(), trainer.state.sampler(), trainer)
