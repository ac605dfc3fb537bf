"""Trainings one after the other, each of which begins with the student of the one before: one configuration, one folder.

The usual order is the one of Seedance (arXiv 2506.09113, section 4): first the student learns where the teacher's trajectories
end (`pairs`, `lcm`, `progressive`), then to be likely where that left it between two answers (`dmd`, `ladd`). The teacher
stays the same throughout, and so do the data, which are made once: with what the most demanding stage needs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from hasten.distill.data.prepare import prepare
from hasten.distill.loop import processes
from hasten.distill.loop.settings import TrainSettings
from hasten.distill.loop.state import claimed, replace_folder
from hasten.distill.loop.trainer import Trainer
from hasten.distill.method import Method
from hasten.distill.methods import load_all
from hasten.distill.pretrain.config import Strict, parse_as, read_config
from hasten.distill.train_config import DataConfig, StudentConfig, TrainConfig, spelt
from hasten.distill.training import train
from hasten.errors import UsageError
from hasten.part import parse
from hasten.pipelines import loading

DEMANDS = ("prompts", "latents", "own", "pairs")
"""Kinds of data; each has what those before it have, but for `own`, which no teacher makes."""


class StageConfig(Strict):
    """One of the trainings."""

    method: Method
    train: TrainSettings = TrainSettings()

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Method:
        load_all()
        return parse(Method, value, "method")  # type: ignore[type-abstract]  # a member is what comes


class ChainConfig(Strict):
    """A chain. What is trained and on what is the same for all stages."""

    model: str
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    student: StudentConfig = StudentConfig()
    data: DataConfig = DataConfig()

    def stage(self, number: int, out: Path) -> TrainConfig:
        """The configuration of one stage, the first being 0."""
        start = str(self.folder(number - 1, out)) if number else self.student.start
        file = self.data.file or str(out / "data.safetensors")
        data = DataConfig(file=file, call=self.data.call, drop=self.data.drop)
        stage = self.stages[number]
        student = self.student.model_copy(update={"start": start})
        return TrainConfig(model=self.model, method=stage.method, train=stage.train, student=student, data=data)

    def folder(self, number: int, out: Path) -> Path:
        """Where a stage is trained."""
        return out / f"{number + 1}-{self.stages[number].method.kind}"


def load_chain(file: str | Path, overrides: Mapping[str, Any] | None = None) -> ChainConfig:
    """The chain in `file`, with `overrides` (names as in `train_config.load_config`; not of the stages).

    Raises `UsageError` naming what is unknown, contradicts, or is missing.
    """
    given = {key: plain for name, value in (overrides or {}).items() for key, plain in spelt(name, value).items()}
    own = sorted(name for name in given if name.split(".")[0] in ("method", "train"))
    if own:
        raise UsageError(f"{own[0]} is a matter of each stage: write it into '{file}', below stages.")
    config = parse_as(ChainConfig, *read_config(file, given))
    if any(stage.method.kind == "dcgen" for stage in config.stages):
        raise UsageError("dcgen makes another model, which no stage can begin with. Train it by itself, then distil what it made.")
    texts = [stage.method.kind for stage in config.stages if stage.method.data == "tokens"]
    if texts:
        raise UsageError(f"Chains are for pictures and clips; {texts[0]} trains a text model. Train its stages by themselves.")
    for number, stage in enumerate(config.stages, 1):
        try:
            config.stage(number - 1, Path())
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise UsageError(f"'{file}', stage {number} ({stage.method.kind}): {said}.") from None
    return config


def train_chain(
    config: ChainConfig, out: Path, *, resume: bool = False, progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Trainer:  # fmt: skip
    """Train all stages below `out`, a folder for each, and leave the last one's `student/` there. Returns the last trainer.

    resume: finished stages are passed over, one that was begun goes on. Raises as `train`.
    """
    with processes.joined():
        mine = claimed(out, config.model_dump(mode="json"), resume, ("stages",)) if processes.first() else nullcontext()
        with mine:
            with processes.first_alone():
                _prepare(config, out, say, resume, progress)
            for number in range(len(config.stages)):
                stage, folder = config.stage(number, out), config.folder(number, out)
                say(f"Stage {number + 1} of {len(config.stages)}: {stage.method.kind}.")
                begun = (folder / "config.json").exists()
                done = train(stage, folder, resume=begun, progress=progress, say=say)
            if processes.first() and (folder / "student").is_dir():
                replace_folder(out / "student", lambda part: _copy(folder / "student", part))
    return done


def _prepare(config: ChainConfig, out: Path, say: Callable[[str], None], resume: bool, progress: bool) -> None:
    """The data of all stages, as the most demanding one wants them."""
    most = max((stage.method for stage in config.stages), key=lambda method: DEMANDS.index(method.data))
    pipe = loading.open_pipeline(config.model, lora=config.student.base_lora, quiet=True)
    first = TrainConfig(
        model=config.model, method=most, train=config.stages[0].train, student=config.student, data=config.data
    )
    prepare(first, pipe, out, say, resume, progress)


def _copy(source: Path, into: Path) -> None:
    shutil.copytree(source, into, dirs_exist_ok=True)
